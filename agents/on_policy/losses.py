"""Losses that on-policy agents share: of the value, of augmented pictures; and what advantages are brought to."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from agents.core.distributions import Gaussian, Policy, kl


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of values [B] (PPO's paper, eq. 9).

    It is not clipped (Andrychowicz et al. 2021, https://arxiv.org/abs/2006.05990, section 3.7).
    """
    return F.mse_loss(value, target)


def value_target(target: Tensor) -> Tensor:
    """Return what values should be, [B], of `Samples.target`."""
    return target if target.ndim == 1 else target[:, 0]


def normalized(advantage: Tensor) -> Tensor:
    """Bring advantages [B] to mean 0 and spread 1; a single one stays."""
    if len(advantage) < 2:
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def regularization_loss(policy: Policy, value: Tensor, seen: Policy, seen_value: Tensor) -> Tensor:
    """Return DrAC's term: an augmented picture's policy and value should be those of the picture.

    Args:
        policy: of the picture as it is; it gets no gradient.
        value: [B], likewise.
        seen: the policy of the augmented picture.
        seen_value: [B], its value.
    """
    target = type(policy).unpacked(policy.packed().detach())
    # A Gaussian's spread does not depend on what is seen: only the means can differ, and learn.
    if isinstance(seen, Gaussian):
        seen = Gaussian(seen.mean, seen.log_std.detach())
    return kl(target, seen).mean() + F.mse_loss(seen_value, value.detach())
