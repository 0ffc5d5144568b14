"""Paths from data to noise: rectified flow, and diffusions in continuous time or of K steps.

One convention for all, whatever a paper calls its ends: **t = 0 is data and t = 1 is noise**, on a path

    x_t = alpha(t) * x0 + sigma(t) * noise,    noise ~ N(0, I).

A diffusion keeps alpha^2 + sigma^2 = 1 (variance preserving); rectified flow has alpha = 1 - t and sigma = t. Papers on
flows often run time the other way round (ReinFlow, pi0: t = 1 is data); FPO and diffusers run it as here.

Coefficients are computed in float64 and then rounded to the sample's precision: 1 - alpha^2 near the data would cancel
otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.core.errors import UserError

Prediction = Literal["noise", "x0", "v", "velocity"]
"""What a network says of x_t; see `denoising`."""
Spacing = Literal["trailing", "leading", "linspace"]


class Coefficients(NamedTuple):
    """A path at some times, each float64 of the times' shape (or ready to multiply samples, see `beside`)."""

    alpha: Tensor
    sigma: Tensor
    alpha_slope: Tensor
    sigma_slope: Tensor

    def beside(self, x: Tensor) -> Coefficients:
        """Return coefficients [B] as [B, 1, ...] in the precision of `x` [B, ...]."""
        shape = (-1,) + (1,) * (x.ndim - 1)
        return Coefficients(*(c.to(x.dtype).reshape(shape) for c in self))


class Point(NamedTuple):
    """A path at one time, in Python's floats."""

    t: float
    alpha: float
    sigma: float
    alpha_slope: float
    sigma_slope: float


class Path(ABC):
    """From data (t = 0) to noise (t = 1)."""

    last: ClassVar[float] = 1.0
    """Where the path ends: chains start here, and training times do not lie beyond."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return alpha, sigma and their slopes in time, float64, for times of any shape in [0, last]."""

    @property
    def knots(self) -> int | None:
        """How many times the path is defined at, beside 0; None for all of [0, last]."""
        return None

    def points(self, times: Tensor) -> list[Point]:
        """Return the path at each of `times` [N]."""
        columns = [times.double().tolist(), *(c.tolist() for c in self.coefficients(times))]
        return [Point(*row) for row in zip(*columns, strict=True)]

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), float64."""
        c = self.coefficients(t)
        return 2 * (c.alpha.log() - c.sigma.log())

    def mix(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t [B, ...] of data and noise at times [B]."""
        c = self.coefficients(t).beside(x0)
        return c.alpha * x0 + c.sigma * noise

    def target(self, kind: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what a network that predicts `kind` is to say at x_t."""
        c = self.coefficients(t).beside(x0)
        if kind == "noise":
            return noise
        if kind == "x0":
            return x0
        if kind == "v":
            return c.alpha * noise - c.sigma * x0
        return c.alpha_slope * x0 + c.sigma_slope * noise

    def times(self, steps: int, spacing: Spacing = "trailing", *, shift: float = 1.0) -> Tensor:
        """Return the times that a chain of `steps` visits, descending, with 0 at the end.

        Args:
            steps: N, at least 1; few steps skip most of a discrete path.
            spacing: as in diffusers (Lin et al. 2024, arXiv:2305.08891, table 2). `trailing` starts at the path's end,
                `leading` begins one stride before it, `linspace` includes both ends (the first noise level above the
                data, not 0).
            shift: on continuous paths, t <- shift * t / (1 + (shift - 1) * t): more steps near the noise (Esser et al.
                2024, arXiv:2403.03206, eq. 23).

        Returns:
            float64 [steps + 1].

        Raises:
            UserError: no steps, more than the path has, or a shift of a discrete one.
        """
        knots = self.knots or 1000  # what diffusers' flow schedulers assume where it matters at all
        if steps < 1 or (self.knots and steps > self.knots):
            most = f" and at most {self.knots}, the path's length" if self.knots else ""
            raise UserError(f"cannot denoise in {steps} steps; give at least 1{most}")
        if spacing == "trailing":
            index = knots - np.arange(steps) * (knots / steps) - 1
        elif spacing == "leading":
            stride = knots // steps if self.knots else knots / steps
            index = np.arange(steps)[::-1] * stride
        else:
            index = np.linspace(0, knots - 1, steps)[::-1]
        if self.knots:
            if shift != 1:
                raise UserError(f"shift {shift} is for continuous paths; a discrete one takes 1")
            index = index.round()
        t = (index + 1) / knots
        t = shift * t / (1 + (shift - 1) * t) * self.last
        return torch.from_numpy(np.append(t, 0.0))

    def snap(self, t: Tensor) -> Tensor:
        """Return times in (0, 1] as the path's training times: scaled to its end, or the next of its knots."""
        if self.knots is None:
            return t * self.last
        return (t * self.knots).ceil().clamp(min=1) / self.knots


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """The straight line x_t = (1 - t) * x0 + t * noise (Liu et al. 2023, arXiv:2209.03003); velocity: noise - x0."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `Path.coefficients`."""
        t = t.double()
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)


@dataclass(frozen=True)
class LinearVP(Path):
    """The variance-preserving diffusion with beta(t) linear in time (Song et al. 2021, arXiv:2011.13456, eq. 33)."""

    beta_min: float = 0.1
    """beta(0) (Song et al. 2021, appendix C)."""
    beta_max: float = 20.0
    """beta(1)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `Path.coefficients`."""
        t = t.double()
        rise = self.beta_max - self.beta_min
        log_alpha = -0.25 * t.square() * rise - 0.5 * t * self.beta_min
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        beta = self.beta_min + t * rise
        return Coefficients(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * alpha.square() / sigma)


@dataclass(frozen=True)
class CosineVP(Path):
    """Nichol & Dhariwal's cosine diffusion (2021, arXiv:2102.09672, eq. 17) in continuous time.

    It ends at t = .9946, as in DPM-Solver (Lu et al. 2022, arXiv:2206.00927): at 1 nothing of the data is left, and
    a predicted noise does not say what x0 is.
    """

    last: ClassVar[float] = 0.9946

    offset: float = 0.008
    """Keeps the first noise levels from being too small (section 3.2)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `Path.coefficients`."""
        rate = 0.5 * math.pi / (1 + self.offset)
        first = rate * self.offset
        angle = rate * (t.double() + self.offset)
        alpha = angle.cos() / math.cos(first)
        # 1 - alpha^2 without cancellation: cos(a)^2 - cos(b)^2 = sin(b - a) * sin(b + a)
        sigma = (torch.sin(angle - first) * torch.sin(angle + first)).sqrt() / math.cos(first)
        alpha_slope = -rate * angle.sin() / math.cos(first)
        return Coefficients(alpha, sigma, alpha_slope, -alpha * alpha_slope / sigma)


@dataclass(frozen=True)
class DiscreteVP(Path):
    """A diffusion of K training steps, as in DDPM and diffusers: step k of 0 ... K - 1 lies at t = (k + 1) / K.

    Between its knots alpha and sigma are straight lines, and at a knot the slope is that towards the data. So a
    velocity exists here too, and one Euler step from knot to knot is DDIM's deterministic step.
    """

    train_steps: int = 100
    """K (Diffusion Policy: 100; DPPO from states: 20; image generators: 1000)."""
    schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine"
    """How beta grows: `cosine` (diffusers' squaredcos_cap_v2), `linear` (DDPM), `scaled_linear` (Stable Diffusion)."""
    beta_start: float = 1e-4
    """First beta of the linear schedules (Ho et al. 2020, arXiv:2006.11239, section 4)."""
    beta_end: float = 0.02
    """Last beta of the linear schedules."""
    beta_most: float = 0.999
    """Largest beta of the cosine schedule (Nichol & Dhariwal 2021, section 3.2)."""

    @property
    def knots(self) -> int:
        """See `Path.knots`."""
        return self.train_steps

    def betas(self) -> Tensor:
        """Return the variance that each step adds, float64 [K]."""
        if self.schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.knots, dtype=torch.float64)
        if self.schedule == "scaled_linear":
            ends = self.beta_start**0.5, self.beta_end**0.5
            return torch.linspace(*ends, self.knots, dtype=torch.float64).square()
        t = torch.arange(self.knots + 1, dtype=torch.float64) / self.knots
        kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - kept[1:] / kept[:-1]).clamp(max=self.beta_most)

    def index(self, t: Tensor) -> Tensor:
        """Return the step k, int64, of each time: what networks trained with diffusers are told."""
        return (t.double() * self.knots).round().long() - 1

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `Path.coefficients`."""
        table = _knot_table(self, t.device)
        place = t.double() * self.knots
        # A time in float32 lies beside its knot: put it there. A knot is the end of the segment on the data's side.
        nearest = place.round()
        place = torch.where((place - nearest).abs() < 1e-3, nearest, place)
        upper = place.ceil().clamp(1, self.knots).long()
        end, start = table[upper], table[upper - 1]
        slope = (end - start) * self.knots
        share = (place - (upper - 1)).unsqueeze(-1)
        here = (1 - share) * start + share * end  # exact at both ends
        return Coefficients(*here.unbind(-1), *slope.unbind(-1))


@cache
def _knot_table(path: DiscreteVP, device: torch.device) -> Tensor:
    """Return alpha and sigma at t = 0, 1/K, ... 1, float64 [K + 1, 2]."""
    log_kept = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-path.betas())])
    log_kept = log_kept.cumsum(0)
    table = torch.stack([(0.5 * log_kept).exp(), (-torch.expm1(log_kept)).sqrt()], dim=-1)
    return table.to(device)
