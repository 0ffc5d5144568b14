"""Denoising chains: run a network from noise to data by a step rule, and say how likely each step was.

A `Sampler` is a path, a prediction type, step rules and times. `sample` returns data; `chain` also keeps what a policy
gradient needs: every x and the log-probability of every stochastic step, which `log_prob` computes again under other
parameters. With the same parameters and the same batch the two are equal bit for bit (both do the same operations on
the same float32 numbers), so that a ratio starts at exactly 1. Samples stay in float32 when the network computes in
bfloat16: rounding them would bias the ratio.

A network is any callable `(x [B, ...], t [B], condition) -> prediction [B, ...]`; t is float32 in (0, 1], 1 is noise.

Differences from papers:

- When x0 is clipped, the noise is computed again from it, as DDPM and DPPO do; diffusers' DDIM does so only with
  `use_clipped_model_output`.
- DPPO clips a chain's last sample and takes the log-probability of the clipped one; ReinFlow does so at every step.
  Here the chain keeps what was drawn and clips what is handed on, so log-probabilities are those of the draws.
- Fixed coordinates carry the noise that the caller gives with them at every level (diffusers' inpainting pipelines);
  RePaint draws it anew, Diffuser writes the values without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.core.chain_steps import Fixed, Generators, Limits, Step, standard_normal
from agents.core.denoising import noise_weights, x0_weights
from agents.core.errors import UserError
from agents.core.noise_paths import Path, Point, Prediction
from agents.core.step_rules import Heun, StepRule, Weights

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]
"""(x [B, ...], t float32 [B], condition) -> prediction [B, ...]."""

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Chain:
    """What `Sampler.chain` recorded.

    Attributes:
        samples: [S + 1, B, ...]: the start, and what each of the S steps drew, before any clip.
        log_prob: per element, [len(stochastic), B, ...].
        mean: of what was drawn in these steps, [len(stochastic), B, ...].
        stochastic: indices (into the sampler's steps) of those with a log-probability; step i leads from
            `samples[i - first]` to `samples[i - first + 1]`.
        first: index of the chain's first step.
        data: what came out, [B, ...], clipped.
    """

    samples: Tensor
    log_prob: Tensor
    mean: Tensor
    stochastic: tuple[int, ...]
    first: int
    data: Tensor


class _Row(NamedTuple):
    """The numbers of a step: Python's floats for a whole batch, or tensors [B, 1, ...] gathered for a mixed one."""

    x0_of_x: Any
    x0_of_prediction: Any
    mean_of_x0: Any  # with x0 clipped, mean = mean_of_x0 * x0 + mean_of_x * x
    mean_of_x: Any
    direct_of_x: Any  # without, mean = direct_of_x * x + direct_of_prediction * prediction
    direct_of_prediction: Any
    std: Any
    half_precision: Any
    log_normalizer: Any


class Sampler:
    """Runs chains of a network along a path.

    Args:
        path: data to noise.
        kind: what the network predicts.
        rule: of every step, or one rule for each: deterministic steps around a stochastic window (MixGRPO), say.
        times: [N + 1], descending, the last 0; see `Path.times`.
        limits: clips and floors.

    Raises:
        UserError: times or rules that do not fit, or a prediction that does not say what x0 is at the first time.

    Example:
        >>> from agents.core.noise_paths import RectifiedFlow
        >>> from agents.core.step_rules import Euler
        >>> path = RectifiedFlow()
        >>> sampler = Sampler(path, "velocity", Euler(), path.times(4))
        >>> noise = standard_normal((2, 3), torch.Generator().manual_seed(0))
        >>> data = sampler.sample(lambda x, t, condition: noise - 1, noise)  # the flow to 1
        >>> [round(value, 5) for value in data[0].tolist()]
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        path: Path,
        kind: Prediction,
        rule: StepRule | Sequence[StepRule],
        times: Tensor,
        limits: Limits | None = None,
    ) -> None:
        self.path = path
        self.kind: Prediction = kind
        self.limits = limits or Limits()
        self.points = path.points(times)
        self.steps = len(self.points) - 1
        self.rules = list(rule) if isinstance(rule, Sequence) else [rule] * self.steps
        self._check(times)
        self._rows: list[_Row] = []
        self._corrections: list[_Row | None] = []
        stochastic = []
        for index, (rule_, now, then) in enumerate(
            zip(self.rules, self.points, self.points[1:], strict=False)
        ):
            weights = self._floored(rule_, rule_.weights(now, then))
            self._rows.append(_row(kind, now, weights))
            correction = rule_.correction(now, then) if isinstance(rule_, Heun) else None
            self._corrections.append(None if correction is None else _row(kind, then, correction))
            if weights.std != 0:
                stochastic.append(index)
        self.stochastic = tuple(stochastic)
        """Indices of steps that draw noise: those with a log-probability."""
        self._learned = [math.isnan(row.std) for row in self._rows]
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _check(self, times: Tensor) -> None:
        """Refuse what cannot be run."""
        if self.steps < 1 or not bool((times.diff() < 0).all()) or times[-1] != 0:
            raise UserError("a chain's times descend from noise to 0, at least two of them")
        if len(self.rules) != self.steps:
            raise UserError(f"{len(self.rules)} step rules for {self.steps} steps; give one each")
        if self.kind == "noise" and self.points[0].alpha < 1e-9:
            raise UserError(
                f"at t = {self.points[0].t:g} nothing of the data is left, and a predicted noise does not say what it "
                "was; predict x0, v or velocity, or begin later"
            )

    def _floored(self, rule: StepRule, weights: Weights) -> Weights:
        """Return a step's weights with the floors of its noise."""
        std, spread = weights.std, weights.log_prob_std
        if std is not None and not rule.deterministic:
            std = max(std, self.limits.min_std)
        if std is not None and spread is None:
            spread = max(std, self.limits.min_log_prob_std)
        return weights._replace(std=std, log_prob_std=spread)

    # ---------------------------------------------------------------------------------- one step

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        index: int | Tensor,
        condition: Any = None,
        *,
        noise_network: Denoiser | None = None,
    ) -> Step:
        """Return the distribution of the next sample.

        Args:
            denoiser: the network.
            x: [B, ...], as recorded in a chain.
            index: of the step, 0 is the noisiest; one for all, or int64 [B] (only of rules that ask the network once).
            condition: given to the networks.
            noise_network: for `LearnedNoise`, a network of the same inputs that returns the step's std, positive,
                broadcastable to x.

        Raises:
            UserError: a learned noise without its network, or Heun's steps in a mixed batch.
        """
        drawn: bool | Tensor
        if isinstance(index, int):
            row, drawn = self._rows[index], index > 0
            t = torch.full((len(x),), self.points[index].t, device=x.device)
        else:
            self._refuse_corrected(index)
            rows, times = self._table(x.device)
            shape = (-1,) + (1,) * (x.ndim - 1)
            row = _Row(*(c.reshape(shape) for c in rows[index].to(x.dtype).unbind(-1)))
            drawn, t = (index > 0).reshape(shape), times[index]
        x = self._handed_on(x, drawn)
        mean = self._mean(row, x, denoiser(x, t, condition).to(x.dtype))
        if isinstance(index, int) and (second := self._corrections[index]) is not None:
            t = torch.full((len(x),), self.points[index + 1].t, device=x.device)
            moved = self._mean(second, mean, denoiser(mean, t, condition).to(x.dtype))
            mean = 0.5 * (x + mean + moved)
        if not self._is_learned(index):
            return Step(mean, row.std, row.half_precision, row.log_normalizer)
        if noise_network is None:
            raise UserError("a learned noise needs `noise_network`, the network that gives its std")
        std = noise_network(x, t, condition).to(x.dtype).clamp(min=self.limits.min_std)
        spread = std.clamp(min=self.limits.min_log_prob_std)
        return Step(mean, std, 0.5 / spread.square(), spread.log() + _HALF_LOG_2PI)

    def _mean(self, row: _Row, x: Tensor, prediction: Tensor) -> Tensor:
        if self.limits.x0 is None:
            return row.direct_of_x * x + row.direct_of_prediction * prediction
        x0 = row.x0_of_x * x + row.x0_of_prediction * prediction
        return row.mean_of_x0 * x0.clamp(-self.limits.x0, self.limits.x0) + row.mean_of_x * x

    def _handed_on(self, x: Tensor, drawn: bool | Tensor) -> Tensor:
        """Return a chain's sample as the next step gets it; the start, which no step has drawn, stays as it is."""
        if self.limits.sample is None or drawn is False:
            return x
        inside = x.clamp(-self.limits.sample, self.limits.sample)
        return inside if drawn is True else torch.where(drawn, inside, x)

    def _is_learned(self, index: int | Tensor) -> bool:
        """Whether a network gives the noise of these steps; a mixed batch is of one sort."""
        if isinstance(index, int):
            return self._learned[index]
        if any(self._learned) and not all(self._learned):
            raise UserError(
                "steps with and without a learned noise in one batch; evaluate them apart"
            )
        return self._learned[0]

    def _refuse_corrected(self, index: Tensor) -> None:
        """Refuse a mixed batch with steps that ask the network twice."""
        corrected = [i for i, row in enumerate(self._corrections) if row is not None]
        if corrected and any(i in corrected for i in index.unique().tolist()):
            raise UserError("Heun's steps in a mixed batch; evaluate them one index at a time")

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return all rows, float64 [N, 9], and times, float32 [N]."""
        if device not in self._tables:
            rows = torch.tensor(self._rows, dtype=torch.float64, device=device)
            times = torch.tensor([point.t for point in self.points[:-1]], device=device)
            self._tables[device] = rows, times.float()
        return self._tables[device]

    # ------------------------------------------------------------------------------- whole chains

    def sample(
        self,
        denoiser: Denoiser,
        start: Tensor,
        condition: Any = None,
        generator: Generators | None = None,
        *,
        steps: range | None = None,
        temperature: float = 1.0,
        fixed: Fixed | None = None,
        noise_network: Denoiser | None = None,
    ) -> Tensor:
        """Return data [B, ...] denoised from `start`, without a record.

        Args:
            denoiser: the network.
            start: [B, ...]: standard normal noise, correlated noise, or zeros (FPO++'s zero-noise sampling).
            condition: given to the networks.
            generator: of fresh noise, on the device of `start`; deterministic chains need none.
            steps: which of the N steps to take, all by default: a chain may go on with another network, or end early.
            temperature: factor of fresh noise: 0 for none, .5 for Decision Diffuser's low-temperature sampling.
            fixed: coordinates that are given.
            noise_network: see `step`.

        Raises:
            UserError: stochastic steps without a generator, or steps that do not follow each other.
        """
        x, last = start, self.steps - 1
        for last, _, x in self._walk(  # noqa: B007 - the last step says whether the data is reached
            denoiser, start, condition, generator, steps, temperature, fixed, noise_network
        ):
            pass
        return self._out(x, last)

    def chain(
        self,
        denoiser: Denoiser,
        start: Tensor,
        condition: Any = None,
        generator: Generators | None = None,
        *,
        steps: range | None = None,
        temperature: float = 1.0,
        fixed: Fixed | None = None,
        noise_network: Denoiser | None = None,
    ) -> Chain:
        """Return a chain with its record; arguments as for `sample`. Log-probabilities are those at temperature 1."""
        chosen = range(self.steps) if steps is None else steps
        samples, log_prob, mean, stochastic = [self._begun(start, chosen, fixed)], [], [], []
        last = self.steps - 1
        for last, step, x in self._walk(
            denoiser, start, condition, generator, steps, temperature, fixed, noise_network
        ):
            samples.append(x)
            if last in self.stochastic:
                log_prob.append(_free(step.log_prob(x), fixed))
                mean.append(step.mean)
                stochastic.append(last)
        kept = torch.stack(samples)
        logs = torch.stack(log_prob) if log_prob else kept[:0]
        means = torch.stack(mean) if mean else kept[:0]
        data = self._out(samples[-1], last)
        return Chain(kept, logs, means, tuple(stochastic), chosen.start, data)

    def log_prob(
        self,
        denoiser: Denoiser,
        x: Tensor,
        drawn: Tensor,
        index: int | Tensor,
        condition: Any = None,
        *,
        fixed: Fixed | None = None,
        noise_network: Denoiser | None = None,
    ) -> Tensor:
        """Return the log-probability of recorded steps under these parameters, per element [B, ...].

        Args:
            denoiser: the network.
            x: where the steps began, `chain.samples[i - chain.first]`, [B, ...].
            drawn: where they led, the next of `chain.samples`.
            index: of the steps; see `step`.
            condition: given to the networks.
            fixed: coordinates that were given: their log-probability is 0.
            noise_network: see `step`.

        Raises:
            UserError: a step draws no noise.
        """
        if (
            len(self.stochastic) < self.steps
        ):  # else there is nothing to look for, and no wait for the device
            asked = [index] if isinstance(index, int) else index.unique().tolist()
            without = [i for i in asked if i not in self.stochastic]
            if without:
                raise UserError(
                    f"step {without[0]} of 0 ... {self.steps - 1} draws no noise and has no log-probability; take "
                    "those in `stochastic`, or set min_std"
                )
        step = self.step(denoiser, x, index, condition, noise_network=noise_network)
        return _free(step.log_prob(drawn), fixed)

    def _walk(
        self,
        denoiser: Denoiser,
        x: Tensor,
        condition: Any,
        generator: Generators | None,
        steps: range | None,
        temperature: float,
        fixed: Fixed | None,
        noise_network: Denoiser | None,
    ) -> Iterator[tuple[int, Step, Tensor]]:
        """Yield each step's index, distribution and result."""
        steps = range(self.steps) if steps is None else steps
        if not steps or steps.step != 1 or steps.start < 0 or steps.stop > self.steps:
            raise UserError(f"{steps} is no run of steps out of 0 ... {self.steps - 1}")
        x = self._begun(x, steps, fixed)
        for index in steps:
            step = self.step(denoiser, x, index, condition, noise_network=noise_network)
            x = step.mean
            if index in self.stochastic and temperature > 0:
                if generator is None:
                    raise UserError(f"step {index} draws noise; give a generator")
                noise = standard_normal(x.shape, generator, device=x.device, dtype=x.dtype)
                if self.limits.noise is not None:
                    noise = noise.clamp(-self.limits.noise, self.limits.noise)
                x = x + temperature * step.std * noise
            if fixed is not None:
                x = fixed.place(x, self.points[index + 1])
            yield index, step, x

    def _begun(self, start: Tensor, steps: range, fixed: Fixed | None) -> Tensor:
        return start if fixed is None else fixed.place(start, self.points[steps.start])

    def _out(self, x: Tensor, last: int) -> Tensor:
        """Return a run's result as it is handed out; only data is clipped to `final`."""
        x = self._handed_on(x, True)
        if self.limits.final is not None and last == self.steps - 1:
            x = x.clamp(-self.limits.final, self.limits.final)
        return x


def _free(log_prob: Tensor, fixed: Fixed | None) -> Tensor:
    return log_prob if fixed is None else log_prob.masked_fill(fixed.mask, 0.0)


def _row(kind: Prediction, now: Point, weights: Weights) -> _Row:
    """Return the numbers of a step of weights on predicted x0 and noise, for a network that predicts `kind`."""
    a, b = x0_weights(kind, now)
    of_x = weights.noise / now.sigma
    of_x0 = weights.x0 - of_x * now.alpha
    # Not from `of_x0`: where alpha is tiny and x0's weights are huge, these are still moderate.
    e, f = noise_weights(kind, now)
    direct = weights.x0 * a + weights.noise * e, weights.x0 * b + weights.noise * f
    std, spread = weights.std, weights.log_prob_std
    if std is None:
        return _Row(a, b, of_x0, of_x, *direct, math.nan, math.nan, math.nan)
    if not spread:  # a step without noise has no log-probability
        return _Row(a, b, of_x0, of_x, *direct, std, math.nan, math.nan)
    return _Row(a, b, of_x0, of_x, *direct, std, 0.5 / spread**2, math.log(spread) + _HALF_LOG_2PI)
