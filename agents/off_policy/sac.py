"""Soft actor-critic from pixels, state or both (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905).

With random shifts this is DrQ (K = M = 1, https://arxiv.org/abs/2004.13649), with random crops RAD
(https://arxiv.org/abs/2004.14990), without either SAC. Defaults are DMControl-GB's.

Differences from those sources:
- The log-probability uses the exact Jacobian of tanh (no 1e-6 inside the logarithm).
- The actor reads the features that the critic's step computed, one gradient step old (as DrQ-v2 does).
- No burst of 1000 updates after the random steps.
- With n_step > 1 (the CPU preset) the rewards in between carry no entropy bonus; only the last state's value does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agents.core.distributions import bound_log_std, squashed_gaussian
from agents.core.errors import UserError
from agents.core.networks import Trunk, gradient_norm, mlp
from agents.off_policy.actor_critic import ActorCritic, ActorCriticConfig


@dataclass(frozen=True)
class SACConfig(ActorCriticConfig):
    """Soft actor-critic; defaults from DMControl-GB unless a field says otherwise."""

    initial_temperature: float = 0.1
    """Entropy temperature alpha at the start (DMControl-GB)."""
    temperature_learning_rate: float = 1e-4
    """Adam step size of log alpha (DMControl-GB)."""
    temperature_beta1: float = 0.5
    """Adam's first decay rate for log alpha (DMControl-GB)."""
    log_std_low: float = -10.0
    """Lower bound of the policy's log standard deviation (DMControl-GB)."""
    log_std_high: float = 2.0
    """Upper bound of the policy's log standard deviation (DMControl-GB)."""

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if not self.initial_temperature > 0:
            raise UserError(
                f"initial_temperature is {self.initial_temperature}; give a positive number"
            )
        if not 0 <= self.temperature_beta1 < 1:
            raise UserError(f"temperature_beta1 is {self.temperature_beta1}; give one in [0, 1)")
        if not self.log_std_low < self.log_std_high:
            raise UserError(
                f"log_std_low {self.log_std_low} is not below log_std_high {self.log_std_high}"
            )


class SquashedActor(nn.Module):
    """Trunk and MLP to the mean and log standard deviation before the tanh."""

    def __init__(self, trunk: Trunk, action: int, config: SACConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = mlp([trunk.out_features, *config.hidden, 2 * action])
        self.bounds = (config.log_std_low, config.log_std_high)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log_std, float32 [B, A] each."""
        mean, raw = self.head(self.trunk(features)).chunk(2, dim=1)
        return mean, bound_log_std(raw, *self.bounds)


def soft_value(values: tuple[Tensor, Tensor], log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Return min(Q1, Q2) - alpha * log pi, [B] (eq. 3)."""
    return torch.minimum(*values) - alpha * log_prob


def actor_loss(values: tuple[Tensor, Tensor], log_prob: Tensor, alpha: Tensor) -> Tensor:
    """Return E[alpha * log pi - min(Q1, Q2)] (eq. 7)."""
    return -soft_value(values, log_prob, alpha).mean()


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Return E[-alpha * (log pi + target entropy)] (eq. 18)."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


class SAC(ActorCritic):
    """The agent; see the module's docstring."""

    config: SACConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        start = math.log(config.initial_temperature)
        self.temperature = nn.ParameterDict(
            {"log_alpha": nn.Parameter(torch.tensor(start, device=self.device))}
        )
        self.target_entropy = -float(self.action_dim)
        self.temperature_optimizer = torch.optim.Adam(
            self.temperature.parameters(),
            lr=config.temperature_learning_rate,
            betas=(config.temperature_beta1, 0.999),
        )

    def make_actor(self) -> nn.Module:
        """Build the squashed Gaussian actor."""
        critic, config = self.critic, self.config
        trunk = Trunk(critic.pixel_features, critic.state_features, config.feature_dim)
        return SquashedActor(trunk, self.action_dim, config)

    @property
    def alpha(self) -> Tensor:
        """Return the temperature, detached, 0-d."""
        return self.temperature["log_alpha"].detach().exp()

    def policy(self, features: Tensor, *, explore: bool) -> Tensor:
        """Sample, or return the squashed mean."""
        mean, log_std = self.actor(features)
        return self._sample(mean, log_std)[0] if explore else torch.tanh(mean)

    def next_value(self, policy_features: Tensor, target_features: Tensor) -> Tensor:
        """Return the soft value of the next state."""
        action, log_prob = self._sample(*self.actor(policy_features))
        return soft_value(self.target(target_features, action), log_prob, self.alpha)

    def update_actor(self, features: Tensor) -> dict[str, Tensor]:
        """Step actor and temperature."""
        self.actor_optimizer.zero_grad(set_to_none=True)
        self.temperature_optimizer.zero_grad(set_to_none=True)
        metrics = self.differentiate(self.actor_gradients, features)
        self.actor_optimizer.step()
        self.temperature_optimizer.step()
        return metrics | {"policy/temperature": self.alpha}

    def actor_gradients(self, features: Tensor) -> dict[str, Tensor]:
        """Leave the gradients of actor and temperature."""
        action, log_prob = self._sample(*self.actor(features))
        self.critic.requires_grad_(False)
        loss = actor_loss(self.critic(features, action), log_prob, self.alpha)
        self.critic.requires_grad_(True)
        loss.backward()
        log_alpha = self.temperature["log_alpha"]
        alpha_loss = temperature_loss(log_alpha, log_prob, self.target_entropy)
        alpha_loss.backward()
        return {
            "loss/actor": loss.detach(),
            "loss/temperature": alpha_loss.detach(),
            "policy/entropy": -log_prob.detach().mean(),
            "gradient_norm/actor": gradient_norm(self.actor),
        }

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save, the temperature among them."""
        return {**super().networks(), "temperature": self.temperature}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers to save."""
        return {**super().optimizers(), "temperature": self.temperature_optimizer}

    def _sample(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(mean.shape, generator=self.generator, device=mean.device)
        return squashed_gaussian(mean, log_std, noise)
