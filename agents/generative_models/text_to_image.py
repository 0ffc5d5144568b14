"""What every text-to-image generator offers to whoever samples, trains, measures or steers it.

Two kinds exist: the small one that denoises pixels (`generator`), and pipelines of diffusers that denoise latents
(`pipeline_generator`). Trainers know no more of them than this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from agents.core.chain_steps import Limits, standard_normal
from agents.core.denoising import TimeDistribution, corrupt, draw_times, squared_error
from agents.core.guidance import ClassifierFree
from agents.core.noise_paths import Path, Prediction
from agents.core.sampling import Denoiser, Sampler
from agents.core.step_rules import StepRule

NEAR_NOISE = 0.8
"""Time above which noise hides where things are (8 % of logit-normal times lie there)."""


class TextToImage(nn.Module, ABC):
    """Text to image, by denoising.

    Attributes:
        shape: of what is denoised, (C, H, W).
        path: data to noise.
        kind: what the network predicts.
        denoiser: (x [B, C, H, W], t [B], condition [B, L, F]) -> prediction [B, C, H, W].
        condition_dropout: share of conditions that `loss` empties.
        training_times: their distribution in `loss`.
        training_shift: of them, above 1 more near the noise.
    """

    shape: tuple[int, int, int]
    path: Path
    kind: Prediction
    denoiser: nn.Module
    condition_dropout: float
    training_times: TimeDistribution
    training_shift: float = 1.0

    @property
    def network(self) -> nn.Module:
        """What computes the denoiser's passes: itself, unless it only changes how another one does."""
        return self.denoiser

    # ------------------------------------------------------------------- what each kind says itself

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its parameters are."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the condition of prompts, [B, L, F]; a prompt that occurs more than once is encoded once."""

    @abstractmethod
    def unconditional(self, batch: int) -> Tensor:
        """Return the condition that stands for no prompt, [B, L, F]."""

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that cannot be read, before anything is drawn.

        Raises:
            UserError: says which.
        """

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Return images float [B, 3, H, W] in [0, 1] of denoised x; differentiable within the range."""

    @abstractmethod
    def from_images(self, images: Tensor) -> Tensor:
        """Return x0 of images, uint8 or float in [0, 1]: what `decode` turns back."""

    @abstractmethod
    def learned(self) -> list[nn.Parameter]:
        """Return what fine-tuning changes."""

    @abstractmethod
    def as_reference(self) -> TextToImage:
        """Return a generator that goes on to draw as this one draws now, whatever this one learns."""

    @abstractmethod
    def to_tree(self) -> dict[str, Any]:
        """Return what a checkpoint needs to build it again, as a tree."""

    # --------------------------------------------------------------------------------- sampling

    def times(self, steps: int, shift: float = 1.0) -> Tensor:
        """Return the times that a chain visits, float64 [steps + 1]; see `Path.times`."""
        return self.path.times(steps, shift=shift)

    def sampler(
        self,
        steps: int,
        rule: StepRule | Sequence[StepRule],
        *,
        shift: float = 1.0,
        limits: Limits | None = None,
    ) -> Sampler:
        """Return what runs chains of `denoiser`; see `times` and `Sampler`."""
        return Sampler(self.path, self.kind, rule, self.times(steps, shift), limits)

    def guided(self, scale: float) -> Denoiser:
        """Return the denoiser with classifier-free guidance, one pass over a doubled batch; 1 is none.

        The condition for no prompt is computed here: ask again when the text encoder has learned.
        """
        if scale == 1:
            return self.denoiser
        with torch.no_grad():
            null = self.unconditional(1)[0]
        return ClassifierFree(self.denoiser, null, scale)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        steps: int,
        rule: StepRule | Sequence[StepRule],
        scale: float,
        shift: float = 1.0,
        batch: int = 64,
        label: str | None = None,
    ) -> Tensor:
        """Return one image for each prompt, float [N, 3, H, W] in [0, 1], on the CPU.

        Image i depends on `seed`, i and prompt i alone, up to rounding: not on the batch, and not on other prompts.
        With a `label`, a bar of that name shows on a terminal how far it is.
        """
        sampler, denoiser = self.sampler(steps, rule, shift=shift), self.guided(scale)
        images = []
        firsts = range(0, len(prompts), batch)
        for first in tqdm(firsts, label, disable=None if label else True, leave=False):
            some = prompts[first : first + batch]
            noises = [
                torch.Generator(self.device).manual_seed(_mixed(seed, first + index))
                for index in range(len(some))
            ]
            start = standard_normal((len(some), *self.shape), noises, device=self.device)
            x = sampler.sample(denoiser, start, self.encode(some), noises)
            images.append(self.decode(x).cpu())
        return torch.cat(images) if images else torch.empty(0, *self.shape)

    # --------------------------------------------------------------------------------- learning

    def errors(self, x0: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the denoising loss of every sample, [B], for given times [B] and noise [B, C, H, W]."""
        x, target = corrupt(self.path, self.kind, x0, noise, t)
        return squared_error(self.denoiser(x, t, condition), target)

    def loss(
        self, x0: Tensor, condition: Tensor, generator: torch.Generator, *, noisy_share: float = 0.0
    ) -> Tensor:
        """Return the denoising loss of every sample, [B], at random times, with some conditions dropped.

        Args:
            x0: [B, C, H, W].
            condition: [B, L, F].
            generator: on the device of `x0`.
            noisy_share: of samples whose times are uniform in [`NEAR_NOISE`, 1] instead.
        """
        options: dict[str, Any] = {"generator": generator, "device": x0.device}
        dropped = torch.rand(len(x0), **options) < self.condition_dropout
        condition = torch.where(dropped[:, None, None], self.unconditional(1), condition)
        # A logit-normal's numbers are its mean and spread, (0, 1) in Esser et al.; those of a beta are (1, 1).
        first = 1.0 if self.training_times == "beta" else 0.0
        t = draw_times(
            self.path, len(x0), distribution=self.training_times, first=first, second=1.0,
            shift=self.training_shift, **options
        )  # fmt: skip
        if noisy_share:
            near = NEAR_NOISE + (1 - NEAR_NOISE) * torch.rand(len(x0), **options)
            chosen = torch.rand(len(x0), **options) < noisy_share
            t = torch.where(chosen, self.path.snap(near), t)
        noise = standard_normal(x0.shape, generator, device=x0.device)
        return self.errors(x0, condition, t, noise)


def _mixed(seed: int, index: int) -> int:
    """Return a seed of 32 bits (torch's generator on the CPU looks at no more) for one image of many."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
