"""What every method of fine-tuning shares: generator, reference, prompts, rewards, gradient steps.

An iteration draws images of some prompts, scores them, and takes a few gradient steps; `update` does all three. Only
the denoiser learns, or a LoRA of it: the text encoder stays, so a prompt is encoded once in a run. Guidance is one pass
over a doubled batch.

Several processes (`agents.core.ranks`) share an iteration's prompts out, a prompt's images to one of them, and take its
gradient steps together: credit is of all images, a loss is divided by the number of all, and gradients are added up
before they are clipped. So a step is that of one process that has drawn all of these images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from agents.core.agent import Learner
from agents.core.errors import UserError
from agents.core.guidance import ClassifierFree
from agents.core.noise_paths import RectifiedFlow
from agents.core.parameter_averages import ParameterAverage
from agents.core.ranks import Ranks
from agents.core.sampling import Denoiser, Sampler
from agents.core.seeding import rank_seed
from agents.generative_models.chains import ChainBatch, draw_chains, step_rules, window_start
from agents.generative_models.credit import RewardFunction, checked_reward
from agents.generative_models.forward_passes import forward_pass
from agents.generative_models.text_to_image import TextToImage
from agents.generative_models.tuning_config import TuningConfig

Metrics = dict[str, Tensor]

LARGEST = ("ratio/first_deviation", "ratio/largest_deviation")
"""Metrics of which the largest of all processes counts; of others it is the mean."""


class GeneratorTuner(Learner):
    """A generator that learns from rewards of its images.

    Args:
        model: it gives its reference, and then learns itself.
        reward: of images in [0, 1] and their prompts.
        config: how.
        device: where networks live.
        seed: of noise, times and orders; each of several processes has its own of it.
        ranks: the processes that take part; this one alone, if none are given.

    Attributes:
        model: learns.
        reference: the model as it was, frozen.
        parameters: of the model, that learn.
        average: of these; None without `average_decay`.
        dimension: d, numbers of a sample.
        iterations: so far.
        evaluations: samples that went through a denoiser so far, the reference's and both halves of guidance included;
            a loop leaves its evaluations out, and what is only computed again for a gradient does not count.
        scored: images that the reward has seen so far; of several processes, these counters are of all.

    Raises:
        UserError: the prompts of an iteration cannot be shared out evenly over the processes.
    """

    needs_mean = False

    def __init__(
        self,
        model: TextToImage,
        reward: RewardFunction,
        config: TuningConfig,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config = config.on_path(is_flow=isinstance(model.path, RectifiedFlow))
        self.reward, self.device, self.ranks = reward, torch.device(device), ranks or Ranks()
        self.ranks.span(config.prompts, "prompts")  # refuses what no iteration could share out
        self.generator = torch.Generator(self.device).manual_seed(rank_seed(seed, self.ranks.rank))
        self.model = model.to(self.device).requires_grad_(False).eval()
        self.reference = self.model.as_reference()
        self.parameters = self.model.learned()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.evaluations = self.scored = self.iterations = self.gradient_updates = 0
        for network in (self.model.denoiser, self.reference.denoiser):
            network.register_forward_pre_hook(self._count)
        self.dimension = 1
        for size in model.shape:
            self.dimension *= size
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self._learned = nn.ParameterList(self.parameters)
        self.average: ParameterAverage[nn.ParameterList] | None = None
        if config.average_decay:
            self.average = ParameterAverage(self._learned, decay=config.average_decay, power=0)
        self._conditions: dict[str, Tensor] = {}
        self._samplers: dict[int, Sampler] = {}
        self._guided: dict[TextToImage, Denoiser] = {}

    # ------------------------------------------------------------------------ what a method says

    @abstractmethod
    def iterate(self, batch: Sequence[str]) -> Metrics:
        """Draw images of this process's part of the prompts, score them, and learn with all others."""

    def update(self, batch: Sequence[str]) -> Metrics:
        """Draw images of prompts, score them, and learn; return 0-d detached metrics.

        Args:
            batch: the same prompts in all processes.
        """
        spent, scored = self.evaluations, self.scored
        metrics = self.ranks.combined(self.iterate(batch), self.device, LARGEST)
        self.evaluations = spent + self.ranks.total(self.evaluations - spent)
        self.scored = scored + self.ranks.total(self.scored - scored)
        return metrics

    # --------------------------------------------------------------------------------- compiled

    def compile(self, *, backend: str | None = None, fall_back: bool = False) -> None:
        """Compile the denoisers' passes of the usual sizes; see `forward_passes`.

        Args:
            backend: of `torch.compile`.
            fall_back: go on without compiling, after a warning, where it fails.
        """
        sizes = self.usual_sizes()
        for model in (self.model, self.reference):
            forward_pass(model.network).compile(sizes, backend=backend, fall_back=fall_back)
        if self.reference.network is not self.model.network:
            # As if it learned: then it shares the model's program. Whoever asks it does so without gradient.
            self.reference.network.requires_grad_(True)

    def usual_sizes(self) -> set[int]:
        """Return how many samples usually go through the denoiser at once."""
        images = self.config.prompts // self.ranks.size * self.config.group
        return {self.pass_size(images) * self.halves}

    @property
    def halves(self) -> int:
        """How many samples an image is in a guided pass: two with classifier-free guidance, else one."""
        guided = self.guided(self.model)
        return 2 if isinstance(guided, ClassifierFree) and guided.scale != 0 else 1

    # -------------------------------------------------------------------------------- its parts

    def condition(self, prompts: Sequence[str]) -> Tensor:
        """Return prompts encoded, [B, L, F]; each one is encoded once in a run.

        Raises:
            UserError: there are none, or one has a word that the generator does not know.
        """
        if not prompts:
            raise UserError("there are no prompts to draw images of; give some")
        missing = [p for p in dict.fromkeys(prompts) if p not in self._conditions]
        if missing:
            with torch.no_grad():
                self._conditions |= zip(missing, self.model.encode(missing), strict=True)
        return torch.stack([self._conditions[prompt] for prompt in prompts])

    def sampler(self, start: int = 0) -> Sampler:
        """Return the sampler of training, its window of noise beginning with step `start`."""
        if start not in self._samplers:
            config = self.config
            rules = step_rules(config, start)
            self._samplers[start] = self.model.sampler(
                config.denoising_steps, rules, shift=config.shift
            )
        return self._samplers[start]

    def guided(self, model: TextToImage) -> Denoiser:
        """Return a model's denoiser with the guidance of training; the empty prompt is encoded once, too."""
        if model not in self._guided:
            self._guided[model] = model.guided(self.config.guidance)
        return self._guided[model]

    def pass_size(self, images: int) -> int:
        """Return how many of an iteration's images go through the network at once."""
        return min(images, self.config.batch_size)

    def own(self, prompts: Sequence[str]) -> Sequence[str]:
        """Return this process's part of an iteration's prompts."""
        return prompts[self.ranks.span(len(prompts), "prompts")]

    def draw(self, prompts: Sequence[str]) -> tuple[Sampler, list[ChainBatch]]:
        """Return this process's images of an iteration with their chains, and what drew them.

        Args:
            prompts: of all processes, which have one window of noise.
        """
        config, prompts = self.config, self.own(prompts)
        start = window_start(config, self.iterations, self.generator)
        sampler = self.sampler(self.ranks.each(start)[0])
        batches = draw_chains(
            sampler, self.guided(self.model), self.model.decode, prompts, self.condition(prompts),
            self.model.shape, self.generator, group=config.group,
            batch_size=self.pass_size(len(prompts) * config.group), shared_noise=config.shared_noise,
            how=config.log_prob, keep_mean=self.needs_mean,
        )  # fmt: skip
        return sampler, batches

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards [B] of images [B, 3, H, W]; see `checked_reward`."""
        values = checked_reward(self.reward, images, prompts)
        self.scored += len(prompts)
        return values

    def score_batches(self, batches: Sequence[ChainBatch]) -> Tensor:
        """Return the rewards of this process's images, [B] over all batches, without gradient."""
        # Pass by pass: what the network has memory for, the reward's may have, too.
        with torch.no_grad():
            return torch.cat([self.score(batch.images, batch.prompts) for batch in batches])

    def descend(self, backward: Callable[[], Metrics]) -> Metrics:
        """Take one gradient step.

        Args:
            backward: adds gradients of this process's images to those of `parameters`, and returns metrics.
        """
        self.optimizer.zero_grad(set_to_none=True)
        metrics = backward()
        self.ranks.add_gradients(self.parameters)
        moved = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(moved, self.config.max_gradient_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self._learned)
        self.gradient_updates += 1
        return metrics | {"gradient_norm": norm.detach()}

    def shuffled(self, count: int) -> list[int]:
        """Return 0 ... count - 1 in random order."""
        return torch.randperm(count, generator=self.generator, device=self.device).tolist()

    def _count(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.evaluations += len(arguments[0])

    @contextmanager
    def averaged(self) -> Iterator[TextToImage]:
        """Lend the model with the average in its parameters' place, if there is one.

        Storages change places and no number is copied: a state that was taken meanwhile stays the average's.
        """
        if self.average is None:
            yield self.model
            return
        pairs = list(zip(self._learned, self.average.module, strict=True))
        now = [own.data for own, _ in pairs]
        for own, average in pairs:
            own.data = average.data
        try:
            yield self.model
        finally:
            for (own, _), data in zip(pairs, now, strict=True):
                own.data = data

    # -------------------------------------------------------------------------------------- state

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save; the reference, too: then a run does not depend on its base's folder."""
        own: dict[str, nn.Module] = {} if self.average is None else {"average": self.average}
        return {"model": self.model, "reference": self.reference} | own

    def lend_weights(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put a checkpoint's weights in the model: those of its average, where it kept one.

        Args:
            networks: the checkpoint's states of `networks`.
        """
        self.model.load_state_dict(networks["model"])
        if "average" in networks:
            for place, parameter in enumerate(self._learned):
                parameter.data.copy_(networks["average"][f"module.{place}"])

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers to save."""
        return {"denoiser": self.optimizer}

    def extra_state(self) -> dict[str, Any]:
        """Return counters."""
        names = ("evaluations", "scored", "iterations", "gradient_updates")
        return {name: getattr(self, name) for name in names}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""
        for name in ("evaluations", "scored", "iterations", "gradient_updates"):
            setattr(self, name, state[name])


def parts(items: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """Yield `items` in `count` runs of nearly equal length; of fewer items, some are empty."""
    bounds = [len(items) * index // count for index in range(count + 1)]
    for first, last in pairwise(bounds):
        yield items[first:last]


def part_sizes(items: int, count: int) -> set[int]:
    """Return how long `parts` of so many items are."""
    count = max(1, min(count, items))
    return {items // count, -(-items // count)}


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """Return each name's mean over those that have it."""
    names = sorted({name for each in metrics for name in each})
    return {
        name: torch.stack([each[name].float() for each in metrics if name in each]).mean()
        for name in names
    }


def reward_metrics(reward: Tensor, kept: Tensor | None = None) -> Metrics:
    """Return what an iteration's rewards were like."""
    metrics = {"reward/mean": reward.mean(), "reward/std": reward.std(correction=0)}
    if kept is not None:
        metrics["reward/kept"] = kept.float().mean()
    return {name: value.detach() for name, value in metrics.items()}
