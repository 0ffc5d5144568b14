"""Deterministic policy gradient with twin critics, in DrQ-v2's form (https://arxiv.org/abs/2107.09645).

From pixels with random shifts this is DrQ-v2; from a state it is DDPG with n-step returns and clipped double Q.

Differences from the published code:
- A true termination ends the return (the published loader turns its discount 0 into 1).
- Time limits bootstrap from the true last observation, also inside the n-step window.
- Shifts are whole-pixel gathers; the published bilinear sampling gives the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agents.core.distributions import clipped_gaussian
from agents.core.encoders import EncoderName
from agents.core.errors import UserError
from agents.core.networks import Trunk, gradient_norm, mlp
from agents.core.schedules import linear
from agents.off_policy.actor_critic import ActorCritic, ActorCriticConfig


@dataclass(frozen=True)
class DDPGConfig(ActorCriticConfig):
    """DrQ-v2; defaults from its paper, table 3, and code."""

    encoder: EncoderName = "drqv2"
    """Convolutions over pixels (DrQ-v2: 4 layers)."""
    feature_dim: int = 50
    """Length of the projection behind the encoder (DrQ-v2)."""
    batch_size: int = 256
    """Transitions per update (DrQ-v2; walker 512)."""
    n_step: int = 3
    """Steps of reward before bootstrapping (DrQ-v2; walker 1)."""
    actor_learning_rate: float = 1e-4
    """Adam step size of the actor (DrQ-v2; humanoid 8e-5)."""
    critic_learning_rate: float = 1e-4
    """Adam step size of critic and encoder (DrQ-v2; humanoid 8e-5)."""
    encoder_tau: float = 1.0
    """1: the online encoder serves the target critic too (DrQ-v2)."""
    actor_every: int = 1
    """Critic updates per actor update (DrQ-v2)."""
    target_every: int = 1
    """Critic updates per moving average (DrQ-v2)."""
    noise_start: float = 1.0
    """Exploration's standard deviation at the start (DrQ-v2)."""
    noise_end: float = 0.1
    """Exploration's standard deviation after `noise_steps` (DrQ-v2)."""
    noise_steps: int = 50_000
    """Agent steps over which the standard deviation falls (DrQ-v2 easy tasks: 100k frames at repeat 2)."""
    noise_clip: float = 0.3
    """Bound on the noise of target and actor actions (DrQ-v2)."""

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        for name in ("noise_start", "noise_end", "noise_clip", "noise_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")


class DeterministicActor(nn.Module):
    """Trunk and MLP to an action."""

    def __init__(self, trunk: Trunk, action: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = mlp([trunk.out_features, *hidden, action])

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean action in (-1, 1), float32 [B, A]."""
        return torch.tanh(self.head(self.trunk(features)))


def actor_loss(values: tuple[Tensor, Tensor]) -> Tensor:
    """Return -E[min(Q1, Q2)] at the policy's noisy action (eq. 4)."""
    return -torch.minimum(*values).mean()


class DDPG(ActorCritic):
    """The agent; see the module's docstring."""

    config: DDPGConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On the device and changed in place: a compiled update reads it there.
        self.std = torch.empty((), device=self.device)
        self.noise = self.config.noise_start

    @property
    def noise(self) -> float:
        """Standard deviation of the noise of exploration, target and actor."""
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        self._noise = value
        self.std.fill_(value)

    def make_actor(self) -> nn.Module:
        """Build the deterministic actor."""
        critic, config = self.critic, self.config
        trunk = Trunk(critic.pixel_features, critic.state_features, config.feature_dim)
        return DeterministicActor(trunk, self.action_dim, config.hidden)

    def set_progress(self, agent_steps: int) -> None:
        """Set the exploration noise for this step."""
        config = self.config
        self.noise = linear(config.noise_start, config.noise_end, config.noise_steps, agent_steps)

    def policy(self, features: Tensor, *, explore: bool) -> Tensor:
        """Return the mean, with unclipped noise when exploring."""
        mean = self.actor(features)
        return self._noisy(mean, clip=None) if explore else mean

    def next_value(self, policy_features: Tensor, target_features: Tensor) -> Tensor:
        """Return min(Q1, Q2) at a noisy next action (eq. 2 and 3)."""
        action = self._noisy(self.actor(policy_features), self.config.noise_clip)
        return torch.minimum(*self.target(target_features, action))

    def update_actor(self, features: Tensor) -> dict[str, Tensor]:
        """Step the actor."""
        self.actor_optimizer.zero_grad(set_to_none=True)
        metrics = self.differentiate(self.actor_gradients, features)
        self.actor_optimizer.step()
        return metrics | {"policy/noise": self.std.clone()}

    def actor_gradients(self, features: Tensor) -> dict[str, Tensor]:
        """Leave the actor's gradients."""
        action = self._noisy(self.actor(features), self.config.noise_clip)
        self.critic.requires_grad_(False)
        loss = actor_loss(self.critic(features, action))
        self.critic.requires_grad_(True)
        loss.backward()
        return {"loss/actor": loss.detach(), "gradient_norm/actor": gradient_norm(self.actor)}

    def extra_state(self) -> dict[str, Any]:
        """Return the update counter and the current noise."""
        return {**super().extra_state(), "noise": self.noise}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the update counter and the current noise."""
        super().load_extra_state(state)
        self.noise = state["noise"]

    def _noisy(self, mean: Tensor, clip: float | None) -> Tensor:
        noise = torch.randn(mean.shape, generator=self.generator, device=mean.device)
        return clipped_gaussian(mean, self.std, noise, clip)
