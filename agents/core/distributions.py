"""Action distributions: a tanh-squashed Gaussian (SAC), a clipped one (DrQ-v2), and those of on-policy agents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_LOG_2 = math.log(2.0)


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a = tanh(mean + std * noise) and return its log-density.

    Haarnoja et al. 2018 (https://arxiv.org/abs/1812.05905), appendix C, with the exact
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) instead of a floor of 1e-6 inside the logarithm.

    Args:
        mean: [B, A] before squashing.
        log_std: [B, A].
        noise: standard normal, [B, A].

    Returns:
        Actions in (-1, 1) [B, A] and log-probabilities [B], differentiable in mean and log_std.
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - _HALF_LOG_2PI
    log_jacobian = 2 * (_LOG_2 - u - F.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_jacobian).sum(-1)


def bound_log_std(raw: Tensor, low: float, high: float) -> Tensor:
    """Map any real to [low, high] through tanh: low + (high - low) / 2 * (tanh(raw) + 1)."""
    return low + 0.5 * (high - low) * (torch.tanh(raw) + 1)


def clipped_gaussian(
    mean: Tensor, std: Tensor | float, noise: Tensor, clip: float | None
) -> Tensor:
    """Sample a = clamp(mean + clamp(std * noise, -clip, clip), -1, 1), the exploration of DrQ-v2 (eq. 3).

    The outer clamp keeps the gradient of the mean (straight-through), as published: an action at the border still
    moves the policy.
    """
    offset = std * noise
    if clip is not None:
        offset = offset.clamp(-clip, clip)
    action = mean + offset
    limit = 1.0 - 1e-6
    return action - action.detach() + action.detach().clamp(-limit, limit)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions over the parts of an action; nothing bounds it.

    Attributes:
        mean: float32 [B, A].
        log_std: broadcastable to it.
    """

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one draw for each row, [B, A], without gradient."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return (self.mean + self.log_std.exp() * noise).detach()

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log-densities [B], summed over parts."""
        scaled = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * scaled.square() - self.log_std - _HALF_LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        """Return differential entropies [B] in nats."""
        return (self.log_std + 0.5 + _HALF_LOG_2PI).expand_as(self.mean).sum(-1)

    def mode(self) -> Tensor:
        """Return the most likely actions [B, A]."""
        return self.mean

    def packed(self) -> Tensor:
        """Return what `unpacked` makes these distributions of, float32 [B, 2 * A]."""
        return torch.cat([self.mean, self.log_std.expand_as(self.mean)], -1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Gaussian:
        """Return the distributions that were `packed`."""
        return cls(*packed.chunk(2, -1))


@dataclass(frozen=True)
class Categorical:
    """One of several actions.

    Attributes:
        logits: float32 [B, number of actions], unnormalized log-probabilities.
    """

    logits: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one draw for each row, int64 [B]."""
        return torch.multinomial(self.logits.detach().softmax(-1), 1, generator=generator)[:, 0]

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log-probabilities [B]."""
        return self.logits.log_softmax(-1).gather(-1, action[:, None])[:, 0]

    def entropy(self) -> Tensor:
        """Return entropies [B] in nats."""
        log_probs = self.logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    def mode(self) -> Tensor:
        """Return the most likely actions, int64 [B]."""
        return self.logits.argmax(-1)

    def packed(self) -> Tensor:
        """Return what `unpacked` makes these distributions of, float32 [B, number of actions]."""
        return self.logits

    @classmethod
    def unpacked(cls, packed: Tensor) -> Categorical:
        """Return the distributions that were `packed`."""
        return cls(packed)


Policy = Gaussian | Categorical
"""What an on-policy agent draws its actions from."""


def kl(old: Policy, new: Policy) -> Tensor:
    """Return KL(old || new) of each row, [B] in nats, differentiable in both.

    Args:
        old: Gaussian or Categorical.
        new: of the same kind and shape.
    """
    if isinstance(old, Categorical) and isinstance(new, Categorical):
        log_probs = old.logits.log_softmax(-1)
        return (log_probs.exp() * (log_probs - new.logits.log_softmax(-1))).sum(-1)
    assert isinstance(old, Gaussian)
    assert isinstance(new, Gaussian)
    shift = (new.mean - old.mean) * torch.exp(-new.log_std)
    # Of x = log(spread / spread): expm1 keeps the digits of spreads that differ little, where the KL is about x^2.
    x = old.log_std - new.log_std
    return 0.5 * (torch.expm1(2 * x) - 2 * x + shift.square()).sum(-1)
