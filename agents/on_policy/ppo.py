"""Proximal policy optimization from pixels, state or both (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

The clip is one of several surrogates that keep a policy near the one that acted (`agents.core.policy_gradient`); A2C,
REINFORCE, SPO, DPO's and LPO's drifts, ASPO and a KL penalty (fixed, or adapted to a target) are this agent with
another `surrogate`. Defaults are Stable-Baselines3's for continuous control from states. Where a rollout holds a
teacher's actions, they are a further term (`agents.on_policy.teacher`). What differs from common implementations
stands in `agents.on_policy.actor_critic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.core import policy_gradient
from agents.core.agent import Observation
from agents.core.drift import SHIPPED, load_drift
from agents.core.errors import UserError
from agents.core.rollout import Experience
from agents.on_policy.actor_critic import OnPolicyActorCritic, Samples
from agents.on_policy.config import OnPolicyConfig, Ranges, not_negative, positive
from agents.on_policy.losses import normalized, value_target
from agents.on_policy.teacher import teacher_loss, teacher_weight
from agents.on_policy.updates import mean_metrics, passes

Surrogate = Literal[
    "ppo_clip", "dual_clip", "masked", "spo", "discovered_drift", "asymmetric_trust_region",
    "kl_penalty", "reinforce", "learned_drift",
]  # fmt: skip


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Proximal policy optimization; defaults from Stable-Baselines3 unless a field says otherwise."""

    surrogate: Surrogate = "ppo_clip"
    """What keeps the policy near the one that acted; see `agents.core.policy_gradient`."""
    clip: float = 0.2
    """Largest |ratio - 1| that surrogates with a trust region allow (PPO's paper, section 6.1); for
    `asymmetric_trust_region`, too, to which FPO++ gives .05."""
    kl_coefficient: float = 1.0
    """Weight of `kl_penalty`'s penalty (PPO's paper, table 1: fixed 1). The KL is estimated from the actions that were
    taken, where the paper has that of the distributions: actions whose advantage is this weight or more are not held
    back by their own ratio."""
    drift_file: str = ""
    """Weights of `learned_drift`, written by `experiments.evolve_drift`; empty for those that are shipped."""
    target_kl: float = math.inf
    """Estimated KL(old || new), in nats, after which the remaining passes are left out."""
    adaptive_kl_target: float = math.inf
    """Estimated KL(old || new), in nats, that every update should come to: `kl_coefficient`, then only the start, is
    halved and doubled to that end (PPO's paper, section 4: .003, .01 or .03); infinity keeps it fixed."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    baseline: bool = True
    """Credit steps with advantages; without, with returns, and the value only stands in for what comes after a time
    limit or the rollout."""
    teacher_coefficient: float = 1.0
    """Weight of the term that draws the policy to a teacher's actions, where there is a teacher (RPD 1)."""
    teacher_decay: int = 0
    """Agent steps in which that weight falls to 0, along half a cosine (RPD's code); 0 keeps it."""

    RANGES: ClassVar[Ranges] = (
        ("target_kl adaptive_kl_target", positive, "a positive number"),
        ("clip", lambda value: 0 < value < 1, "a number in (0, 1)"),
        ("kl_coefficient entropy_coefficient teacher_decay", not_negative, "0 or more"),
        ("teacher_coefficient", lambda value: 0 <= value < math.inf, "0 or more"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if self.surrogate not in SURROGATES:
            raise UserError.unknown("surrogate", self.surrogate, SURROGATES)
        if self.drift_file and self.surrogate != "learned_drift":
            raise UserError(
                f"drift_file is '{self.drift_file}', but the surrogate is {self.surrogate}; give learned_drift, or no "
                "file"
            )
        if self.adapts_kl and not (self.surrogate == "kl_penalty" and self.kl_coefficient):
            raise UserError(
                f"adaptive_kl_target is {self.adaptive_kl_target}, but nothing adapts to it; use surrogate "
                "kl_penalty with a kl_coefficient above 0"
            )

    @property
    def adapts_kl(self) -> bool:
        """Whether the coefficient of `kl_penalty` adapts."""
        return math.isfinite(self.adaptive_kl_target)

    def surrogate_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the surrogate with this config's settings."""
        return SURROGATES[self.surrogate](self)


SURROGATES: dict[str, Callable[[PPOConfig], Callable[[Tensor, Tensor], Tensor]]] = {
    "ppo_clip": lambda config: partial(policy_gradient.ppo_clip, clip=config.clip),
    "dual_clip": lambda config: partial(policy_gradient.dual_clip, clip=config.clip),
    "masked": lambda config: partial(policy_gradient.masked, clip=config.clip),
    "spo": lambda config: partial(policy_gradient.spo, clip=config.clip),
    "discovered_drift": lambda _: policy_gradient.discovered_drift,
    "asymmetric_trust_region": lambda config: partial(
        policy_gradient.asymmetric_trust_region, clip=config.clip
    ),
    "kl_penalty": lambda config: partial(
        policy_gradient.kl_penalty, coefficient=config.kl_coefficient
    ),
    "reinforce": lambda _: policy_gradient.reinforce,
    "learned_drift": lambda config: partial(
        policy_gradient.learned_drift, drift=load_drift(config.drift_file or SHIPPED)
    ),
}
"""From a config to `(log_ratio, advantage) -> loss per sample`, by the surrogate's name."""


A2C = PPOConfig(
    surrogate="reinforce", rollout_length=16, minibatch_size=10**9, epochs=1, learning_rate=7e-4,
    gae_lambda=1.0, normalize_advantage=False, entropy_coefficient=0.0,
)  # fmt: skip
"""Advantage actor-critic (Mnih et al. 2016, https://arxiv.org/abs/1602.01783): one step on all of a short rollout, with
Stable-Baselines3's step size, which stands there beside RMSprop and here beside Adam; its rollouts have 5
steps of more environments."""

REINFORCE = PPOConfig(
    surrogate="reinforce", rollout_length=2048, minibatch_size=10**9, epochs=1, learning_rate=3e-3,
    gae_lambda=1.0, baseline=False,
)  # fmt: skip
"""Monte Carlo policy gradient (Williams 1992, https://doi.org/10.1007/BF00992696): one step on the returns of a long
rollout, of which `normalize_advantage` takes the mean (Williams's reinforcement comparison) and the spread. The step
size is ours. With `baseline` the value is subtracted, too."""


def adapted_coefficient(coefficient: Tensor, divergence: Tensor, *, target: float) -> Tensor:
    """Return the coefficient of a KL penalty for the next update (PPO's paper, section 4).

    Halved where the last update came to less than target / 1.5, doubled above 1.5 * target; both stop before the
    coefficient leaves float32 for good.

    Args:
        coefficient: 0-d, positive.
        divergence: KL(old || new) of the last update, 0-d.
        target: positive.
    """
    smaller = torch.where(divergence < target / 1.5, coefficient / 2, coefficient)
    return torch.where(divergence > target * 1.5, coefficient * 2, smaller).clamp(1e-10, 1e10)


class PPO(OnPolicyActorCritic):
    """The agent; see the module's docstring, and `OnPolicyActorCritic` for arguments."""

    config: PPOConfig

    def prepare(self) -> None:
        """Build the surrogate, and the coefficient that adapts."""
        config = self.config
        self.surrogate = config.surrogate_loss()
        self.agent_steps = 0  # so far, for schedules
        if config.adapts_kl:
            self.kl_coefficient = torch.tensor(config.kl_coefficient, device=self.device)
            self.surrogate = partial(policy_gradient.kl_penalty, coefficient=self.kl_coefficient)

    def set_progress(self, agent_steps: int) -> None:
        """Let the teacher's weight fall."""
        self.agent_steps = agent_steps

    def learn(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Take several passes of minibatches."""
        metrics: list[dict[str, Tensor]] = []
        config = self.config
        for index in passes(
            lambda: self.minibatches(experience),
            metrics,
            epochs=config.epochs,
            target_kl=config.target_kl,
        ):
            metrics.append(self.step(experience.observation(index), samples.at(index)))
        means = mean_metrics(metrics)
        if config.adapts_kl:
            means |= self._adapt(experience, samples)
        return means

    @torch.no_grad()
    def _adapt(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Adapt the penalty's coefficient to how far this update has gone (PPO's paper, section 4)."""
        log_ratio = torch.cat([
            self.network(experience.observation(index))[0].log_prob(samples.at(index).action)
            - samples.at(index).log_prob
            for index in self.minibatches(experience)
        ])  # fmt: skip
        divergence = policy_gradient.kl_estimate(log_ratio).mean()
        adapted = adapted_coefficient(
            self.kl_coefficient, divergence, target=self.config.adaptive_kl_target
        )
        self.kl_coefficient.copy_(adapted)
        return {"policy/kl_coefficient": adapted, "policy/kl_of_update": divergence}

    def step(self, observation: Observation, sample: Samples) -> dict[str, Tensor]:
        """Take one gradient step on a minibatch."""
        weight = None
        if sample.teacher_action is not None:
            config = self.config
            now = teacher_weight(config.teacher_coefficient, config.teacher_decay, self.agent_steps)
            if now:  # without one the teacher is only watched
                weight = torch.full((), now, device=self.device)
        return self.descend(self.gradients, observation, sample, weight)

    def gradients(
        self, observation: Observation, sample: Samples, weight: Tensor | None
    ) -> dict[str, Tensor]:
        """Leave the gradients of a minibatch's loss; `weight` is that of the teacher's term, 0-d."""
        config = self.config
        policy, value = self.network(observation)
        log_ratio = policy.log_prob(sample.action) - sample.log_prob
        credit = sample.advantage if config.baseline else value_target(sample.target)
        advantage = normalized(credit) if config.normalize_advantage else credit
        policy_loss = self.surrogate(log_ratio, advantage).mean()
        entropy = policy.entropy().mean()
        critic_loss, metrics = self.critic_loss(observation, policy, value, sample.target)
        loss = policy_loss + critic_loss - config.entropy_coefficient * entropy
        if sample.teacher_action is not None:
            distance = teacher_loss(policy, sample.teacher_action)
            metrics["loss/teacher"] = distance.detach()
            if weight is not None:
                loss = loss + weight * distance
        norm = self.backward(loss)
        return {
            "loss/policy": policy_loss.detach(),
            **metrics,
            "policy/entropy": entropy.detach(),
            "gradient_norm/policy": norm,
            **policy_gradient.ratio_metrics(log_ratio, clip=config.clip),
        }

    def extra_state(self) -> dict[str, Any]:
        """Return what the skeleton does, and the coefficient that adapts."""
        own = {"kl_coefficient": self.kl_coefficient.clone()} if self.config.adapts_kl else {}
        return super().extra_state() | own

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""
        super().load_extra_state(state)
        if self.config.adapts_kl:
            self.kl_coefficient.copy_(state["kl_coefficient"])
