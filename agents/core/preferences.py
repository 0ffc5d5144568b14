"""Losses on pairs: what was preferred, and what was not.

A comparison says which of two answers to the same question is better: two images of one prompt, two stretches of
behavior, two chains from one start. Arrays of pairs are [2, *], the preferred answer first. The loss of every pair [*]
is returned, to be minimized, and computed in float32. What a pair's numbers are is the caller's:

| they are | the loss is | used by |
| --- | --- | --- |
| scores of a reward model | `bradley_terry` | reward models from comparisons |
| log-ratios log(pi / pi_ref) of whole answers | `dpo`, `ipo` | DPO, IPO |
| the same of single denoising steps | `dpo` per step | D3PO |
| `denoising_log_ratio` of noised answers | `dpo`, `ipo` | Diffusion-DPO |

A log-ratio of d independent numbers is their sum; `beta` is that of sums. Code that takes means has a beta d times as
large for the same loss (Diffusion-DPO's 5000 at 16,384 latents is .31).

REBEL, the regression of reward differences, is in `policy_gradient`: it needs the rewards, not their order alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.core.errors import UserError


def _margin(pairs: Tensor) -> Tensor:
    """Return the preferred minus the other, float32 [*]."""
    if pairs.ndim == 0 or len(pairs) != 2:
        raise ValueError(
            f"pairs are [2, *], the preferred first; got the shape {tuple(pairs.shape)}"
        )
    preferred, other = pairs.float()
    return preferred - other


def bradley_terry(scores: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """Return the cross-entropy of P(first over second) = sigmoid(first - second) (Bradley & Terry 1952).

    Args:
        scores: [2, *].
        label: share of judges who prefer the first, in [0, 1], broadcastable to [*]: .5 for a tie.
    """
    margin = _margin(scores)
    target = torch.as_tensor(label, dtype=margin.dtype, device=margin.device).expand_as(margin)
    return F.binary_cross_entropy_with_logits(margin, target, reduction="none")


def dpo(log_ratio: Tensor, *, beta: float = 0.1, smoothing: float = 0.0) -> Tensor:
    """Return the loss of direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    It is `bradley_terry` of the rewards beta * log(pi / pi_ref) for which pi would be optimal.

    Args:
        log_ratio: log(pi / pi_ref), [2, *].
        beta: how dear it is to leave the reference: small values leave it further.
        smoothing: share of comparisons that are taken for wrong, in [0, .5) (conservative DPO, Mitchell 2023).

    Raises:
        UserError: a number outside its range.
    """
    _check_beta(beta)
    if not 0 <= smoothing < 0.5:
        raise UserError(f"smoothing is {smoothing}; give a share in [0, 0.5)")
    return bradley_terry(beta * log_ratio.float(), 1 - smoothing)


def ipo(log_ratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """Return the loss of identity preference optimization (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    The margin is regressed to 1 / (2 * beta): unlike DPO's, it does not grow without end where a comparison is certain.

    Args:
        log_ratio: log(pi / pi_ref), [2, *].
        beta: see `dpo`; the paper's tau.

    Raises:
        UserError: beta is not positive.
    """
    _check_beta(beta)
    return (_margin(log_ratio) - 1 / (2 * beta)).square()


def denoising_log_ratio(error: Tensor, reference_error: Tensor) -> Tensor:
    """Return what stands for log(pi / pi_ref) of an answer that was noised and predicted back.

    A step of a chain that predicts the noise with a squared error e has a log-density of -e / 2, up to constants and
    the time's weight, which Diffusion-DPO takes as 1 (Wallace et al. 2023, arXiv:2311.12908, eq. 14; the T steps are
    part of beta there).

    Args:
        error: squared error **summed** over the answer's numbers, [*].
        reference_error: the reference's, at the same time and noise, [*].
    """
    return 0.5 * (reference_error.float() - error.float())


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise UserError(f"beta is {beta}; give a positive number")
