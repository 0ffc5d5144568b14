"""Step rules: how a sample moves from one noise level to the next, and how much noise it gets on the way.

A rule turns what the network says at time t (x0 and noise, see `denoising`) into the distribution of x at the next time
s < t, always N(mean, std^2) with

    mean = w_x0 * x0 + w_noise * noise.

So a rule is three numbers a step, and rules are interchangeable. They test each other: as steps shrink, `Posterior`
with eta tends to `FlowSDE` with a = sqrt(2) * eta on every path, and all but `CPS` tend to the data's distribution
whatever their noise. With few steps they differ: `FlowSDE` may leave more noise in a sample than the network will
expect at s (`excess_noise`), which shows as grain, and on data of low variance explodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from agents.core.errors import UserError
from agents.core.noise_paths import Point


class Weights(NamedTuple):
    """One step of a rule: the mean is x0 * predicted x0 + noise * predicted noise."""

    x0: float
    noise: float
    std: float | None
    """Of the fresh noise; 0 for none, None when a network gives it."""
    log_prob_std: float | None = None
    """Spread that the log-probability is computed with, where it is not `std`."""


class StepRule(Protocol):
    """From a point of a path to the next one, nearer to the data."""

    @property
    def deterministic(self) -> bool:
        """Whether no step has noise: floors of the noise do not apply then."""

    @property
    def evaluations(self) -> int:
        """How many times a step asks the network."""

    def weights(self, now: Point, then: Point) -> Weights:
        """Return the step's weights."""


def _euler(now: Point, then: Point, noise_rate: float = 0.0) -> tuple[float, float]:
    """Return Euler's weights for dx = (velocity - noise_rate^2 / 2 * score) dt, where score = -noise / sigma."""
    dt = then.t - now.t
    drift = now.sigma_slope + noise_rate * noise_rate / (2 * now.sigma)
    return now.alpha + now.alpha_slope * dt, now.sigma + drift * dt


@dataclass(frozen=True)
class Posterior:
    """Draws from q(x_s | x_t, x0), with its noise scaled by eta (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16).

    eta = 1 is DDPM's step (Ho et al. 2020, arXiv:2006.11239, eq. 7), eta = 0 is DDIM's; on rectified flow eta = 0 is
    Euler's step. The last step, to the data, has no noise.
    """

    eta: float = 1.0
    """Share of the posterior's standard deviation that is drawn, in [0, 1]."""
    evaluations = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}; give a number from 0 (DDIM) to 1 (DDPM)")

    @property
    def deterministic(self) -> bool:
        """See `StepRule`."""
        return self.eta == 0

    def weights(self, now: Point, then: Point) -> Weights:
        """See `StepRule`."""
        kept = now.alpha * then.sigma / (then.alpha * now.sigma)
        std = self.eta * then.sigma * math.sqrt(max(0.0, 1 - kept * kept))
        return Weights(then.alpha, math.sqrt(max(0.0, then.sigma**2 - std**2)), std)


@dataclass(frozen=True)
class Euler:
    """One Euler step of the probability-flow ODE in t (order 1)."""

    deterministic = True
    evaluations = 1

    def weights(self, now: Point, then: Point) -> Weights:
        """See `StepRule`."""
        return Weights(*_euler(now, then), 0.0)


@dataclass(frozen=True)
class Heun:
    """Heun's step of the probability-flow ODE (order 2): Euler's, then again with the mean of both ends' velocities.

    The step to the data stays Euler's, as in diffusers and EDM (Karras et al. 2022, arXiv:2206.00364, algorithm 1): a
    diffusion's velocity is infinite there. One such step does not lower the order.
    """

    deterministic = True
    evaluations = 2

    def weights(self, now: Point, then: Point) -> Weights:
        """Return the weights of the first half, Euler's step."""
        return Weights(*_euler(now, then), 0.0)

    @staticmethod
    def correction(now: Point, then: Point) -> Weights | None:
        """Return the weights of dt * (the velocity at `then`), or None at the data."""
        if then.sigma == 0:
            return None
        dt = then.t - now.t
        return Weights(then.alpha_slope * dt, then.sigma_slope * dt, 0.0)


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's stochastic step (Liu et al. 2025, arXiv:2505.05470): Euler-Maruyama with noise a * sqrt(t / (1 - t)).

    Written for any path: the noise's rate is a * sqrt(sigma * (alpha * sigma' - sigma * alpha') / alpha), which on a
    variance-preserving diffusion is a * sqrt(beta / 2), DDPM's for a = sqrt(2). Where alpha is 0 (flow's t = 1) the
    next time's alpha stands in the denominator, as in the authors' code. The last step has noise too.
    """

    a: float = 0.7
    """Noise level (Flow-GRPO: .7), at least 0."""
    evaluations = 1

    def __post_init__(self) -> None:
        if self.a < 0:
            raise UserError(f"the flow SDE's a is {self.a}; give 0 or more")

    @property
    def deterministic(self) -> bool:
        """See `StepRule`."""
        return self.a == 0

    def weights(self, now: Point, then: Point) -> Weights:
        """See `StepRule`."""
        turn = now.alpha * now.sigma_slope - now.sigma * now.alpha_slope
        rate = self.a * math.sqrt(now.sigma * turn / (now.alpha or then.alpha))
        return Weights(*_euler(now, then, rate), rate * math.sqrt(now.t - then.t))


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's stochastic step (Xue et al. 2025, arXiv:2505.07818): Euler-Maruyama with the same noise at all times.

    The authors leave the last step out of the chain that is learned from.
    """

    eta: float = 0.3
    """The noise's rate (.3 for images, .25 for Hunyuan video), at least 0."""
    evaluations = 1

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise UserError(f"the Dance SDE's eta is {self.eta}; give 0 or more")

    @property
    def deterministic(self) -> bool:
        """See `StepRule`."""
        return self.eta == 0

    def weights(self, now: Point, then: Point) -> Weights:
        """See `StepRule`."""
        std = self.eta * math.sqrt(now.t - then.t)
        return Weights(*_euler(now, then, self.eta), std)


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (Wang & Yu 2025, arXiv:2509.05952).

    Like `Posterior`, with the noise's share set by an angle: std = sigma_s * sin(eta * pi / 2). However many steps it
    takes, it does not tend to the data's distribution: x0 is a conditional mean, whose spread is too small, and the
    noise is renewed at every step.
    """

    eta: float = 0.8
    """Angle of the noise in quarter turns, in [0, 1]."""
    true_log_prob: bool = False
    """The Gaussian's log-probability; else the published -(x_s - mean)^2, up to a constant."""
    evaluations = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"CPS's eta is {self.eta}; give a number from 0 to 1")

    @property
    def deterministic(self) -> bool:
        """See `StepRule`."""
        return self.eta == 0

    def weights(self, now: Point, then: Point) -> Weights:
        """See `StepRule`."""
        angle = 0.5 * math.pi * self.eta
        std = then.sigma * math.sin(angle)
        published = None if self.true_log_prob or std == 0 else math.sqrt(0.5)
        return Weights(then.alpha, then.sigma * math.cos(angle), std, published)


@dataclass(frozen=True)
class LearnedNoise:
    """ReinFlow's step (Zhang et al. 2025, arXiv:2505.22094): Euler's, with noise whose spread a network gives.

    The spread is that of the whole step, not a rate. Fine-tuning explores with it; afterwards `Euler` acts.
    """

    deterministic = False
    evaluations = 1

    def weights(self, now: Point, then: Point) -> Weights:
        """See `StepRule`."""
        return Weights(*_euler(now, then), None)


def excess_noise(rule: StepRule, points: list[Point]) -> list[float]:
    """Return for each step the noise in a sample after it, over what the network will expect there.

    1 is exact (`Posterior`, `CPS`). Above 1 the network sees more noise than it is told and cannot remove all of it;
    steps that end at the data are left out, since any noise there is infinitely too much.

    Args:
        rule: whose steps; a learned noise counts as none.
        points: the chain's, from noise to data.
    """
    excess = []
    for now, then in pairwise(points):
        if then.sigma > 0:
            weights = rule.weights(now, then)
            excess.append(math.hypot(weights.noise, weights.std or 0.0) / then.sigma)
    return excess
