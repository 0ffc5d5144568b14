"""A small text-conditional image generator: what it denoises, on which path, with which network.

The network sees pixels in [-1, 1]; `decode` turns them into images in [0, 1]. A larger generator that denoises latents
has the same methods. Whoever trains it owns optimizer and loop: here are the parts of a step.

Example:
    >>> import torch
    >>> from agents.core.step_rules import Euler
    >>> vocabulary = Vocabulary.of(["a red circle", "a blue square"])
    >>> generator = ImageGenerator(GeneratorConfig(size=8, width=16, depth=1, patch=2, levels=1), vocabulary)
    >>> images = generator.generate(["a blue circle"], seed=0, steps=4, rule=Euler(), scale=3.0)
    >>> images.shape
    torch.Size([1, 3, 8, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from agents.core.chain_steps import Limits, standard_normal
from agents.core.checkpoints import CheckpointStore, load_tree, save_tree
from agents.core.denoising import TimeDistribution, corrupt, draw_times, squared_error
from agents.core.errors import UserError
from agents.core.guidance import ClassifierFree
from agents.core.noise_paths import CosineVP, DiscreteVP, LinearVP, Path, Prediction, RectifiedFlow
from agents.core.sampling import Denoiser, Sampler
from agents.core.settings import from_dict, to_dict
from agents.core.step_rules import StepRule
from agents.generative_models.networks import ImageDiT, ImageUNet
from agents.generative_models.text import TextEncoder, Vocabulary

PART = "generator"
"""Name of the files, and of the part of a checkpoint, that hold a generator."""

PATHS: dict[str, Path] = {
    "flow": RectifiedFlow(),
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "ddpm": DiscreteVP(train_steps=1000, schedule="linear"),
}
"""By the name that a config holds."""


@dataclass(frozen=True)
class GeneratorConfig:
    """What makes a generator, apart from its vocabulary."""

    network: Literal["unet", "dit"] = "unet"
    """`unet` (convolutions around a transformer) or `dit` (a transformer alone)."""
    path: Literal["flow", "cosine", "linear", "ddpm"] = "flow"
    """From data to noise: rectified flow, a diffusion with the cosine or the linear schedule, or DDPM's 1000 steps."""
    prediction: Literal["auto", "velocity", "v", "noise", "x0"] = "auto"
    """What the network predicts; auto: velocity on the flow, v on diffusions (at the noisy end a predicted noise does
    not say what x0 is)."""
    size: int = 32
    """Side of the images in pixels."""
    width: int = 128
    """Width of a token, and of the U-Net's lowest resolution (finer ones have half as many channels)."""
    depth: int = 4
    """Transformer blocks; the U-Net's stand at its lowest resolution."""
    heads: int = 4
    """Heads of their attention."""
    patch: int = 2
    """Side of the squares of pixels that the network sees as one (a DiT's time grows with 1 / patch^2)."""
    levels: int = 2
    """Resolutions of the U-Net."""
    text_features: int = 128
    """Width of the text encoder."""
    text_blocks: int = 2
    """Its transformer blocks."""
    condition_dropout: float = 0.1
    """Share of prompts that training empties, for classifier-free guidance (Ho & Salimans 2022: .1 to .2)."""
    times: TimeDistribution = "logit_normal"
    """Of training times: logit_normal prefers the middle (Esser et al. 2024, arXiv:2403.03206, table 1: best of all),
    beta(1, 1) and uniform are the same."""

    def __post_init__(self) -> None:
        """Reject values that no generator can be built with."""
        for name in ("size", "width", "heads", "patch", "levels", "text_features"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        for name in ("depth", "text_blocks"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not 0 <= self.condition_dropout < 1:
            raise UserError(
                f"condition_dropout is {self.condition_dropout}; give a share in [0, 1)"
            )
        multiple = self.patch * (2 ** (self.levels - 1) if self.network == "unet" else 1)
        if self.size % multiple:
            raise UserError(
                f"size is {self.size}; this network takes sizes divisible by {multiple} (see patch and levels)"
            )
        if self.network == "unet" and self.width % 2**self.levels:
            raise UserError(
                f"width is {self.width}; with {self.levels} levels give a multiple of {2**self.levels}"
            )

    @property
    def kind(self) -> Prediction:
        """What the network predicts, with `auto` resolved."""
        if self.prediction == "auto":
            return "velocity" if self.path == "flow" else "v"
        return self.prediction


class ImageGenerator(nn.Module):
    """Text to image, by denoising.

    Args:
        config: its parts.
        vocabulary: words that prompts are made of.

    Attributes:
        shape: of what is denoised, (C, H, W).
        path: data to noise.
        kind: what the network predicts.
        denoiser: (x [B, C, H, W], t [B], condition [B, L, F]) -> prediction [B, C, H, W].
        text: tokens [B, L] -> condition [B, L, F].
    """

    def __init__(self, config: GeneratorConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.shape = (3, config.size, config.size)
        self.path: Path = PATHS[config.path]
        self.kind: Prediction = config.kind
        self.text = TextEncoder(
            len(vocabulary.words),
            vocabulary.length,
            features=config.text_features,
            blocks=config.text_blocks,
            heads=config.heads,
        )
        common: dict[str, Any] = {
            "width": config.width,
            "depth": config.depth,
            "heads": config.heads,
            "patch": config.patch,
        }
        self.denoiser: nn.Module
        if config.network == "unet":
            self.denoiser = ImageUNet(3, config.text_features, levels=config.levels, **common)
        else:
            self.denoiser = ImageDiT(3, config.text_features, **common)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.text.position.device

    # ---------------------------------------------------------------------------------- prompts

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the condition of prompts, [B, L, F]; a prompt that occurs more than once is encoded once.

        It depends on the text encoder's parameters alone: keep it while these are fixed.

        Raises:
            UserError: a word is unknown, or a prompt is too long.
        """
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        condition = self.text(self.vocabulary.tokens(list(place)).to(self.device))
        if len(place) == len(prompts):
            return condition
        return condition[torch.tensor([place[prompt] for prompt in prompts], device=self.device)]

    def unconditional(self, batch: int) -> Tensor:
        """Return the condition that stands for no prompt, [B, L, F]: that of the empty one."""
        return self.encode([""]).expand(batch, -1, -1)

    # --------------------------------------------------------------------------------- sampling

    def sampler(
        self,
        steps: int,
        rule: StepRule | Sequence[StepRule],
        *,
        shift: float = 1.0,
        limits: Limits | None = None,
    ) -> Sampler:
        """Return what runs chains of `denoiser`; see `Path.times` and `Sampler`."""
        return Sampler(self.path, self.kind, rule, self.path.times(steps, shift=shift), limits)

    def guided(self, scale: float) -> Denoiser:
        """Return the denoiser with classifier-free guidance, one pass over a doubled batch; 1 is none.

        The condition for no prompt is computed here: ask again when the text encoder has learned.
        """
        if scale == 1:
            return self.denoiser
        with torch.no_grad():
            null = self.unconditional(1)[0]
        return ClassifierFree(self.denoiser, null, scale)

    def decode(self, x: Tensor) -> Tensor:
        """Return images float [B, 3, H, W] in [0, 1] of denoised x; differentiable where x is in [-1, 1]."""
        return (0.5 * x + 0.5).clamp(0, 1)

    def from_images(self, images: Tensor) -> Tensor:
        """Return x0 of images, uint8 or float in [0, 1]: what `decode` turns back."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return 2 * images - 1

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
    ) -> Tensor:
        """Return one image for each prompt, float [N, 3, H, W] in [0, 1], on the CPU.

        Image i depends on `seed`, i and prompt i alone, up to rounding: not on the batch, and not on other prompts.
        """
        sampler, denoiser = self.sampler(steps, rule, shift=shift), self.guided(scale)
        images = []
        for first in range(0, len(prompts), batch):
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

    def loss(self, x0: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return the denoising loss of every sample, [B], at random times, with some conditions dropped.

        Args:
            x0: [B, C, H, W].
            condition: [B, L, F].
            generator: on the device of `x0`.
        """
        options: dict[str, Any] = {"generator": generator, "device": x0.device}
        dropped = torch.rand(len(x0), **options) < self.config.condition_dropout
        condition = torch.where(dropped[:, None, None], self.unconditional(1), condition)
        # A logit-normal's numbers are its mean and spread, (0, 1) in Esser et al.; those of a beta are (1, 1).
        first = 1.0 if self.config.times == "beta" else 0.0
        t = draw_times(
            self.path, len(x0), distribution=self.config.times, first=first, second=1.0, **options
        )
        noise = standard_normal(x0.shape, generator, device=x0.device)
        return self.errors(x0, condition, t, noise)

    # ---------------------------------------------------------------------------------- on disk

    def to_tree(self) -> dict[str, Any]:
        """Return everything that `from_tree` needs, as a tree."""
        return {
            "config": to_dict(self.config),
            "words": list(self.vocabulary.words),
            "length": self.vocabulary.length,
            "weights": dict(self.state_dict()),
        }

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> ImageGenerator:
        """Rebuild a generator, on the CPU.

        Raises:
            UserError: the tree was made by another version.
        """
        config = from_dict(GeneratorConfig, tree["config"])
        generator = cls(config, Vocabulary(tree["words"], tree["length"]))
        try:
            generator.load_state_dict(tree["weights"])
        except RuntimeError as error:
            reason = str(error).split("\n")[-1].strip()
            raise UserError(
                f"a saved generator's weights do not fit its config ({reason}); use the version that wrote it"
            ) from None
        return generator


def _mixed(seed: int, index: int) -> int:
    """Return a seed of 32 bits (torch's generator on the CPU looks at no more) for one image of many."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def save_generator(folder: str | FilePath, generator: ImageGenerator) -> None:
    """Write a generator into a folder, which is made, as `generator.safetensors` and `generator.json`."""
    FilePath(folder).mkdir(parents=True, exist_ok=True)
    save_tree(folder, PART, generator.to_tree())


def load_generator(folder: str | FilePath) -> ImageGenerator:
    """Return a saved generator, on the CPU.

    Args:
        folder: that `save_generator` wrote into, a checkpoint that has such a part, or a run: its newest checkpoint.

    Raises:
        UserError: there is none in it, or it is damaged.
    """
    folder = FilePath(folder)
    if (folder / f"{PART}.json").exists():
        return ImageGenerator.from_tree(load_tree(folder, PART))
    if (folder / "checkpoints").is_dir():
        parts = CheckpointStore(folder).load()
        if PART in parts:
            return ImageGenerator.from_tree(parts[PART])
    raise UserError(
        f"'{folder}' holds no image generator: give a run of experiments.pretrain_generator or "
        f"experiments.finetune_generator, or a folder with {PART}.json and {PART}.safetensors"
    )
