"""Learning from which images of a prompt are the best: Diffusion-DPO, IPO, D3PO, and RAFT's imitation.

Pairs are made on the fly: of each prompt's images the best and the worst by the reward, as a judge of whom only the
order counts. Prompts whose images are all as good say nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.core.chain_steps import reduce_log_prob, standard_normal
from agents.core.denoising import draw_times
from agents.core.errors import UserError
from agents.core.preferences import denoising_log_ratio, dpo, ipo
from agents.core.sampling import Sampler
from agents.generative_models.chains import ChainBatch
from agents.generative_models.credit import best_and_worst, best_of_group
from agents.generative_models.tuner import (
    GeneratorTuner,
    Metrics,
    mean_metrics,
    part_sizes,
    parts,
    reward_metrics,
)

LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo}


class _Drawn:
    """An iteration's images in one piece: data [B, C, H, W], conditions [B, L, F], rewards and groups [B]."""

    def __init__(self, batches: Sequence[ChainBatch], reward: Tensor) -> None:
        self.samples = torch.cat([batch.samples for batch in batches], 1)
        self.condition = torch.cat([batch.condition for batch in batches])
        self.group = torch.cat([batch.group for batch in batches])
        self.reward = reward


class SelectionTuner(GeneratorTuner):
    """Draws, selects, and learns from what is selected; see the module and `GeneratorTuner`."""

    rows = 1
    """Images that are learned from together."""

    def usual_sizes(self) -> set[int]:
        """See `GeneratorTuner.usual_sizes`; those of learning are of prompts that all say something."""
        chosen = self.config.prompts // self.ranks.size * self.per_prompt
        most = max(1, self.config.batch_size // self.rows)
        return super().usual_sizes() | {
            min(size, most) * self.rows * self.samples
            for size in part_sizes(chosen, self.config.updates)
        }

    @property
    def per_prompt(self) -> int:
        """Selections from a prompt's images."""
        return 1

    @property
    def samples(self) -> int:
        """How many samples an image is in a pass of learning."""
        return self.config.draws

    def iterate(self, batch: Sequence[str]) -> Metrics:
        """See `GeneratorTuner.iterate`."""
        sampler, batches = self.draw(batch)
        self.iterations += 1
        drawn = _Drawn(batches, self.score_batches(batches))
        chosen = self.select(drawn)
        counts = self.ranks.each(chosen.shape[-1])
        metrics = reward_metrics(self.ranks.gathered(drawn.reward)) | {
            "reward/selected": torch.tensor(float(sum(counts)), device=self.device)
        }
        if not any(counts):
            return metrics
        steps: list[Metrics] = []
        for _ in range(self.config.epochs):
            # As many steps in every process: where fewer images were selected, some are without them.
            for part in parts(
                self.shuffled(chosen.shape[-1]), min(self.config.updates, max(counts))
            ):
                places = chosen[..., part]
                steps.append(self.descend(partial(self._backward, sampler, drawn, places)))
        return metrics | mean_metrics(steps)

    @abstractmethod
    def select(self, drawn: _Drawn) -> Tensor:
        """Return places of images to learn from, int64 [..., N]."""

    @abstractmethod
    def loss(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> tuple[Tensor, Metrics]:
        """Return the loss of some of what was selected, 0-d, and metrics."""

    def _backward(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> Metrics:
        """Add up gradients, `batch_size` images in a pass."""
        count = places.shape[-1]
        total = self.ranks.total(count)
        if not count:  # another process has some
            return {}
        most = max(1, self.config.batch_size * count // places.numel())
        metrics = []
        for part in places.split(most, -1):
            loss, said = self.loss(sampler, drawn, part)
            (loss * (part.shape[-1] / total)).backward()
            metrics.append(said | {"loss/selection": loss.detach()})
        return mean_metrics(metrics)

    def noised(self, count: int) -> tuple[Tensor, Tensor]:
        """Return random times [count] and noise [count, C, H, W]."""
        t = draw_times(self.model.path, count, self.generator, device=self.device)
        shape = (count, *self.model.shape)
        return t, standard_normal(shape, self.generator, device=self.device)


class ImitationTuner(SelectionTuner):
    """RAFT: the best images of each prompt are learned like data."""

    @property
    def per_prompt(self) -> int:
        """See `SelectionTuner.per_prompt`."""
        return self.config.best

    def select(self, drawn: _Drawn) -> Tensor:
        """See `SelectionTuner.select`."""
        return best_of_group(drawn.reward, drawn.group, self.config.best)

    def loss(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> tuple[Tensor, Metrics]:
        """Return the denoising loss, with conditions dropped as in pretraining."""
        places = places.repeat(self.config.draws)
        x0, condition = drawn.samples[-1, places], drawn.condition[places]
        return self.model.loss(x0, condition, self.generator).mean(), {}


class PairTuner(SelectionTuner):
    """Pairs of best and worst; subclasses say what log-ratio they have."""

    rows = 2

    def select(self, drawn: _Drawn) -> Tensor:
        """See `SelectionTuner.select`: the best in the first row, the worst in the second."""
        return torch.stack(best_and_worst(drawn.reward, drawn.group))

    def loss(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> tuple[Tensor, Metrics]:
        """Return the preference loss of pairs [2, N]."""
        log_ratio = self.log_ratio(sampler, drawn, places)
        loss = LOSSES[self.config.preference](log_ratio, beta=self.config.beta).mean()
        margin = (log_ratio[0] - log_ratio[1]).detach()
        right = (margin > 0).float().mean()
        return loss, {"preference/margin": margin.mean(), "preference/right": right}

    @abstractmethod
    def log_ratio(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> Tensor:
        """Return log(pi / pi_ref) [2, M] for pairs of places [2, N]."""


class NoisedPairTuner(PairTuner):
    """Diffusion-DPO and IPO: both images are noised alike, and predicted back."""

    def log_ratio(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> Tensor:
        """See `PairTuner.log_ratio`."""
        places = places.repeat(1, self.config.draws)
        t, noise = self.noised(places.shape[1])
        inputs = (
            drawn.samples[-1, places.flatten()],
            drawn.condition[places.flatten()],
            t.repeat(2),
            noise.repeat(2, 1, 1, 1),
        )
        with (
            torch.no_grad()
        ):  # first: compiled, it keeps activations for a moment (see `forward_passes`)
            reference_error = self.dimension * self.reference.errors(*inputs)
        error = self.dimension * self.model.errors(*inputs)
        return denoising_log_ratio(error, reference_error).view(2, -1)


class StepPairTuner(PairTuner):
    """D3PO: every stochastic step of two chains from one noise is a comparison; a gradient step is of their mean."""

    _index = 0  # the step that is compared

    @property
    def samples(self) -> int:
        """See `SelectionTuner.samples`."""
        return self.halves

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if not self.sampler().stochastic:
            raise UserError(
                "chains without noise have no steps to compare; give a --noise-level above 0 and 2 steps or more"
            )

    def _backward(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> Metrics:
        """Add up the gradients of all stochastic steps, one after the other: memory is that of one."""
        metrics = []
        for self._index in sampler.stochastic:
            metrics.append(super()._backward(sampler, drawn, places))
        return mean_metrics(metrics)

    def loss(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> tuple[Tensor, Metrics]:
        """Return one step's share of the mean over steps."""
        loss, metrics = super().loss(sampler, drawn, places)
        return loss / len(sampler.stochastic), metrics

    def log_ratio(self, sampler: Sampler, drawn: _Drawn, places: Tensor) -> Tensor:
        """See `PairTuner.log_ratio`; of the step that is compared."""
        index = self._index
        x, result = (
            drawn.samples[index, places.flatten()],
            drawn.samples[index + 1, places.flatten()],
        )
        condition = drawn.condition[places.flatten()]
        with torch.no_grad():  # first, too
            reference = sampler.step(self.guided(self.reference), x, index, condition)
            old = reduce_log_prob(reference.log_prob(result), self.config.log_prob)
        step = sampler.step(self.guided(self.model), x, index, condition)
        return (reduce_log_prob(step.log_prob(result), self.config.log_prob) - old).view(2, -1)
