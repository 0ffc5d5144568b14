"""Better images at inference, from weights that stay as they are: FK steering, ReNO, and the best of n.

**FK steering** (Singhal et al. 2025, arXiv:2501.06848): particles of each prompt run side by side; at some steps they
are weighted by how good the x0 looks that is predicted there, and bad ones are replaced by copies of good ones.
Whatever the potentials on the way, the weighted particles are those of p(x) * exp(strength * reward(x)), for which
the last weight makes up. **Differences from the authors' code**: log-weights are carried where nothing is resampled
(theirs forgets them, and the target is another one then), added up by log-sum-exp, and resampling is systematic
instead of multinomial, which adds less noise.

**ReNO** (Eyring et al. 2024, arXiv:2406.04312) climbs a differentiable reward in the noise that a deterministic chain
begins with. Written for one-step generators; here the gradient goes through a short chain, whose activations are
computed again on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents.core.chain_steps import Generators, standard_normal
from agents.core.denoising import convert
from agents.core.errors import UserError
from agents.core.sampling import Denoiser, Sampler
from agents.generative_models.reward_gradients import recomputed

SampleReward = Callable[[Tensor], Tensor]
"""Of samples [B, ...] that are data, or a prediction of it: [B]."""

Potential = Literal["difference", "max", "add", "rt"]


@dataclass(frozen=True)
class SteeringSettings:
    """How particles are steered."""

    particles: int = 4
    """Particles of each image (FK steering 4)."""
    strength: float = 10.0
    """Lambda: the target is p(x) * exp(strength * reward(x)) (FK steering 10 for ImageReward)."""
    potential: Potential = "difference"
    """Weight of a look, e to strength times: the reward's gain since the last look, its maximum so far, the sum of all
    so far (so the log-weight grows like the looks' square), or the reward itself (the authors' names, but for diff)."""
    every: int = 2
    """Steps between two looks."""
    least_effective: float = 0.5
    """Particles are resampled when their effective number is below this share; above 1, at every look."""

    def __post_init__(self) -> None:
        """Reject values that cannot steer."""
        if self.particles < 2 or self.every < 1:
            raise UserError(
                f"{self.particles} particles, a look every {self.every} steps; give at least 2, and at least 1"
            )
        if not 0 <= self.strength < math.inf or not 0 <= self.least_effective < math.inf:
            raise UserError(
                f"strength is {self.strength}, least_effective {self.least_effective}; give finite numbers, 0 or more"
            )


@dataclass(frozen=True)
class Steered:
    """What `fk_steer` returns, for N prompts of P particles.

    Attributes:
        data: [N, P, ...].
        reward: of the data, [N, P].
        log_weight: of the particles, normalized to a log-sum of 0, [N, P].
        log_normalizer: estimate of log E[exp(strength * reward)], [N]; its exponential is unbiased.
    """

    data: Tensor
    reward: Tensor
    log_weight: Tensor
    log_normalizer: Tensor

    def best(self) -> Tensor:
        """Return the particle of the highest reward of each prompt, [N, ...]."""
        return self.data[
            torch.arange(len(self.data), device=self.data.device), self.reward.argmax(1)
        ]


def systematic(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Return which particles survive, int64 [N, P]: each floor or ceil of P times its weight.

    Args:
        log_weight: [N, P], of any log-sum.
        uniform: in [0, 1), [N], one number for each row.
    """
    count = log_weight.shape[1]
    heights = torch.softmax(log_weight.double(), 1).cumsum(1)
    marks = (torch.arange(count, device=heights.device) + uniform.double()[:, None]) / count
    return torch.searchsorted(heights, marks).clamp(max=count - 1)


def effective(log_weight: Tensor) -> Tensor:
    """Return the effective number of particles [N] of log-weights [N, P]: 1 over the sum of squared weights."""
    return torch.exp(-torch.logsumexp(2 * torch.log_softmax(log_weight, 1), 1))


@torch.no_grad()
def fk_steer(
    sampler: Sampler,
    denoiser: Denoiser,
    reward: SampleReward,
    start: Tensor,
    condition: Any,
    generator: torch.Generator,
    settings: SteeringSettings,
) -> Steered:
    """Return steered particles.

    Args:
        sampler: with noise: copies of a particle must part again.
        denoiser: with its guidance.
        reward: of samples, [N * P, ...] to [N * P]: prompt by prompt.
        start: noise, [N * P, ...].
        condition: encoded, [N * P, L, F].
        generator: of noise and resampling.
        settings: how.

    Raises:
        UserError: the chain draws no noise, or the start is not of whole groups.
    """
    count = settings.particles
    if not sampler.stochastic:
        raise UserError(
            "particles of a chain without noise cannot part again; give a rule with noise"
        )
    if len(start) % count:
        raise UserError(f"{len(start)} starts are no groups of {count} particles")
    rows, device = len(start) // count, start.device
    zeros = torch.zeros(rows, count, dtype=torch.float64, device=device)
    log_weight, paid, total, best = zeros, zeros.clone(), zeros.clone(), zeros - math.inf
    log_normalizer = zeros[:, 0].clone()
    x, said = start, _Remembered(denoiser)
    for index in range(sampler.steps):
        step = sampler.step(said, x, index, condition)
        mean = step.mean
        if index % settings.every == 0 and 0 < index:
            x0 = convert(said.prediction, x, said.t, sampler.path, sampler.kind, "x0")
            seen = settings.strength * reward(x0).double().view(rows, count)
            best, total = torch.maximum(best, seen), total + seen
            weight = {"difference": seen - paid, "max": best, "add": total, "rt": seen}
            due = paid + weight[settings.potential]
            log_weight, paid = log_weight + due - paid, due
            if (few := effective(log_weight) < settings.least_effective * count).any():
                uniform = torch.rand(rows, generator=generator, device=device)
                kept = torch.arange(count, device=device).expand(rows, -1)
                kept = torch.where(few[:, None], systematic(log_weight, uniform), kept)
                mean_weight = torch.logsumexp(log_weight, 1) - math.log(count)
                log_normalizer = log_normalizer + torch.where(few, mean_weight, 0.0)
                log_weight = torch.where(few[:, None], 0.0, log_weight)
                paid, best, total = (each.gather(1, kept) for each in (paid, best, total))
                place = (kept + count * torch.arange(rows, device=device)[:, None]).flatten()
                mean = mean[place]
        x = mean
        if index in sampler.stochastic:
            noise = standard_normal(x.shape, generator, device=device, dtype=x.dtype)
            x = x + step.std * noise
    final = reward(x).double().view(rows, count)
    log_weight = log_weight + settings.strength * final - paid
    log_normalizer = log_normalizer + torch.logsumexp(log_weight, 1) - math.log(count)
    return Steered(
        data=x.view(rows, count, *x.shape[1:]),
        reward=final,
        log_weight=torch.log_softmax(log_weight, 1),
        log_normalizer=log_normalizer,
    )


class _Remembered:
    """A denoiser that keeps what it said last."""

    prediction: Tensor
    t: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.prediction, self.t = self.denoiser(x, t, condition), t
        return self.prediction


@dataclass(frozen=True)
class NoiseSearchSettings:
    """How a noise is improved; defaults are ReNO's."""

    iterations: int = 50
    """Gradient steps."""
    learning_rate: float = 5.0
    """SGD's, with Nesterov momentum .9."""
    regularization: float = 0.01
    """Weight of the noise's negative log-likelihood by its length."""
    max_gradient_norm: float = 0.1
    """The reward's and the regularizer's gradient of each image is scaled down to this norm."""

    def __post_init__(self) -> None:
        """Reject values that no noise can be improved with."""
        if self.iterations < 0:
            raise UserError(f"iterations is {self.iterations}; give 0 or more")
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if not 0 <= self.regularization < math.inf:
            raise UserError(f"regularization is {self.regularization}; give 0 or more")


@dataclass(frozen=True)
class BestOfNSettings:
    """How many images are drawn for one."""

    candidates: int = 8
    """Images of each prompt, of which the best is shown."""

    def __post_init__(self) -> None:
        """Reject fewer than one."""
        if self.candidates < 1:
            raise UserError(f"candidates is {self.candidates}; give at least 1")


def length_penalty(noise: Tensor) -> Tensor:
    """Return -log of the density of the length of standard normal noise, [B], up to a constant (chi distribution).

    Smallest at a length of sqrt(d - 1), where almost all of the noise is.
    """
    squared = noise.flatten(1).square().sum(1)
    dimension = noise[0].numel()
    return 0.5 * squared - 0.5 * (dimension - 1) * squared.log()


def optimize_noise(
    sampler: Sampler,
    denoiser: Denoiser,
    reward: SampleReward,
    start: Tensor,
    condition: Any,
    settings: NoiseSearchSettings,
) -> Tensor:
    """Return for each start the best data that gradient ascent of the reward in the noise came by, [B, ...].

    The first is the start's own, so no reward becomes smaller.

    Args:
        sampler: deterministic.
        denoiser: with its guidance; it gets no gradient.
        reward: differentiable.
        start: noise, [B, ...].
        condition: encoded.
        settings: how.

    Raises:
        UserError: the chain draws noise, or the reward has no gradient.
    """
    if sampler.stochastic:
        raise UserError(
            "the noise of a chain that draws more of it cannot be improved; use a deterministic rule"
        )
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([noise], lr=settings.learning_rate, momentum=0.9, nesterov=True)
    best = torch.full((len(start),), -math.inf, device=start.device)
    result = torch.empty_like(start)
    for iteration in range(settings.iterations + 1):
        data = sampler.sample(recomputed(denoiser), noise, condition)
        value = reward(data)
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        result = torch.where(better.view(-1, *[1] * (data.ndim - 1)), data.detach(), result)
        if iteration == settings.iterations:
            break
        if not value.requires_grad:
            raise UserError(
                "the reward has no gradient, which ReNO climbs; use best-of-n or fk-steering"
            )
        loss = -value + settings.regularization * length_penalty(noise)
        (gradient,) = torch.autograd.grad(loss.sum(), noise)
        norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (data.ndim - 1))
        noise.grad = gradient * (settings.max_gradient_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
        optimizer.step()
    return result


@torch.no_grad()
def best_of_n(
    sampler: Sampler,
    denoiser: Denoiser,
    reward: SampleReward,
    start: Tensor,
    condition: Any,
    count: int,
    generator: Generators | None = None,
) -> Tensor:
    """Return the best of `count` samples of each group, [N, ...].

    Args:
        sampler: of the chains.
        denoiser: with its guidance.
        reward: of samples, [N * count, ...] to [N * count].
        start: noise, [N * count, ...], group by group.
        condition: encoded.
        count: samples in a group.
        generator: of noise, where the chain draws some.

    Raises:
        UserError: the start is not of whole groups.
    """
    if count < 1 or len(start) % count:
        raise UserError(f"{len(start)} starts are no groups of {count}; give at least 1 of each")
    data = sampler.sample(denoiser, start, condition, generator)
    value = reward(data).view(-1, count)
    rows = torch.arange(len(value), device=start.device)
    return data.view(-1, count, *data.shape[1:])[rows, value.argmax(1)]
