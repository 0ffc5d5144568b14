"""Trust region policy optimization (Schulman et al. 2015, https://arxiv.org/abs/1502.05477).

One step a rollout: along the natural gradient, as far as a mean KL(old || new) of `max_kl` allows (eq. 14), then
backward by a line search until the surrogate has gained and the KL keeps the limit. The value is fitted apart, in
minibatches.

**Who moves what.** The policy's step moves everything that the policy is made of: encoder and projection of pixels,
actor and spread. The value's fit moves the critic's own layers and nothing else, on features as the policy's step left
them. So the limit holds for the whole update, from pixels too. With a fit that also moves the shared encoder, as in
Stable-Baselines3-contrib, the policy goes on moving after its line search, and nothing bounds it. The price: no value
teaches the encoder what matters, and from pixels learning takes about twice the steps of PPO's (on toy/reach). DrAC's
term, where it is asked for, regularizes the critic's layers only.

Differences from the paper:
- Generalized advantages with a learned value, brought to mean 0 and spread 1 over the rollout, instead of sampled
  returns (as in the authors' later code).
- Fisher-vector products use all steps of the rollout unless `fisher_fraction` says otherwise (the paper's a tenth), and
  are damped (as in the authors' later code).
- A line search that fails leaves the policy where it was; `trust_region/failed` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.backends import cudnn

from agents.core import policy_gradient, trust_region
from agents.core.agent import Observation
from agents.core.distributions import Policy, kl
from agents.core.rollout import Experience
from agents.on_policy.actor_critic import OnPolicyActorCritic, Samples
from agents.on_policy.config import OnPolicyConfig, Ranges, at_least_one, not_negative
from agents.on_policy.losses import normalized
from agents.on_policy.updates import mean_metrics

MOST_AT_ONCE = 1024
"""Steps whose graph is held in memory at once; sums over a rollout do not depend on it."""

CLIP = 0.2
"""PPO's, for `ratio/outside` alone: TRPO clips nothing."""


@dataclass(frozen=True)
class TRPOConfig(OnPolicyConfig):
    """Trust region policy optimization; defaults from Stable-Baselines3-contrib unless a field says otherwise."""

    minibatch_size: int = 128
    """Steps per gradient step of the value, about."""
    epochs: int = 10
    """Passes of the value's fit over a rollout."""
    learning_rate: float = 1e-3
    """Adam step size of the value's fit; the policy's step needs none."""
    value_coefficient: float = 1.0
    """Weight of the value loss; alone in its fit, it scales what `max_gradient_norm` bounds."""
    max_gradient_norm: float = math.inf
    """Gradients of the value's fit are scaled down to this norm; infinity leaves them as they are."""
    max_kl: float = 0.01
    """Largest mean KL(old || new) of an update, in nats (TRPO's paper .01)."""
    cg_iterations: int = 15
    """Iterations of conjugate gradients (TRPO's paper 10)."""
    fisher_fraction: float = 1.0
    """Share of a rollout's steps in the Fisher matrix, in (0, 1]; from pixels its products take most of an update's
    time, and the paper's .1 is enough for many thousand steps. Gradient and line search use all steps."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    shrink: float = 0.8
    """Factor between attempts of the line search."""
    attempts: int = 10
    """Attempts of the line search; after the last the policy stays as it was."""

    RANGES: ClassVar[Ranges] = (
        ("max_kl", lambda value: 0 < value < math.inf, "a positive number"),
        ("cg_iterations attempts", at_least_one, "a positive number"),
        ("damping", not_negative, "0 or more"),
        ("fisher_fraction", lambda value: 0 < value <= 1, "a number in (0, 1]"),
        ("shrink", lambda value: 0 < value < 1, "a number in (0, 1)"),
    )


@dataclass(frozen=True)
class Part:
    """Some of a rollout's steps."""

    index: Tensor
    """int64 [B], their numbers."""
    samples: Samples
    """[B]."""
    old: Policy
    """Of which the actions were drawn."""
    share: float
    """How much of a mean over all parts is theirs."""


class Comparison(NamedTuple):
    """A policy against the one that acted, in some steps, [B] each."""

    gain: Tensor
    """Of the surrogate: (ratio - 1) * advantage."""
    kl: Tensor
    """KL(old || new)."""
    log_ratio: Tensor
    """Of the actions that were taken."""
    entropy: Tensor
    """Of the new policy."""


class TRPO(OnPolicyActorCritic):
    """The agent; see the module's docstring, and `OnPolicyActorCritic` for arguments."""

    config: TRPOConfig
    keeps_policy = True

    def prepare(self) -> None:
        """Part what the policy's step moves from what the value's fit does."""
        critic = list(self.network.critic.parameters())
        learning_rate = self.config.learning_rate
        self.optimizer = torch.optim.Adam(critic, lr=learning_rate, eps=1e-5, fused=True)
        apart = {id(parameter) for parameter in critic}
        self.policy_parameters = [p for p in self.network.parameters() if id(p) not in apart]

    def learn(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Move the policy once, then fit the value to its targets."""
        parts = self.parts(experience, samples)
        first = self.measure(experience, parts)["ratio/largest_deviation"]
        moved = self.move_policy(experience, parts)
        fits = [
            self.fit_value(experience.observation(index), samples.at(index))
            for _ in range(self.config.epochs)
            for index in self.minibatches(experience)
        ]
        return mean_metrics(fits) | mean_metrics([moved]) | {"ratio/first_deviation": first}

    def move_policy(self, experience: Experience, parts: list[Part]) -> dict[str, Tensor]:
        """Take the policy's step, or none where the line search finds none."""
        config, parameters = self.config, self.policy_parameters
        before = trust_region.flattened(parameters).detach()
        gradient = self.gradient(experience, parts)
        few = self.some(experience, parts)

        def divergences() -> Iterator[Tensor]:
            for part in few:
                # cuDNN's recurrent layers cannot be differentiated twice, PyTorch's own can.
                with cudnn.flags(enabled=False) if config.memory_size else nullcontext():
                    divergence = part.share * self.compare(experience, part).kl.mean()
                yield divergence

        product = trust_region.damped_curvature(
            divergences,
            parameters,
            config.damping,
        )
        step, promised = trust_region.natural_step(
            product, gradient, limit=config.max_kl, iterations=config.cg_iterations
        )
        measured: dict[str, Tensor] = {}

        def measure(fraction: float) -> tuple[Tensor, Tensor]:
            trust_region.assign(parameters, before + fraction * step)
            measured.update(self.measure(experience, parts))
            return measured["trust_region/gain"], measured["trust_region/kl"]

        found = trust_region.line_search(
            measure, limit=config.max_kl, shrink=config.shrink, attempts=config.attempts
        )
        if not found.fraction:
            measure(0.0)
        self.gradient_updates += 1
        return measured | {
            "trust_region/promised_gain": promised,
            "trust_region/fraction": promised.new_tensor(found.fraction),
            "trust_region/failed": promised.new_tensor(float(not found.fraction)),
            "gradient_norm/policy": gradient.norm(),
        }

    def fit_value(self, observation: Observation, samples: Samples) -> dict[str, Tensor]:
        """Take one gradient step of the value on a minibatch."""
        return self.descend(self.gradients, observation, samples)

    def gradients(self, observation: Observation, samples: Samples) -> dict[str, Tensor]:
        """Leave the gradients of the value's loss."""
        policy, value = self.network(observation)
        loss, metrics = self.critic_loss(observation, policy, value, samples.target)
        return metrics | {"gradient_norm/value": self.backward(loss)}

    def gradient(self, experience: Experience, parts: list[Part]) -> Tensor:
        """Return the gradient of the surrogate, [P]."""
        total = torch.zeros((), device=self.device)
        for part in parts:
            gain = part.share * self.compare(experience, part).gain.mean()
            each = torch.autograd.grad(gain, self.policy_parameters, materialize_grads=True)
            total = total + trust_region.flattened(each)
        return total

    @torch.no_grad()
    def measure(self, experience: Experience, parts: list[Part]) -> dict[str, Tensor]:
        """Return how far the policy is from the one that acted, and what the surrogate has gained."""
        each = [self.compare(experience, part) for part in parts]
        gain, divergence, log_ratio, entropy = (
            torch.cat(steps) for steps in zip(*each, strict=True)
        )
        return {
            "trust_region/gain": gain.mean(),
            "trust_region/kl": divergence.mean(),
            "policy/entropy": entropy.mean(),
            **policy_gradient.ratio_metrics(log_ratio, clip=CLIP),
        }

    def compare(self, experience: Experience, part: Part) -> Comparison:
        """Return the policy against the one that acted, step by step."""
        policy, _ = self.network(experience.observation(part.index))
        log_ratio = policy.log_prob(part.samples.action) - part.samples.log_prob
        gain = (policy_gradient.ratio(log_ratio) - 1) * part.samples.advantage
        return Comparison(gain, kl(part.old, policy), log_ratio, policy.entropy())

    def parts(self, experience: Experience, samples: Samples) -> list[Part]:
        """Cut a rollout into parts that fit into memory, in random order; advantages are normalized over all of it."""
        indices = list(self.minibatches(experience, MOST_AT_ONCE))
        everything = torch.cat(indices)
        advantage = samples.advantage.clone()
        if self.config.normalize_advantage:
            place = everything.to(advantage.device)
            advantage[place] = normalized(advantage[place])
        samples = replace(samples, advantage=advantage)
        return [
            Part(
                index,
                samples.at(index),
                self.acted(experience, index),
                len(index) / len(everything),
            )
            for index in indices
        ]

    def some(self, experience: Experience, parts: list[Part]) -> list[Part]:
        """Return the first steps of every part, as many as the Fisher matrix is made of."""
        fraction = self.config.fisher_fraction
        kept = [part.index[: math.ceil(fraction * len(part.index))] for part in parts]
        count = sum(map(len, kept))
        return [
            Part(
                index,
                part.samples.at(torch.arange(len(index))),
                self.acted(experience, index),
                len(index) / count,
            )
            for index, part in zip(kept, parts, strict=True)
        ]
