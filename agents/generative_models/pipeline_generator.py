"""Pipelines of diffusers as generators, which learn by a LoRA: Stable Diffusion 1 to 3 and XL, and FLUX.1.

All that samples, trains, measures and steers the small generators takes them as they are. What is special:

- Only the LoRA is learned, saved and resumed; the reference of a KL is the same network without it, not a copy.
- A prompt is encoded once; then its text encoders go back to the CPU.
- The network may be in bfloat16 or float16. Latents, guidance, log-probabilities, the LoRA and the VAE stay in float32.
- Safety checkers are not run, and no watermark is put into images.

Example:
    pipeline = load_pipeline("stable-diffusion-v1-5", PipelineSettings(lora_rank=4, lora_alpha=4))
    pipeline.to("cuda").generate(["a red circle"], seed=0, steps=20, rule=Posterior(0.0), scale=7.5)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.core.denoising import TimeDistribution
from agents.core.errors import UserError
from agents.core.sampling import Denoiser
from agents.core.settings import from_dict, to_dict
from agents.generative_models.lora import WithoutLora, add_lora, save_lora
from agents.generative_models.pipeline_loading import open_pipeline
from agents.generative_models.pipeline_networks import FAMILIES, HALF_SCALE, Family, PipelineNetwork
from agents.generative_models.pipeline_schedules import schedule_of
from agents.generative_models.text_to_image import TextToImage

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_BATCH = 16
"""Prompts in a pass of the text encoders."""


@dataclass(frozen=True)
class PipelineSettings:
    """How a pipeline is taken, and what of it learns."""

    lora_rank: int = 32
    """Rank of the LoRA (Flow-GRPO 32, DDPO 4)."""
    lora_alpha: int = 64
    """It is scaled by alpha / rank (Flow-GRPO 64, DDPO 4)."""
    lora_targets: tuple[str, ...] = ()
    """Ends of names of the layers that get one; none for all projections of attention (DDPO, Flow-GRPO)."""
    precision: Precision = "auto"
    """Of the frozen networks. Commands take bf16 on CUDA devices for auto; it is fp32 otherwise. LoRA and
    log-probabilities are float32. Generators of pretrain_generator take fp32 and bf16, under autocast."""
    image_size: int = 0
    """Side of images in pixels; 0 for the pipeline's own (512 or 1024)."""
    text_length: int = 128
    """Tokens of T5 in Stable Diffusion 3 and FLUX (Flow-GRPO 128; the pipelines' own are 256 and 512)."""
    gradient_checkpointing: bool = False
    """Compute the network's activations again on the way back: a third slower, and far less memory."""
    decode_batch: int = 8
    """Latents that the VAE decodes at once."""

    def __post_init__(self) -> None:
        """Reject values that no pipeline takes."""
        for name in ("lora_rank", "lora_alpha", "text_length", "decode_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.image_size < 0:
            raise UserError(f"image_size is {self.image_size}; give pixels, or 0")
        if self.precision not in ("auto", *DTYPES):
            raise UserError.unknown("precision", self.precision, ["auto", *DTYPES])


class Prompts:
    """Encodes each prompt once; see the module.

    Args:
        pipe: of diffusers.
        family: it is of.
        length: tokens of T5.
    """

    def __init__(self, pipe: Any, family: Family, length: int) -> None:
        self.pipe, self.family, self.length = pipe, family, length
        self._known: dict[str, Tensor] = {}
        self._null: Tensor | None = None

    @torch.no_grad()
    def learn(self, prompts: Iterable[str], device: torch.device) -> None:
        """Encode those that are not known, on a device; results are kept on the CPU."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if not missing:
            return
        encoders = [m for name, m in self.pipe.components.items() if name.startswith("text_encoder") and m]  # fmt: skip
        try:
            for encoder in encoders:
                encoder.to(device)
            for first in range(0, len(missing), TEXT_BATCH):
                some = missing[first : first + TEXT_BATCH]
                rows = self.family.encode(self.pipe, some, device, self.length).cpu()
                self._known |= {p: row.clone() for p, row in zip(some, rows, strict=True)}
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Return conditions [B, L, F] on a device."""
        self.learn(prompts, device)
        return torch.stack([self._known[prompt] for prompt in prompts]).to(device)

    def null(self, device: torch.device) -> Tensor:
        """Return the condition of no prompt, [1, L, F]: the empty one's, or zeros where the pipeline says so."""
        if self._null is None:
            empty = self([""], device)
            is_zero = self.pipe.config.get("force_zeros_for_empty_prompt", False)
            self._null = torch.zeros_like(empty) if is_zero else empty
        self._null = self._null.to(device)
        return self._null


class PipelineGenerator(TextToImage):
    """Text to image by a pipeline of diffusers; see the module, `TextToImage` and `load_pipeline`.

    Args:
        source: folder or hub name that the pipeline is of.
        settings: how it was taken.
        prompts: the pipeline's, which may be shared.
        denoiser: its network.
        adapters: parameters that learn, by their names in the network; none in a reference.
        digest: of the network's weights.
    """

    def __init__(
        self,
        source: str,
        settings: PipelineSettings,
        prompts: Prompts,
        denoiser: nn.Module,
        adapters: dict[str, nn.Parameter],
        digest: int,
    ) -> None:
        super().__init__()
        self.source, self.settings, self.prompts, self.digest = source, settings, prompts, digest
        self.pipe, self.denoiser, self.adapters = prompts.pipe, denoiser, adapters
        self.vae: Any = self.pipe.vae
        network = self.network
        assert isinstance(network, PipelineNetwork)
        self.schedule = network.schedule
        self.path, self.kind = self.schedule.path, self.schedule.kind
        self.embeds_guidance = network.embeds_guidance
        side = image_side(self.pipe, settings) // self.pipe.vae_scale_factor
        self.shape = (self.vae.config.latent_channels, side, side)
        # A network that is told the scale of guidance needs no training without prompts.
        self.condition_dropout = 0.0 if self.embeds_guidance else 0.1
        is_flow = self.path.knots is None
        self.training_times: TimeDistribution = "logit_normal" if is_flow else "uniform"

    @property
    def device(self) -> torch.device:
        """Where its networks are; text encoders come there when they are needed."""
        return next(self.denoiser.parameters()).device

    @property
    def network(self) -> nn.Module:
        """See `TextToImage.network`; a reference's is the one that learns."""
        own = self.denoiser
        return own.denoiser if isinstance(own, WithoutLora) else own

    # ---------------------------------------------------------------------------------- prompts

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """See `TextToImage.encode`; each prompt is encoded once in this generator's life."""
        return self.prompts(prompts, self.device)

    def unconditional(self, batch: int) -> Tensor:
        """See `TextToImage.unconditional`."""
        return self.prompts.null(self.device).expand(batch, -1, -1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Encode all prompts, so that text encoders are not needed again; what is too long is cut as diffusers does."""
        self.prompts.learn(["", *prompts], self.device)

    # --------------------------------------------------------------------------------- sampling

    def times(self, steps: int, shift: float = 1.0) -> Tensor:
        """Return the times that the pipeline's scheduler visits, a flow's shifted by its own and by `shift`."""
        return self.schedule.times(steps, shift)

    def guided(self, scale: float) -> Denoiser:
        """See `TextToImage.guided`; FLUX's dev is told the scale, in one pass over the batch."""
        return partial(self.denoiser, guidance=scale) if self.embeds_guidance else super().guided(scale)  # fmt: skip

    def decode(self, x: Tensor) -> Tensor:
        """Return images float [B, 3, H, W] in [0, 1] of latents, by the VAE; differentiable."""
        scale, shift = latent_statistics(self.vae, x)
        images = [
            self.vae.decode(some, return_dict=False)[0]
            for some in (x / scale + shift).split(self.settings.decode_batch)
        ]
        return (0.5 * torch.cat(images) + 0.5).clamp(0, 1)

    @torch.no_grad()
    def from_images(self, images: Tensor) -> Tensor:
        """Return the latents of images, uint8 or float in [0, 1]; the mode of what the VAE's encoder says."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        latents = torch.cat(
            [
                self.vae.encode(some, return_dict=False)[0].mode()
                for some in (2 * images - 1).split(self.settings.decode_batch)
            ]
        )
        scale, shift = latent_statistics(self.vae, latents)
        return (latents - shift) * scale

    # --------------------------------------------------------------------------------- learning

    def learned(self) -> list[nn.Parameter]:
        """Return the LoRA."""
        return list(self.adapters.values())

    def as_reference(self) -> PipelineGenerator:
        """Return the pipeline without its LoRA; it shares everything."""
        return PipelineGenerator(
            self.source, self.settings, self.prompts, WithoutLora(self.denoiser), {}, self.digest
        )

    # ---------------------------------------------------------------------------------- on disk

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the LoRA alone."""
        return {name: parameter.detach() for name, parameter in self.adapters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:  # type: ignore[override]
        """Restore `state_dict`.

        Raises:
            UserError: it is of another LoRA.
        """
        given = {name: tuple(value.shape) for name, value in state.items()}
        if given != {name: tuple(value.shape) for name, value in self.adapters.items()}:
            raise UserError(
                "saved LoRA weights do not fit the pipeline; use the settings that config.json holds"
            )
        for name, parameter in self.adapters.items():
            parameter.copy_(state[name])

    def save_lora(self, folder: str | Path) -> Path:
        """Write the LoRA for `pipe.load_lora_weights(folder)` of diffusers, and return the file."""
        return save_lora(Path(folder), self.pipe, self.prompts.family.part)

    def to_tree(self) -> dict[str, Any]:
        """See `TextToImage.to_tree`: the LoRA, and where the pipeline is."""
        return {
            "pipeline": self.source,
            "settings": to_dict(self.settings),
            "digest": self.digest,
            "weights": self.state_dict(),
        }

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> PipelineGenerator:
        """Rebuild a generator, on the CPU, with the weights of the pipeline that it was made from.

        Raises:
            UserError: that is not there any more, or another one is.
        """
        generator = load_pipeline(tree["pipeline"], from_dict(PipelineSettings, tree["settings"]))
        if generator.digest != tree["digest"]:
            raise UserError(
                f"the weights of '{tree['pipeline']}' are not those that were fine-tuned; put these back"
            )
        generator.load_state_dict(tree["weights"])
        return generator


def load_pipeline(
    source: str, settings: PipelineSettings | None = None, *, seed: int = 0
) -> PipelineGenerator:
    """Return a pipeline with a new LoRA, on the CPU, frozen but for that.

    Args:
        source: folder, or name on the hub.
        settings: how to take it.
        seed: of the LoRA's first matrices.

    Raises:
        UserError: packages or files are missing, or the pipeline or a setting is of a kind that is not known.
    """
    settings = settings or PipelineSettings()
    dtype = DTYPES["fp32" if settings.precision == "auto" else settings.precision]
    pipe = open_pipeline(source, dtype)
    family = FAMILIES[type(pipe).__name__]
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    # Decoders of half precision overflow (SDXL's), or shift colors.
    pipe.vae.float()
    pixels = pipe.vae_scale_factor
    side = image_side(pipe, settings)
    tokens = (side // pixels // family.patch) ** 2
    network = getattr(pipe, family.part)
    schedule = schedule_of(pipe.scheduler.config, tokens)
    digest = weights_digest(network)
    adapters = add_lora(
        network, rank=settings.lora_rank, alpha=settings.lora_alpha,
        targets=settings.lora_targets or family.targets, seed=seed,
    )  # fmt: skip
    if dtype == torch.float16:
        for parameter in adapters.values():
            parameter.register_hook(lambda gradient: gradient / HALF_SCALE)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    denoiser = family.network(network, schedule, pixels, dtype)
    prompts = Prompts(pipe, family, settings.text_length)
    return PipelineGenerator(source, settings, prompts, denoiser, adapters, digest)


def image_side(pipe: Any, settings: PipelineSettings) -> int:
    """Return the side of a pipeline's images in pixels.

    Raises:
        UserError: the size that is asked for does not divide into its tokens.
    """
    family = FAMILIES[type(pipe).__name__]
    size = getattr(getattr(pipe, family.part).config, "sample_size", None)
    # FLUX's network takes any size, and its pipeline says which is good.
    own = (pipe.default_sample_size if size is None else size) * pipe.vae_scale_factor
    network = getattr(pipe, family.part)
    levels = len(getattr(network.config, "block_out_channels", (1,)))
    multiple = pipe.vae_scale_factor * max(family.patch, 2 ** (levels - 1))
    side = settings.image_size or own
    if side % multiple:
        raise UserError(f"image_size is {side}; this pipeline takes multiples of {multiple}")
    return side


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a VAE's latents, x0 = (latent - shift) * scale, each [1, C or 1, 1, 1]."""
    about = vae.config
    shift = like.new_tensor(about.get("latents_mean") or [about.get("shift_factor") or 0.0])
    spread = like.new_tensor(about.get("latents_std") or [1.0])
    return (about.scaling_factor / spread).view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


def weights_digest(network: nn.Module) -> int:
    """Return a checksum of the first numbers of a network's tensors: it takes no time, and tells networks apart."""
    digest = 0
    for name, value in sorted(network.state_dict().items()):
        data = value.flatten()[:64].float().cpu().numpy().tobytes()
        digest = zlib.crc32(data, zlib.crc32(f"{name}{tuple(value.shape)}".encode(), digest))
    return digest
