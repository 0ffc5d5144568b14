"""A small text-conditional image generator: what it denoises, on which path, with which network.

The network sees pixels in [-1, 1]; `decode` turns them into images in [0, 1]. Larger generators, which denoise latents,
are in `pipeline_generator`. Whoever trains it owns optimizer and loop: here are the parts of a step.

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

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.core.checkpoints import CheckpointStore, load_tree, save_tree
from agents.core.denoising import TimeDistribution
from agents.core.errors import UserError
from agents.core.noise_paths import CosineVP, DiscreteVP, LinearVP, Path, Prediction, RectifiedFlow
from agents.core.settings import from_dict, to_dict
from agents.generative_models.forward_passes import forward_pass
from agents.generative_models.networks import BesideGuess, ImageDiT, ImageUNet
from agents.generative_models.pipeline_generator import PipelineGenerator
from agents.generative_models.text import TextEncoder, Vocabulary
from agents.generative_models.text_to_image import TextToImage

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
    data_mean: float = 0.0
    """Mean of the images' numbers in [-1, 1], for `data_spread`."""
    data_spread: float = 0.0
    """Their spread, for a linear guess that the network's output is added to (see `networks.BesideGuess`); 0 for none.
    Drawings have -.8 and .4."""
    text_features: int = 128
    """Width of the text encoder."""
    text_blocks: int = 2
    """Its transformer blocks."""
    condition_dropout: float = 0.1
    """Share of prompts that training empties, for classifier-free guidance (Ho & Salimans 2022: .1 to .2)."""
    times: TimeDistribution = "logit_normal"
    """Of training times: logit_normal prefers the middle (Esser et al. 2024, arXiv:2403.03206, table 1: best of all),
    beta(1, 1) and uniform are the same."""
    times_shift: float = 1.0
    """Shift of training times, above 1 more near the noise, where it is decided what is where (Esser et al., equation
    23, for large images); steps of a chain have a shift of their own."""

    def __post_init__(self) -> None:
        """Reject values that no generator can be built with."""
        for name in ("size", "width", "heads", "patch", "levels", "text_features"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        for name in ("depth", "text_blocks"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.data_spread < 0:
            raise UserError(f"data_spread is {self.data_spread}; give 0 or more")
        if not 0 < self.times_shift < math.inf:
            raise UserError(f"times_shift is {self.times_shift}; give a positive number")
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


class ImageGenerator(TextToImage):
    """Text to image, by denoising pixels; see `TextToImage`.

    Args:
        config: its parts.
        vocabulary: words that prompts are made of.

    Attributes:
        text: tokens [B, L] -> condition [B, L, F].
    """

    def __init__(self, config: GeneratorConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.shape = (3, config.size, config.size)
        self.path, self.kind = PATHS[config.path], config.kind
        self.condition_dropout, self.training_times = config.condition_dropout, config.times
        self.training_shift = config.times_shift
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
        if config.network == "unet":
            self.denoiser = ImageUNet(3, config.text_features, levels=config.levels, **common)
        else:
            self.denoiser = ImageDiT(3, config.text_features, **common)
        if config.data_spread:
            self.denoiser = BesideGuess(
                self.denoiser,
                self.path,
                self.kind,
                mean=config.data_mean,
                spread=config.data_spread,
            )

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.text.position.device

    # ---------------------------------------------------------------------------------- prompts

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the condition of prompts, [B, L, F]; a prompt that occurs more than once is encoded once.

        It depends on the text encoder's parameters alone: keep it while these are fixed. Not even its last bits depend
        on the prompts beside it, which are others after a run was resumed.

        Raises:
            UserError: a word is unknown, or a prompt is too long.
        """
        tokens = self.vocabulary.tokens(list(dict.fromkeys(prompts))).to(self.device)
        each = dict(zip(dict.fromkeys(prompts), map(self.text, tokens.split(1)), strict=True))
        return torch.cat([each[prompt] for prompt in prompts])

    def unconditional(self, batch: int) -> Tensor:
        """Return the condition that stands for no prompt, [B, L, F]: that of the empty one."""
        return self.encode([""]).expand(batch, -1, -1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """See `TextToImage.check_prompts`."""
        self.vocabulary.tokens(prompts)

    def decode(self, x: Tensor) -> Tensor:
        """Return images float [B, 3, H, W] in [0, 1] of denoised x; differentiable where x is in [-1, 1]."""
        return (0.5 * x + 0.5).clamp(0, 1)

    def compute_in(self, precision: Literal["fp32", "bf16"]) -> ImageGenerator:
        """Let the denoiser compute in a precision from now on; what it takes and returns stays float32."""
        forward_pass(self.denoiser).bf16 = precision == "bf16"
        return self

    def from_images(self, images: Tensor) -> Tensor:
        """Return x0 of images, uint8 or float in [0, 1]: what `decode` turns back."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return 2 * images - 1

    def learned(self) -> list[nn.Parameter]:
        """Return the denoiser's parameters: the text encoder stays, so a prompt is encoded once in a run."""
        return list(self.denoiser.parameters())

    def as_reference(self) -> ImageGenerator:
        """Return a copy."""
        return copy.deepcopy(self)

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


def save_generator(folder: str | FilePath, generator: ImageGenerator) -> None:
    """Write a generator into a folder, which is made, as `generator.safetensors` and `generator.json`."""
    FilePath(folder).mkdir(parents=True, exist_ok=True)
    save_tree(folder, PART, generator.to_tree())


def load_generator(folder: str | FilePath) -> TextToImage:
    """Return a saved generator, on the CPU; the pipeline that a fine-tuned one was made from must still be there.

    Args:
        folder: that `save_generator` wrote into, a checkpoint that has such a part, or a run: its newest checkpoint.

    Raises:
        UserError: there is none in it, or it is damaged.
    """
    folder = FilePath(folder)
    if (folder / f"{PART}.json").exists():
        return generator_of(load_tree(folder, PART))
    if (folder / "checkpoints").is_dir():
        parts = CheckpointStore(folder).load()
        if PART in parts:
            return generator_of(parts[PART])
    raise UserError(
        f"'{folder}' holds no image generator: give a run of experiments.pretrain_generator or "
        f"experiments.finetune_generator, or a folder with {PART}.json and {PART}.safetensors"
    )


def generator_of(tree: dict[str, Any]) -> TextToImage:
    """Return the generator of either kind whose `to_tree` gave `tree`, on the CPU."""
    return (PipelineGenerator if "pipeline" in tree else ImageGenerator).from_tree(tree)
