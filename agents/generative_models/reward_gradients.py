"""Gradients of a differentiable reward through what drew its image: AlignProp and ReFL.

AlignProp (Prabhudesai et al. 2023, arXiv:2310.03739) runs a deterministic chain and lets the gradient go through its
last K steps; earlier predictions count as constants. K is drawn in every gradient step, from 1 to twice
`gradient_steps` less 1, since a fixed one over-optimizes the last steps (their randomized truncation). Activations of
a step are computed again on the way back, so memory is that of one step.

ReFL (Xu et al. 2023, arXiv:2304.05977) stops at a random step of the chain's last quarter and takes the gradient
through the x0 that is predicted there.

Both are fast and hack fastest: the reward's own errors are where the gradient leads. Watch the monitor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.core.chain_steps import standard_normal
from agents.core.denoising import convert
from agents.core.errors import UserError
from agents.core.sampling import Denoiser, Sampler
from agents.generative_models.chains import STILL
from agents.generative_models.tuner import (
    GeneratorTuner,
    Metrics,
    mean_metrics,
    part_sizes,
    parts,
    reward_metrics,
)

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


@contextmanager
def _recomputation() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)


def is_recomputing() -> bool:
    """Whether a denoiser is asked again for activations that were not kept, on the way back."""
    return _recomputing.get()


def recomputed(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser, keeping none of its activations for the gradient."""

    def call(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        result = checkpoint(
            denoiser, x, t, condition, use_reentrant=False,
            context_fn=lambda: (nullcontext(), _recomputation()),
        )  # fmt: skip
        assert isinstance(result, Tensor)
        return result

    return call


class RewardGradientTuner(GeneratorTuner):
    """Climbs the reward itself; see the module and `GeneratorTuner`.

    Raises:
        UserError: the reward says that it has no gradient.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if not getattr(self.reward, "differentiable", True):
            name = getattr(self.reward, "name", "this one")
            raise UserError(
                f"reward '{name}' has no gradient, which this method climbs; give a differentiable one such as "
                "brightness, or a method that only asks for rewards, such as flow-grpo"
            )
        self.still = self.model.sampler(self.config.denoising_steps, STILL, shift=self.config.shift)

    def usual_sizes(self) -> set[int]:
        """See `GeneratorTuner.usual_sizes`."""
        images = self.config.prompts // self.ranks.size * self.config.group
        sizes = part_sizes(images, self.config.updates)
        return {min(size, self.config.batch_size) * self.halves for size in sizes}

    def iterate(self, batch: Sequence[str]) -> Metrics:
        """See `GeneratorTuner.iterate`."""
        prompts = [prompt for prompt in self.own(batch) for _ in range(self.config.group)]
        self.iterations += 1
        metrics = []
        for _ in range(self.config.epochs):
            for part in parts(prompts, min(self.config.updates, len(prompts))):
                metrics.append(self.descend(partial(self._backward, part)))
        return mean_metrics(metrics)

    def _count(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Count what is drawn; what is only computed again is the price of memory, not of images."""
        if not is_recomputing():
            super()._count(module, arguments)

    @abstractmethod
    def drawn(self, sampler: Sampler, start: Tensor, condition: Tensor) -> Tensor:
        """Return denoised samples that have a gradient."""

    def _backward(self, prompts: Sequence[str]) -> Metrics:
        seen = []
        count = self.ranks.total(len(prompts))
        size = self.config.batch_size
        for first in range(0, len(prompts), size):
            some = prompts[first : first + size]
            start = standard_normal(
                (len(some), *self.model.shape), self.generator, device=self.device
            )
            x = self.drawn(self.still, start, self.condition(some))
            reward = self.score(self.model.decode(x), some)
            if not reward.requires_grad:
                raise UserError(
                    "the reward's result has no gradient, which this method climbs; return a tensor that was computed "
                    "from the images by torch, or use a method such as flow-grpo"
                )
            loss = -reward.clamp(max=self.config.reward_ceiling).sum() / count
            loss.backward()
            seen.append(reward.detach())
        return reward_metrics(self.ranks.gathered(torch.cat(seen)))


class TruncatedChainTuner(RewardGradientTuner):
    """AlignProp."""

    def drawn(self, sampler: Sampler, start: Tensor, condition: Tensor) -> Tensor:
        """See `RewardGradientTuner.drawn`."""
        longest = max(1, min(2 * self.config.gradient_steps - 1, sampler.steps))
        count = 1 + int(torch.randint(longest, (1,), generator=self.generator, device=self.device))
        return truncated_chain(
            sampler, self.guided(self.model), start, condition, count,
            recompute=self.config.checkpoint_activations,
        )  # fmt: skip


def truncated_chain(
    sampler: Sampler,
    denoiser: Denoiser,
    start: Tensor,
    condition: Tensor,
    count: int,
    *,
    recompute: bool,
) -> Tensor:
    """Return denoised samples whose gradient goes through the last `count` steps.

    Args:
        sampler: deterministic.
        denoiser: that learns.
        start: noise, [B, ...].
        condition: [B, L, F].
        count: steps with a gradient, 1 to all.
        recompute: activations, instead of keeping them.
    """
    first = sampler.steps - count
    x = start
    if first:
        with torch.no_grad():
            x = sampler.sample(denoiser, x, condition, steps=range(first))
    late = recomputed(denoiser) if recompute else denoiser
    return sampler.sample(late, x, condition, steps=range(first, sampler.steps))


class OneStepTuner(RewardGradientTuner):
    """ReFL."""

    def drawn(self, sampler: Sampler, start: Tensor, condition: Tensor) -> Tensor:
        """See `RewardGradientTuner.drawn`."""
        late = max(1, sampler.steps // 4)
        index = (
            sampler.steps
            - 1
            - int(torch.randint(late, (1,), generator=self.generator, device=self.device))
        )
        denoiser, x = self.guided(self.model), start
        if index:
            with torch.no_grad():
                x = sampler.sample(denoiser, x, condition, steps=range(index))
        t = torch.full((len(x),), sampler.points[index].t, device=x.device)
        return convert(denoiser(x, t, condition), x, t, sampler.path, sampler.kind, "x0")
