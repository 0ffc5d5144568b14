"""Action distributions: a tanh-squashed Gaussian (SAC) and a clipped Gaussian (DrQ-v2)."""

from __future__ import annotations

import math

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
