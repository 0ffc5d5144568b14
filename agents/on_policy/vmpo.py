"""On-policy maximum a posteriori policy optimization (V-MPO; Song et al. 2019, https://arxiv.org/abs/1909.12238).

A batch's better half is imitated, weighted by softmax(advantage / temperature) (eqs. 3-4), while the policy stays
within a KL(old || new) of the one that acted (eq. 5). Temperature and the KL's multiplier solve their duals by gradient
steps of their own and are kept positive by projection. For Gaussians the KL is split: how far the means went at the
old spread, and how far the spreads went at the old means, each with its own limit and multiplier, so that learning a
mean quickly does not cost the exploration.

Differences from the paper:
- The network that acts stays for one rollout, and all gradient steps until the next one (the paper's T_target) are
  taken on it: T_target is epochs * rollout_length * num_envs / minibatch_size. With one epoch every step is looked at
  once, as in the paper; more epochs look again, which the KL to the policy that acted allows.
- Advantages are generalized estimates instead of n-step ones, and have mean 0 and spread 1 in every minibatch unless
  `normalize_advantage` is off (the paper uses PopArt where tasks differ); a temperature is then free of the rewards'
  scale.
- The duals have a step size of their own (the paper's is Adam's 1e-4 for all, in runs of billions of steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from agents.core import policy_gradient
from agents.core.agent import Observation
from agents.core.distributions import Gaussian, Policy, kl
from agents.core.errors import UserError
from agents.core.rollout import Experience
from agents.on_policy.actor_critic import OnPolicyActorCritic, Samples
from agents.on_policy.config import OnPolicyConfig, Ranges
from agents.on_policy.losses import normalized
from agents.on_policy.updates import mean_metrics

SMALLEST = 1e-8
"""Below this no dual falls (the paper's projection)."""

CLIP = 0.2
"""PPO's, for `ratio/outside` alone: V-MPO clips nothing."""


@dataclass(frozen=True)
class VMPOConfig(OnPolicyConfig):
    """V-MPO; defaults as reproductions quote the paper's appendix, unless a field says otherwise."""

    minibatch_size: int = 256
    """Steps per gradient step, about; its better half is imitated (ours)."""
    epochs: int = 10
    """Passes over a rollout (ours; the paper's 1)."""
    epsilon_temperature: float = 0.01
    """Nats between the imitated weights and equal ones (paper .01 for control, .02 for Atari)."""
    epsilon_policy: float = 0.01
    """Largest KL of a discrete policy, or of a Gaussian's means (paper .001 to .01, and .005 to .01)."""
    epsilon_covariance: float = 5e-5
    """Largest KL of a Gaussian's spreads (paper 5e-6 to 5e-5)."""
    initial_temperature: float = 1.0
    """Temperature at the start (paper 1)."""
    initial_multiplier: float = 1.0
    """Weight of every KL at the start (paper 1 for Gaussians, 5 for discrete policies)."""
    dual_learning_rate: float = 1e-2
    """Adam step size of temperature and multipliers (Acme's MPO)."""

    RANGES: ClassVar[Ranges] = (
        ("minibatch_size", lambda value: value >= 2, "at least 2: a batch is halved"),
        (
            "epsilon_temperature epsilon_policy epsilon_covariance initial_temperature initial_multiplier "
            "dual_learning_rate",
            lambda value: 0 < value < math.inf,
            "a positive number",
        ),
    )


class Duals(nn.Module):
    """Temperature and multipliers.

    Args:
        temperature: at the start.
        multipliers: name of each KL -> its weight at the start.
    """

    def __init__(self, temperature: float, multipliers: dict[str, float]) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.multipliers = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(value)) for name, value in multipliers.items()}
        )

    @torch.no_grad()
    def project(self) -> None:
        """Bring everything back above 0."""
        for parameter in self.parameters():
            parameter.clamp_(min=SMALLEST)


def divergences(old: Policy, new: Policy) -> dict[str, Tensor]:
    """Return what V-MPO bounds, by name, [B] each: the KL(old || new), of Gaussians in its two parts.

    The parts are the KL to a policy that has the new means and the old spreads, and to one with the old means and the
    new spreads (Abdolmaleki et al. 2018, https://arxiv.org/abs/1812.02256).
    """
    if isinstance(old, Gaussian) and isinstance(new, Gaussian):
        return {
            "mean": kl(old, Gaussian(new.mean, old.log_std)),
            "covariance": kl(old, Gaussian(old.mean, new.log_std)),
        }
    return {"policy": kl(old, new)}


class VMPO(OnPolicyActorCritic):
    """The agent; see the module's docstring, and `OnPolicyActorCritic` for arguments."""

    config: VMPOConfig
    keeps_policy = True

    def prepare(self) -> None:
        """Build the duals.

        Raises:
            UserError: a rollout has a single step.
        """
        config = self.config
        if config.rollout_length * self.num_envs < 2:
            raise UserError(
                "a rollout of one step has no better half; give rollout_length 2 or more"
            )
        self.limits = {"policy": config.epsilon_policy}
        if self.distribution is Gaussian:
            self.limits = {"mean": config.epsilon_policy, "covariance": config.epsilon_covariance}
        start = dict.fromkeys(self.limits, config.initial_multiplier)
        self.duals = Duals(config.initial_temperature, start).to(self.device)
        self.dual_optimizer = torch.optim.Adam(
            self.duals.parameters(), lr=config.dual_learning_rate
        )

    def learn(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Take several passes of minibatches; one that has a single step has no better half, and is left out."""
        metrics = [
            self.step(
                experience.observation(index), samples.at(index), self.acted(experience, index)
            )
            for _ in range(self.config.epochs)
            for index in self.minibatches(experience)
            if len(index) > 1
        ]
        return mean_metrics(metrics)

    def step(self, observation: Observation, sample: Samples, old: Policy) -> dict[str, Tensor]:
        """Take one gradient step of the network, and one of the duals, on a minibatch."""
        duals = self.duals
        self.dual_optimizer.zero_grad(set_to_none=True)
        metrics = self.descend(self.gradients, observation, sample, old)
        self.dual_optimizer.step()
        duals.project()
        return metrics | {
            "dual/temperature": duals.temperature.detach().clone(),
            **{f"dual/{name}": p.detach().clone() for name, p in duals.multipliers.items()},
        }

    def gradients(
        self, observation: Observation, sample: Samples, old: Policy
    ) -> dict[str, Tensor]:
        """Leave the gradients of the network and of the duals."""
        config, duals = self.config, self.duals
        policy, value = self.network(observation)
        log_prob = policy.log_prob(sample.action)
        advantage = normalized(sample.advantage) if config.normalize_advantage else sample.advantage
        loss = policy_gradient.vmpo(
            log_prob, advantage, duals.temperature, epsilon=config.epsilon_temperature
        )
        distance = {name: each.mean() for name, each in divergences(old, policy).items()}
        penalty = sum(duals.multipliers[name].detach() * distance[name] for name in distance)
        critic_loss, metrics = self.critic_loss(observation, policy, value, sample.target)
        norm = self.backward(loss.policy + penalty + critic_loss)
        slack = {name: self.limits[name] - distance[name].detach() for name in distance}
        dual = loss.temperature + sum(duals.multipliers[name] * slack[name] for name in slack)
        dual.backward()
        return {
            "loss/policy": loss.policy.detach(),
            **metrics,
            "policy/entropy": policy.entropy().mean().detach(),
            "gradient_norm/policy": norm,
            **{f"trust_region/kl_{name}": each.detach() for name, each in distance.items()},
            **policy_gradient.ratio_metrics(log_prob - sample.log_prob, clip=CLIP),
        }

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save, duals among them."""
        return super().networks() | {"duals": self.duals}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers to save."""
        return super().optimizers() | {"duals": self.dual_optimizer}
