"""Parts of a denoising chain (`sampling`): a step's distribution, its bounds, what is fixed in it, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agents.core.errors import UserError
from agents.core.noise_paths import Point

Generators = torch.Generator | Sequence[torch.Generator]
"""One for the whole batch, or one for each sample: then a sample does not depend on who shares its batch."""


@dataclass(frozen=True)
class Limits:
    """What is kept within bounds along a chain; the defaults bound nothing."""

    x0: float | None = None
    """Clip of the predicted x0 to [-x0, x0] (Diffusion Policy and DPPO: 1)."""
    noise: float | None = None
    """Clip of fresh noise before it is scaled (DPPO: 3). Log-probabilities remain the whole Gaussian's."""
    sample: float | None = None
    """Clip of a step's result before it goes into the next one or out (ReinFlow: 1)."""
    final: float | None = None
    """Clip of the last step's result only (DPPO: 1)."""
    min_std: float = 0.0
    """Floor of the drawn noise in every step of a rule that has noise (DPPO: .1 in training, 1e-3 in evaluation)."""
    min_log_prob_std: float = 0.0
    """Floor of the spread that log-probabilities are computed with (DPPO: .1)."""

    def __post_init__(self) -> None:
        for name in ("x0", "noise", "sample", "final"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"the clip of {name} is {value}; give more than 0, or None")
        if min(self.min_std, self.min_log_prob_std) < 0:
            raise UserError("a floor of the noise is negative; give 0 or more")


@dataclass(frozen=True)
class Fixed:
    """Coordinates that a chain does not choose: observed states of a plan, actions already sent, an image's known part.

    Attributes:
        mask: bool, broadcastable to samples [B, ...]: True where fixed.
        values: their data, broadcastable; they come out exactly.
        noise: standard normal, broadcastable: where the values lie at t = 1.
    """

    mask: Tensor
    values: Tensor
    noise: Tensor

    def place(self, x: Tensor, point: Point) -> Tensor:
        """Return `x` [B, ...] with these coordinates at the noise level of `point`."""
        return torch.where(self.mask, point.alpha * self.values + point.sigma * self.noise, x)


class Step(NamedTuple):
    """The distribution of one step, N(mean, std^2)."""

    mean: Tensor
    """[B, ...]."""
    std: Tensor | float
    """Of what is drawn, broadcastable to the mean."""
    half_precision: Tensor | float
    """1 / (2 * spread^2), for the spread of the log-probability."""
    log_normalizer: Tensor | float
    """log(spread) + log(2 * pi) / 2."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-densities per element, [B, ...]; see `reduce_log_prob`."""
        return -(value - self.mean).square() * self.half_precision - self.log_normalizer

    def kl(self, other: Tensor) -> Tensor:
        """Return KL(this || one of the same spread with mean `other`) per element: (mean - other)^2 / (2 * spread^2).

        Flow-GRPO's regularizer; it has a gradient to both means. NaN for a step without noise.
        """
        return (self.mean - other).square() * self.half_precision


def standard_normal(
    shape: Sequence[int],
    generator: Generators,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return noise [B, ...] from one generator for the batch, or from one for each sample.

    Raises:
        UserError: the number of generators is not the number of samples.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, **options)
    if len(generator) != shape[0]:
        raise UserError(
            f"{len(generator)} generators for {shape[0]} samples; give one for each, or a single one"
        )
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, **options) for g in generator])


def reduce_log_prob(
    log_prob: Tensor, how: Literal["sum", "mean"], mask: Tensor | None = None
) -> Tensor:
    """Return log-probabilities of samples, [B], from those of their elements [B, ...].

    The `sum` is the density. The `mean` (DPPO, DDPO, Flow-GRPO) divides its logarithm by the number of elements d: a
    clip c of the mean's ratio is d * c of the sum's.

    Args:
        log_prob: [B, ...].
        how: to put elements together.
        mask: bool, broadcastable: elements that count; not the fixed ones.
    """
    if mask is None:
        flat = log_prob.flatten(1)
        return flat.sum(1) if how == "sum" else flat.mean(1)
    counted = mask.expand_as(log_prob).flatten(1)
    total = log_prob.flatten(1).masked_fill(~counted, 0.0).sum(1)
    return total if how == "sum" else total / counted.sum(1).clamp(min=1)
