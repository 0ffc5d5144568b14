"""Whole diffusers pipelines of a few thousand random weights, written into folders as a download would lie there."""

from pathlib import Path

import torch

KINDS = ("sd", "sdxl", "sd3", "flux")
TOKENS = 16
"""Of CLIP's tokenizers; 77 in the real ones."""


def write_pipeline(kind: str, folder: Path, *, guided: bool = True) -> Path:
    """Write a tiny pipeline.

    Args:
        kind: of `KINDS`.
        folder: is made.
        guided: whether FLUX has an embedding of guidance (dev) or not (schnell).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3}.get(kind, lambda: _flux(guided))()
        for name in ("unet", "transformer"):
            # Layers that begin at 0 would hide what goes wrong behind them.
            for parameter in getattr(getattr(pipeline, name, None), "parameters", list)():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
    return folder


def _sd():
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip_text(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(32),
        scheduler=PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip_text(),
        text_encoder_2=_clip_text(projection=20),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(
            64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**SD_SCHEDULE),
        force_zeros_for_empty_prompt=True,
    )


def _sd3():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16,
        pooled_projection_dim=40, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift_factor=0.06),
        text_encoder=_clip_text(projection=20, hidden=20),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip_text(projection=20, hidden=20),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(40),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux(guided):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guided,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guided else 1.0, use_dynamic_shifting=guided
        ),
        vae=_vae(4, shift_factor=0.06),
        text_encoder=_clip_text(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(24),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""Of Stable Diffusion 1.5 and XL."""


def _vae(channels, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
        layers_per_block=1, sample_size=16, scaling_factor=0.5, **more,
    )  # fmt: skip


def _unet(features, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=features,
        attention_head_dim=2, **more,
    )  # fmt: skip


def _letters():
    """Return CLIP's byte pieces: every letter inside a word, and at its end."""
    signs = [chr(code) for code in range(33, 127)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *signs, *(f"{sign}</w>" for sign in signs)]
    return {piece: index for index, piece in enumerate(pieces)}


def _clip_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_letters(), merges=[], model_max_length=TOKENS)


def _clip_text(projection=None, hidden=32):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_letters()), hidden_size=hidden, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, projection_dim=projection or 32,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(features):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(_letters()) + 8, d_model=features, d_kv=8, d_ff=32, num_layers=1,
            num_heads=2, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    signs = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return T5TokenizerFast(vocab=pieces + [(sign, -2.0) for sign in signs], extra_ids=0)
