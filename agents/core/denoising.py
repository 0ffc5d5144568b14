"""What a network predicts of a noisy sample, and what it is trained on.

On a path x_t = alpha * x0 + sigma * noise (`noise_paths`; t = 0 is data, t = 1 is noise) a network predicts one of

- `noise`,
- `x0`,
- `v` = alpha * noise - sigma * x0 (Salimans & Ho 2022, arXiv:2202.00512),
- `velocity` dx_t/dt = alpha' * x0 + sigma' * noise (rectified flow: noise - x0; Lipman et al. 2023, arXiv:2210.02747).

Given x_t these are affine functions of each other, so any network can drive any step rule (`step_rules`, `sampling`).

Everything here works on tensors of any shape [B, ...]: action chunks [B, H, A], images [B, C, H, W].
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agents.core.errors import UserError
from agents.core.noise_paths import Path, Prediction

TimeDistribution = Literal["uniform", "logit_normal", "beta"]

SMALLEST_TIME = 1e-5
"""Training times lie in [1e-5, 1]: at 0 there is no noise to predict, and sigma' of a diffusion is infinite."""


# ------------------------------------------------------------------------------------ predictions


def x0_weights(kind: Prediction, c: Any) -> tuple[Any, Any]:
    """Return (a, b) such that x0 = a * x_t + b * prediction.

    Args:
        kind: what the network predicts.
        c: a `Point` or `Coefficients`; a predicted noise says nothing of x0 where alpha is 0.
    """
    if kind == "noise":
        return 1 / c.alpha, -c.sigma / c.alpha
    if kind == "x0":
        return 0 * c.alpha, 0 * c.alpha + 1
    if kind == "v":
        length = c.alpha * c.alpha + c.sigma * c.sigma
        return c.alpha / length, -c.sigma / length
    turn = _turn(c)
    return c.sigma_slope / turn, -c.sigma / turn


def noise_weights(kind: Prediction, c: Any) -> tuple[Any, Any]:
    """Return (a, b) such that noise = a * x_t + b * prediction; see `x0_weights` (here sigma must not be 0 for x0)."""
    if kind == "noise":
        return 0 * c.alpha, 0 * c.alpha + 1
    if kind == "x0":
        return 1 / c.sigma, -c.alpha / c.sigma
    if kind == "v":
        length = c.alpha * c.alpha + c.sigma * c.sigma
        return c.sigma / length, c.alpha / length
    turn = _turn(c)
    return -c.alpha_slope / turn, c.alpha / turn


def _turn(c: Any) -> Any:
    """Return alpha * sigma' - sigma * alpha', positive on every path: 1 on rectified flow."""
    return c.alpha * c.sigma_slope - c.sigma * c.alpha_slope


def convert(
    prediction: Tensor, x: Tensor, t: Tensor, path: Path, source: Prediction, target: Prediction
) -> Tensor:
    """Return the same prediction in another form.

    Args:
        prediction: [B, ...], of kind `source`.
        x: x_t, [B, ...].
        t: [B].
        path: that x lies on.
        source: what `prediction` is.
        target: what to return.
    """
    if source == target:
        return prediction
    c = path.coefficients(t).beside(x)
    a, b = x0_weights(source, c)
    x0 = a * x + b * prediction
    a, b = noise_weights(source, c)
    return path.target(target, x0, a * x + b * prediction, t)


# --------------------------------------------------------------------------------------- training


class Corrupted(NamedTuple):
    """What `corrupt` returns, [B, ...] each."""

    x: Tensor
    """x_t, the network's input."""
    target: Tensor
    """What it is to predict."""


def corrupt(path: Path, kind: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Corrupted:
    """Return the network's input and target for data [B, ...], standard normal noise [B, ...] and times [B]."""
    return Corrupted(path.mix(x0, noise, t), path.target(kind, x0, noise, t))


def squared_error(
    prediction: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the denoising loss of every sample, [B]: the mean over its elements of weight * (prediction - target)^2.

    Args:
        prediction: [B, ...].
        target: [B, ...].
        weight: broadcastable to them; 10 for a plan's first action in Diffuser, a function of t's for min-SNR.
        mask: bool, broadcastable: elements that count (steps of a chunk beyond the episode's end do not). The mean is
            over these only; a sample without any has loss 0.
    """
    difference = prediction.float() - target.float()
    if mask is not None:  # before the square: what is padded need not be finite
        difference = difference.masked_fill(~mask, 0.0)
    error = difference.square()
    return mean_of_counted(error if weight is None else error * weight, mask)


def mean_of_counted(error: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over every sample's elements that count, [B]; 0 for a sample without any.

    Args:
        error: [B, ...].
        mask: bool, broadcastable to it; None counts all.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    counted = mask.expand_as(error).flatten(1).sum(1)
    return error.masked_fill(~mask, 0.0).flatten(1).sum(1) / counted.clamp(min=1)


def check_times(distribution: TimeDistribution, first: float, second: float) -> None:
    """Refuse numbers that a distribution of times cannot have; see `draw_times`.

    Raises:
        UserError: says which.
    """
    if distribution == "logit_normal" and not second > 0:
        raise UserError(f"logit-normal times have a spread of {second}; give more than 0")
    if distribution == "beta" and not (first > 0 and second > 0):
        raise UserError(f"times of Beta({first}, {second}): give two numbers above 0")


def draw_times(
    path: Path,
    shape: int | tuple[int, ...],
    generator: torch.Generator,
    *,
    distribution: TimeDistribution = "uniform",
    first: float = 0.0,
    second: float = 1.0,
    shift: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return random training times of a path, float32.

    Args:
        path: whose times; of a discrete one, its knots.
        shape: of the result, often [B], or [B, D] for several times a sample.
        generator: on `device`.
        distribution: `uniform`; `logit_normal`, sigmoid(first + second * N(0, 1)), most in the middle (Esser et al.
            2024, arXiv:2403.03206); `beta`, Beta(first, second), most near the noise with (1.5, 1) (pi0, Black et al.
            2024, arXiv:2410.24164, appendix B, there with time reversed).
        first: see `distribution`; the uniform one has none.
        second: likewise.
        shift: t <- shift * t / (1 + (shift - 1) * t), as of the times that samplers visit (`Path.times`): above 1 more
            near the noise. A logit-normal's mean grows by log(shift).
        device: of the result.

    Raises:
        UserError: a distribution's numbers are not positive.
    """
    check_times(distribution, first, second)
    size = (shape,) if isinstance(shape, int) else shape
    if distribution == "uniform":
        t = 1 - torch.rand(size, generator=generator, device=device)  # in (0, 1]
    elif distribution == "logit_normal":
        t = torch.sigmoid(first + second * torch.randn(size, generator=generator, device=device))
    else:
        # torch.distributions draws from the global generator only; this is what it calls.
        a, b = (
            torch._standard_gamma(torch.full(size, p, device=device), generator=generator)
            for p in (first, second)
        )
        t = a / (a + b)
    t = shift * t / (1 + (shift - 1) * t)
    return path.snap(t.clamp(min=SMALLEST_TIME, max=1.0))
