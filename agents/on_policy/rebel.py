"""REBEL for control: regress relative rewards (Gao et al. 2024, https://arxiv.org/abs/2404.16767).

REBEL draws two answers y, y' to one prompt x and regresses the difference of their log-ratios on that of their
rewards: ((log r(y) - log r(y')) / eta - (R(y) - R(y')))^2. Where it fits exactly, the new policy is the mirror descent
step pi_new = pi_old exp(eta R) / Z(x): the normalizer Z, which nobody knows, is the same for both answers and cancels.
No clip and no ratio is needed, and no step beyond what `eta` asks for is rewarded.

**Difference from the paper.** A rollout shows one action in every state, and its reward is an advantage A(s, a), so
there are no pairs of one state; two honest forms are left (`pairs`):

- `baseline`: a step is compared with its own state's average. Over the old policy's actions the advantage averages to
  0, and the log-ratio to -KL(old || new), which is known in closed form. Averaged over the partner a', the paper's
  square is that of the averages plus a variance, and over both actions the two halves are equal: half of the paper's
  loss, its minimum and, in expectation, its gradient are kept. Z(s) cancels as it should.
- `sampled`: two steps of a minibatch are compared as if their states were one, once per pass and in new pairs each
  time. The regression then also asks that log Z(s) be the same everywhere. As log Z = eta^2 Var(A | s) / 2 + ...,
  that is wrong in second order of `eta` only, but on the noise of two steps instead of one. In one state (a bandit)
  it is the paper's method.

Advantages are generalized estimates with a learned value; the paper has no value. The loss is scaled by eta / 2 (per
step), so that its gradient at the policy that acted is the policy gradient, as every surrogate's is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from agents.core import policy_gradient
from agents.core.agent import Observation
from agents.core.distributions import Policy, kl
from agents.core.errors import UserError
from agents.core.rollout import Experience
from agents.on_policy.actor_critic import OnPolicyActorCritic, Samples
from agents.on_policy.config import OnPolicyConfig, Ranges, not_negative
from agents.on_policy.losses import normalized
from agents.on_policy.updates import mean_metrics

Pairs = Literal["baseline", "sampled"]

CLIP = 0.2
"""PPO's, for `ratio/outside` alone: REBEL clips nothing."""


@dataclass(frozen=True)
class REBELConfig(OnPolicyConfig):
    """REBEL for control; defaults as PPO's unless a field says otherwise."""

    eta: float = 0.5
    """Log-ratio per unit of advantage that an update aims for (ours: with advantages of spread 1 and PPO's passes,
    updates come to about PPO's KL of .02)."""
    pairs: Pairs = "baseline"
    """What a step is compared with: its own state's average, or another step of the minibatch."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    RANGES: ClassVar[Ranges] = (
        ("eta", lambda value: 0 < value < math.inf, "a positive number"),
        ("entropy_coefficient", not_negative, "0 or more"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if self.pairs not in get_args(Pairs):
            raise UserError.unknown("pairs", self.pairs, get_args(Pairs))


def baseline_loss(log_ratio: Tensor, advantage: Tensor, divergence: Tensor, eta: float) -> Tensor:
    """Return the regression of every step against its state's average, 0-d.

    Args:
        log_ratio: [B].
        advantage: [B]; 0 on average over the old policy's actions.
        divergence: [B], KL(old || new) in the same states; minus the average log-ratio there.
        eta: see `REBELConfig`.
    """
    pair = (
        torch.stack([log_ratio, -divergence]),
        torch.stack([advantage, torch.zeros_like(advantage)]),
    )
    return eta / 2 * policy_gradient.rebel(*pair, eta=eta).mean()


def sampled_loss(log_ratio: Tensor, advantage: Tensor, eta: float) -> Tensor:
    """Return the regression of the first half of steps against the second, 0-d; an odd one out is left out.

    Args:
        log_ratio: [B], at least 2, in random order.
        advantage: [B].
        eta: see `REBELConfig`.
    """
    half = len(log_ratio) // 2
    x, a = (values[: 2 * half].view(2, half) for values in (log_ratio, advantage))
    # Two steps share one square.
    return eta / 4 * policy_gradient.rebel(x, a, eta=eta).mean()


class REBEL(OnPolicyActorCritic):
    """The agent; see the module's docstring, and `OnPolicyActorCritic` for arguments."""

    config: REBELConfig
    keeps_policy = True

    def learn(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Take several passes of minibatches; of pairs, one that has a single step makes none, and is left out."""
        least = 2 if self.config.pairs == "sampled" else 1
        metrics = [
            self.step(
                experience.observation(index), samples.at(index), self.acted(experience, index)
            )
            for _ in range(self.config.epochs)
            for index in self.minibatches(experience)
            if len(index) >= least
        ]
        return mean_metrics(metrics)

    def step(self, observation: Observation, sample: Samples, old: Policy) -> dict[str, Tensor]:
        """Take one gradient step on a minibatch."""
        return self.descend(self.gradients, observation, sample, old)

    def gradients(
        self, observation: Observation, sample: Samples, old: Policy
    ) -> dict[str, Tensor]:
        """Leave the gradients of a minibatch's loss."""
        config = self.config
        policy, value = self.network(observation)
        log_ratio = policy.log_prob(sample.action) - sample.log_prob
        advantage = normalized(sample.advantage) if config.normalize_advantage else sample.advantage
        divergence = kl(old, policy)
        if config.pairs == "baseline":
            policy_loss = baseline_loss(log_ratio, advantage, divergence, config.eta)
        else:
            policy_loss = sampled_loss(log_ratio, advantage, config.eta)
        entropy = policy.entropy().mean()
        critic_loss, metrics = self.critic_loss(observation, policy, value, sample.target)
        norm = self.backward(policy_loss + critic_loss - config.entropy_coefficient * entropy)
        return {
            "loss/policy": policy_loss.detach(),
            **metrics,
            "policy/entropy": entropy.detach(),
            "gradient_norm/policy": norm,
            "trust_region/kl": divergence.mean().detach(),
            **policy_gradient.ratio_metrics(log_ratio, clip=CLIP),
        }
