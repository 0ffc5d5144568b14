"""The networks of diffusers pipelines as denoisers (x, t, condition) -> prediction, and their prompts as one tensor.

What such a network is told of a prompt are features of its words [L, F] and, but in Stable Diffusion 1, one vector of
the whole. The vector is put behind the words, cut into rows of F: a condition is one tensor [B, L + R, F] then, which
guidance, groups and selections take as that of any other generator.

x, t and the result are float32, whatever the network computes in: latents that were rounded to bfloat16 would bias
log-ratios.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.noise_paths import DiscreteVP
from agents.generative_models.pipeline_schedules import Schedule


def pack(words: Tensor, whole: Tensor | None) -> Tensor:
    """Return words [B, L, F] and a vector [B, P] of the whole as one condition [B, L + ceil(P / F), F]."""
    if whole is None:
        return words
    rows = F.pad(whole, (0, -whole.shape[1] % words.shape[2])).unflatten(1, (-1, words.shape[2]))
    return torch.cat([words, rows.to(words.dtype)], 1)


def unpack(condition: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return words [B, L, F] and vector [B, P] that `pack` put together.

    Args:
        condition: [B, L + ceil(P / F), F].
        length: P, more than 0.
    """
    rows = -(-length // condition.shape[2])
    return condition[:, :-rows], condition[:, -rows:].flatten(1)[:, :length]


HALF_SCALE = 4096.0
"""Gradients inside a float16 network are this much larger: those of single latents would be 0 otherwise."""


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, whose gradient is multiplied by a factor on the way back."""
    scaled = _ScaledGradient.apply(x, factor)
    assert isinstance(scaled, Tensor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.factor, None


class PipelineNetwork(nn.Module, ABC):
    """A pipeline's network; see the module.

    Args:
        network: of diffusers.
        schedule: of its times.
        pixels: of an image, along the side of a latent's one.
        dtype: of its weights.
    """

    def __init__(self, network: Any, schedule: Schedule, pixels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.schedule, self.pixels, self.dtype = network, schedule, pixels, dtype

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told the scale of guidance, instead of being asked twice."""
        return False

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: float = 1.0) -> Tensor:
        """Return the prediction [B, C, H, W] for x [B, C, H, W], t [B] and condition [B, L, F].

        Args:
            x: noisy latents.
            t: their times.
            condition: see `pack`.
            guidance: scale, for networks that are told it.
        """
        half = self.dtype == torch.float16
        inside = scaled_gradient(x, 1 / HALF_SCALE) if half else x
        said = self.predict(inside.to(self.dtype), t, condition.to(self.dtype), guidance)
        said = said.to(x.dtype)
        return scaled_gradient(said, HALF_SCALE) if half else said

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """Return what the network says, in its own precision."""


class UNetDenoiser(PipelineNetwork):
    """Stable Diffusion 1 and 2: words alone, times as steps of training."""

    def predict(self, x: Tensor, t: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """See `PipelineNetwork.predict`."""
        return self.network(x, self.step(t), condition, return_dict=False)[0]

    def step(self, t: Tensor) -> Tensor:
        """Return times as steps of training, int64."""
        assert isinstance(self.schedule.path, DiscreteVP)
        return self.schedule.path.index(t)


class XLDenoiser(UNetDenoiser):
    """Stable Diffusion XL: the size of the image is told, too; nothing of it is cropped."""

    def predict(self, x: Tensor, t: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """See `PipelineNetwork.predict`."""
        about = self.network.config
        length = about.projection_class_embeddings_input_dim - 6 * about.addition_time_embed_dim
        words, whole = unpack(condition, length)
        height, width = (self.pixels * side for side in x.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=x.dtype)
        added = {"text_embeds": whole, "time_ids": ids.expand(len(x), -1)}
        return self.network(
            x, self.step(t), words, added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip


class SD3Denoiser(PipelineNetwork):
    """Stable Diffusion 3."""

    def predict(self, x: Tensor, t: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """See `PipelineNetwork.predict`."""
        words, whole = unpack(condition, self.network.config.pooled_projection_dim)
        return self.network(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=words,
            pooled_projections=whole, return_dict=False,
        )[0]  # fmt: skip


class FluxDenoiser(PipelineNetwork):
    """FLUX.1: squares of 2 x 2 latents are tokens, and `dev` is told the scale of guidance."""

    @property
    def embeds_guidance(self) -> bool:
        """See `PipelineNetwork`."""
        return bool(self.network.config.guidance_embeds)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """See `PipelineNetwork.predict`."""
        words, whole = unpack(condition, self.network.config.pooled_projection_dim)
        height, width = (side // 2 for side in x.shape[-2:])
        places = torch.zeros(height, width, 3, device=x.device)
        places[..., 1] = torch.arange(height, device=x.device)[:, None]
        places[..., 2] = torch.arange(width, device=x.device)
        told = torch.full((len(x),), guidance, device=x.device) if self.embeds_guidance else None
        result = self.network(
            hidden_states=F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2), timestep=t,
            guidance=told, pooled_projections=whole, encoder_hidden_states=words,
            txt_ids=torch.zeros(words.shape[1], 3, device=x.device),
            img_ids=places.flatten(0, 1), return_dict=False,
        )[0]  # fmt: skip
        return F.pixel_shuffle(result.transpose(1, 2).unflatten(2, (height, width)), 2)


# ------------------------------------------------------------------------------------- prompts


def encode_sd(pipe: Any, prompts: Sequence[str], device: torch.device, length: int) -> Tensor:
    """Return the conditions of prompts for Stable Diffusion 1 and 2, [B, L, F]; CLIP's `length` is fixed."""
    return pipe.encode_prompt(list(prompts), device, 1, False)[0]


def encode_xl(pipe: Any, prompts: Sequence[str], device: torch.device, length: int) -> Tensor:
    """Return the conditions of prompts for Stable Diffusion XL."""
    words, _, whole, _ = pipe.encode_prompt(
        list(prompts), device=device, do_classifier_free_guidance=False
    )
    return pack(words, whole)


def encode_sd3(pipe: Any, prompts: Sequence[str], device: torch.device, length: int) -> Tensor:
    """Return the conditions of prompts for Stable Diffusion 3, with `length` tokens of T5."""
    words, _, whole, _ = pipe.encode_prompt(
        list(prompts), None, None, device=device, do_classifier_free_guidance=False,
        max_sequence_length=length,
    )  # fmt: skip
    return pack(words, whole)


def encode_flux(pipe: Any, prompts: Sequence[str], device: torch.device, length: int) -> Tensor:
    """Return the conditions of prompts for FLUX, with `length` tokens of T5."""
    words, whole, _ = pipe.encode_prompt(
        list(prompts), None, device=device, max_sequence_length=length
    )
    return pack(words, whole)


# ------------------------------------------------------------------------------------ families

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Family:
    """Pipelines of one kind.

    Attributes:
        part: the component that denoises.
        network: it, as a denoiser.
        encode: (pipeline, prompts, device, tokens of T5) -> conditions [B, L, F].
        targets: layers that get a LoRA: the projections of attention (ddpo-pytorch, flow_grpo).
        patch: side of the squares of latents that are one token.
    """

    part: Literal["unet", "transformer"]
    network: type[PipelineNetwork]
    encode: Callable[[Any, Sequence[str], torch.device, int], Tensor]
    targets: tuple[str, ...]
    patch: int = 1


FAMILIES = {
    "StableDiffusionPipeline": Family("unet", UNetDenoiser, encode_sd, _ATTENTION),
    "StableDiffusionXLPipeline": Family("unet", XLDenoiser, encode_xl, _ATTENTION),
    "StableDiffusion3Pipeline": Family("transformer", SD3Denoiser, encode_sd3, _JOINT, patch=2),
    "FluxPipeline": Family("transformer", FluxDenoiser, encode_flux, _JOINT, patch=2),
}
"""By diffusers' names of their classes."""
