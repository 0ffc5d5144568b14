"""Rewards of models with the architecture of CLIP, from local folders: CLIP's cosine, PickScore, aesthetic score.

They need the package `transformers`, which is not among the requirements, and a folder with the model's files, as
`huggingface-cli download openai/clip-vit-large-patch14 --local-dir DIR` writes one; nothing is downloaded here.

| reward | value | weights |
| --- | --- | --- |
| `clip(DIR)` | cosine of image and prompt (Radford et al. 2021, arXiv:2103.00020) | a CLIP |
| `pickscore(DIR)` | that times the learned scale, about 20 (Kirstain et al. 2023, arXiv:2305.01569) | PickScore v1 |
| `aesthetic(DIR)` | linear layers on the image's unit vector, 1 to 10 (LAION) | CLIP ViT-L/14, and the stack |

The stack lies in the same folder as `aesthetic.safetensors`, with tensors `layers.N.weight` and `layers.N.bias` as in
LAION's file (which is a pickle: load it with torch and save its state dict with safetensors once).

Images are resized and normalized as tensors, so that gradients reach them; the package's own preprocessing rounds to
bytes. A prompt's vector is computed once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from agents.core.errors import UserError
from agents.generative_models.pipeline_loading import missing_of_tokenizer

Score = Callable[[Tensor, Sequence[str]], Tensor]

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of CLIP's training images (OpenAI), where the folder has no preprocessor_config.json that says otherwise."""
STD = (0.26862954, 0.26130258, 0.27577711)
STACK = "aesthetic.safetensors"
"""The aesthetic score's linear layers."""


class ClipModel:
    """A CLIP of a local folder, which embeds images and prompts as unit vectors.

    Args:
        folder: with config.json, model.safetensors and a tokenizer's files.
        reward: name of the reward, for errors.

    Raises:
        UserError: `transformers` is not installed, or files are missing.
    """

    def __init__(self, folder: str, reward: str) -> None:
        if not folder:
            raise UserError(
                f"reward '{reward}' needs the folder of a model: write {reward}(FOLDER)"
            )
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise UserError(
                f"reward '{reward}' needs the package {error.name}: pip install transformers"
            ) from error
        path = Path(folder)
        _check_files(path, reward)
        try:
            clip: Any = transformers.CLIPModel
            model, found = clip.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot load the reward '{reward}' from '{folder}': {reason}; its weights must be whole, and "
                "safetensors: pickles are not read"
            ) from error
        if absent := sorted(found["missing_keys"]):  # the package fills them with random numbers
            raise UserError(
                f"the weights in '{folder}' lack {absent[0]} and {len(absent) - 1} others of a CLIP, which the reward "
                f"'{reward}' needs; download all of them again"
            )
        self.model: Any = model.eval().requires_grad_(False)
        about: Any = self.model.config
        self.side: int = about.vision_config.image_size
        self.mean, self.std = _statistics(path)
        self._texts: dict[str, Tensor] = {}

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors [B, F] of images [B, 3, H, W] in [0, 1]; differentiable."""
        self.model.to(images.device)
        side = (self.side, self.side)
        resized = F.interpolate(
            images.float(), side, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std)
        )
        features = self.model.get_image_features(pixel_values=(resized - mean) / std)
        return F.normalize(_tensor(features), dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Return unit vectors [B, F] of prompts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self.model.to(device)
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                new, padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).to(device)
            features = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            self._texts |= dict(zip(new, F.normalize(_tensor(features), dim=-1), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts]).to(device)


def _tensor(features: Any) -> Tensor:
    """Return projected features, which newer versions of the package wrap."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _check_files(folder: Path, reward: str) -> None:
    """Refuse a folder without a CLIP: the package would take another model's, or none, and fill in random weights.

    Raises:
        UserError: files are missing, or those of another model.
    """
    absent = [] if (folder / "config.json").is_file() else ["config.json"]
    if absent := absent or missing_of_tokenizer(folder):
        raise UserError(
            f"'{folder}' holds no model for the reward '{reward}' ({absent[0]} is missing): download one, such as "
            "huggingface-cli download openai/clip-vit-large-patch14 --local-dir DIR"
        )
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise UserError(
            f"'{folder}' holds a model of type '{kind}', not a clip, which the reward '{reward}' needs"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({error}); download it again") from error
    if not isinstance(about, dict):
        raise UserError(f"'{file}' is damaged (no names in it); download it again")
    return about


def _statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and spread of the pixels of each color that the model was trained with.

    Raises:
        UserError: what the folder says of them is damaged.
    """
    file = folder / "preprocessor_config.json"
    about = _read_json(file) if file.is_file() else {}
    said = about.get("image_mean", MEAN), about.get("image_std", STD)
    for values in said:
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"'{file}' is damaged ({values} are no 3 numbers); download it again")
    return said


def clip_reward(folder: str) -> Score:
    """Return the cosine of image and prompt, in [-1, 1]."""
    return _cosine(ClipModel(folder, "clip"))


def pickscore_reward(folder: str) -> Score:
    """Return PickScore: the cosine times the model's learned scale."""
    model = ClipModel(folder, "pickscore")
    scale = float(model.model.logit_scale.exp())
    cosine = _cosine(model)
    return lambda images, prompts: scale * cosine(images, prompts)


def _cosine(model: ClipModel) -> Score:
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = model.embed_prompts(prompts, images.device)
        return (model.embed_images(images) * texts).sum(-1)

    return score


def aesthetic_reward(folder: str) -> Score:
    """Return LAION's aesthetic score."""
    model = ClipModel(folder, "aesthetic")
    layers = _read_stack(Path(folder) / STACK, model.model.config.projection_dim)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = model.embed_images(images)
        for weight, bias in layers:
            features = F.linear(features, weight.to(features.device), bias.to(features.device))
        return features[:, 0]

    return score


def _read_stack(file: Path, features: int) -> list[tuple[Tensor, Tensor]]:
    """Return weights and biases of the linear layers, first one first.

    Raises:
        UserError: the file is missing or damaged, or its layers do not follow each other from `features` to 1.
    """
    if not file.is_file():
        raise UserError(
            f"the aesthetic score needs '{file}': save the state dict of LAION's linear layers with safetensors there"
        )
    try:
        tensors = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise UserError(f"'{file}' is damaged ({error}); write it again") from None
    numbers = sorted(
        int(m[1]) for name in tensors if (m := re.fullmatch(r"layers\.(\d+)\.weight", name))
    )
    layers = [(tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in numbers]
    sizes = [features, *(len(bias) for _, bias in layers)]
    fits = all(w.shape == (b, a) for (w, _), a, b in zip(layers, sizes, sizes[1:], strict=False))
    if not layers or sizes[-1] != 1 or not fits:
        raise UserError(
            f"the layers in '{file}' are {[tuple(w.shape) for w, _ in layers]}; expected a stack from the model's "
            f"{features} features to 1 number"
        )
    return layers
