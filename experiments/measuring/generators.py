"""Speed of drawing images for a policy gradient: our sampler and a plain loop over diffusers' pipeline and scheduler.

Both have the same Stable Diffusion of random weights with the same LoRA, draw the same images from the
same noise (a test holds them together), and end with images and the log-probability of every step.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor, nn

from agents.core.errors import UserError
from agents.core.step_rules import Posterior
from agents.generative_models.chains import draw_chains
from agents.generative_models.lora import add_lora
from agents.generative_models.pipeline_generator import (
    PipelineGenerator,
    PipelineSettings,
    load_pipeline,
)
from agents.generative_models.pipeline_loading import open_pipeline
from agents.generative_models.pipeline_networks import FAMILIES
from experiments.measuring.timing import Table

PROMPTS = ("a red circle", "two blue squares", "a green cat", "a dog and a house")
GROUP = 2
"""Images of each prompt; all of them are one pass."""
STEPS, GUIDANCE = 10, 5.0
PAIRS = 11
"""Turns of each comparison: its interval is that of the median of so many ratios."""
LORA = {"rank": 4, "alpha": 4}


@dataclass(frozen=True)
class Loop:
    """How a plain loop is written.

    Attributes:
        name: of its row.
        again: whether log-probabilities are computed again before learning, from the stored chain.
        two_passes: whether guidance asks the network twice instead of once for a doubled batch.
    """

    name: str
    again: bool
    two_passes: bool


LOOPS = (
    Loop("prompts encoded for every batch, log-probabilities computed again", True, False),
    Loop("the same, guidance in two passes", True, True),
    Loop("the same as the first, log-probabilities kept as they were drawn", False, False),
)


def generators(
    seconds: float, device: str = "cpu", *, loops: Sequence[Loop] = LOOPS, pairs: int = PAIRS
) -> list[Table]:
    """Draw images in turns, ours and each loop's, and take the time of both apart.

    Raises:
        UserError: a package is missing.
    """
    for package in ("diffusers", "transformers", "peft"):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"this part needs the package {error.name}: pip install 'sightline[pipelines]'"
            ) from error
    speed = Table(
        f"Images with log-probabilities, images/s on {device}, {torch.get_num_threads()} threads",
        ["diffusers, a loop with", "ours", "loop", "ours / loop", "low", "high"],
        f"{len(PROMPTS) * GROUP} images of {len(PROMPTS)} prompts in a batch, {STEPS} steps of DDPM, guidance "
        f"{GUIDANCE:g}, a Stable Diffusion of random weights with a LoRA. Medians of {pairs} pairs, whose order "
        "alternates; low and high: 95 % interval of the median ratio.",
    )
    parts = Table(
        "Where an image's time goes, milliseconds",
        ["whose", "text encoder", "network", "VAE", "rest"],
        "Rest is the sampler's or scheduler's arithmetic, noise, and log-probabilities.",
    )
    with tempfile.TemporaryDirectory() as place:
        write_pipeline(Path(place))
        ours, theirs = Ours(place, device), Theirs(place, device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for loop in loops:
        calls = (ours.draw, partial(theirs.draw, loop))
        found = alternating(calls, seconds, pairs, wait)
        low, high = median_interval([second / first for first, second in found])
        count = len(PROMPTS) * GROUP
        rates = [count / statistics.median(times) for times in zip(*found, strict=True)]
        ratio = statistics.median(second / first for first, second in found)
        speed.rows.append([loop.name, *rates, ratio, low, high])
    parts.rows.append(["ours", *ours.profile(ours.draw, wait)])
    for loop in loops:
        profile = theirs.profile(partial(theirs.draw, loop), wait)
        parts.rows.append([loop.name, *profile])
    return [speed, parts]


def alternating(
    calls: Sequence[Callable[[], object]], seconds: float, pairs: int, wait: Callable[[], object]
) -> list[tuple[float, float]]:
    """Return seconds of two calls, turn by turn; each turn is the other way round than the one before.

    Args:
        calls: two; each is called once before the clock runs.
        seconds: about how long all of it takes.
        pairs: turns.
        wait: for the device.
    """

    def timed(index: int, repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            calls[index]()
        wait()
        return (time.perf_counter() - start) / repeats

    both = sum(timed(index, 1) for index in (0, 1))
    repeats = max(1, round(seconds / pairs / both))
    found = []
    for turn in range(pairs):
        times = {index: timed(index, repeats) for index in ((0, 1) if turn % 2 == 0 else (1, 0))}
        found.append((times[0], times[1]))
    return found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, by the sign test: of 11 values the second and the second last.

    Of fewer than 6 it is all of them, which is less.
    """
    ordered = sorted(values)
    place = max(0, int(binom.ppf(0.025, len(ordered), 0.5)) - 1)
    return ordered[place], ordered[-1 - place]


class Timed:
    """Knows how long parts of a pipeline took.

    Args:
        pipe: of diffusers.
    """

    def __init__(self, pipe: Any) -> None:
        self.seconds = dict.fromkeys(("text_encoder", "unet", "vae"), 0.0)
        self._began = 0.0
        self._wait: Callable[[], object] = lambda: None
        for name in ("text_encoder", "unet"):
            module: nn.Module = getattr(pipe, name)
            module.register_forward_pre_hook(lambda *_: self._begin())
            module.register_forward_hook(lambda *_, name=name: self._end(name))
        decode = pipe.vae.decode

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._begin()
            result = decode(*arguments, **keywords)
            self._end("vae")
            return result

        pipe.vae.decode = timed

    def profile(self, call: Callable[[], object], wait: Callable[[], object]) -> list[float]:
        """Return milliseconds of an image in each part, and in the rest, of the fastest of three calls."""
        best: list[float] = [math.inf]
        for _ in range(3):
            self.seconds = dict.fromkeys(self.seconds, 0.0)
            self._wait = wait
            wait()
            start = time.perf_counter()
            call()
            wait()
            whole = time.perf_counter() - start
            found = [*self.seconds.values(), whole - sum(self.seconds.values())]
            best = found if whole < sum(best) else best
        self._wait = lambda: None
        return [1000 * part / (len(PROMPTS) * GROUP) for part in best]

    def _begin(self) -> None:
        self._wait()
        self._began = time.perf_counter()

    def _end(self, name: str) -> None:
        self._wait()
        self.seconds[name] += time.perf_counter() - self._began


class Ours(Timed):
    """Our sampler, as a tuner draws with it."""

    def __init__(self, folder: str, device: str) -> None:
        settings = PipelineSettings(
            lora_rank=LORA["rank"], lora_alpha=LORA["alpha"], decode_batch=len(PROMPTS) * GROUP
        )
        self.generator: PipelineGenerator = load_pipeline(folder, settings).to(device)
        self.noise = torch.Generator(device).manual_seed(0)
        # The step to the data draws nothing, as in their DDPM.
        self.sampler = self.generator.sampler(STEPS, Posterior(1.0))
        super().__init__(self.generator.pipe)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, H, W] and log-probabilities of their steps [S, B]."""
        model = self.generator
        (batch,) = draw_chains(
            self.sampler, model.guided(GUIDANCE), model.decode, PROMPTS, model.encode(PROMPTS),
            model.shape, self.noise, group=GROUP, batch_size=len(PROMPTS) * GROUP,
        )  # fmt: skip
        return batch.images, torch.stack(list(batch.log_prob.values()))


class Theirs(Timed):
    """A loop over the pipeline's parts as the fine-tuning scripts of diffusers' users are written."""

    def __init__(self, folder: str, device: str) -> None:
        from diffusers import DDIMScheduler

        self.pipe = open_pipeline(folder, torch.float32).to(device)
        self.pipe.scheduler = DDIMScheduler.from_config(
            self.pipe.scheduler.config, set_alpha_to_one=True, clip_sample=False
        )
        targets = FAMILIES["StableDiffusionPipeline"].targets
        add_lora(self.pipe.unet, targets=targets, seed=0, **LORA)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        self.noise = torch.Generator(device).manual_seed(0)
        super().__init__(self.pipe)

    @torch.no_grad()
    def draw(self, loop: Loop) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, H, W] and log-probabilities of their steps [S, B]."""
        pipe = self.pipe
        prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
        embeds, empty = pipe.encode_prompt(prompts, pipe.device, 1, True)
        scheduler = pipe.scheduler
        scheduler.set_timesteps(STEPS, device=pipe.device)
        side = pipe.unet.config.sample_size
        shape = (len(prompts), pipe.unet.config.in_channels, side, side)
        x = torch.randn(shape, generator=self.noise, device=pipe.device)
        chain, log_probs = [x], []
        for place, t in enumerate(scheduler.timesteps):
            mean, std = self._step(x, t, embeds, empty, loop)
            x = mean
            if place < STEPS - 1:
                x = mean + std * torch.randn(shape, generator=self.noise, device=pipe.device)
                log_probs.append(_log_prob(x, mean, std))
            chain.append(x)
        images = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0]
        if loop.again:
            log_probs = []
            for place, t in enumerate(scheduler.timesteps[:-1]):
                mean, std = self._step(chain[place], t, embeds, empty, loop)
                log_probs.append(_log_prob(chain[place + 1], mean, std))
        return (images / 2 + 0.5).clamp(0, 1), torch.stack(log_probs)

    def _step(
        self, x: Tensor, t: Tensor, embeds: Tensor, empty: Tensor, loop: Loop
    ) -> tuple[Tensor, Tensor]:
        """Return mean and std of DDPM's step, by the scheduler."""
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        if loop.two_passes:
            without = unet(x, t, encoder_hidden_states=empty, return_dict=False)[0]
            conditional = unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0]
        else:
            both = unet(
                torch.cat([x, x]), t, encoder_hidden_states=torch.cat([empty, embeds]),
                return_dict=False,
            )[0]  # fmt: skip
            without, conditional = both.chunk(2)
        said = without + GUIDANCE * (conditional - without)
        mean = scheduler.step(said, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        before = t - scheduler.config.num_train_timesteps // STEPS
        return mean, scheduler._get_variance(t, before).sqrt()


def _log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the mean log-density of each sample, [B]."""
    normal = torch.distributions.Normal(mean, std)
    return normal.log_prob(x).flatten(1).mean(1)


@dataclass(frozen=True)
class PipelineSizes:
    """What is large or small in a Stable Diffusion; its text encoder has two layers, and is asked once a prompt.

    Attributes:
        latents: side of an image in latents.
        unet: channels by resolution; all but the last have cross-attention.
        layers: residual blocks of a resolution, in the VAE too.
        groups: of the normalizations.
        heads: of attention at each resolution.
        text: width of a word's features.
        text_heads: of the text encoder.
        vae: channels by resolution; each halves the image but the last.
        dtype: that weights are written in.
    """

    latents: int
    unet: tuple[int, ...]
    layers: int
    groups: int
    heads: int
    text: int
    text_heads: int
    vae: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def unet_settings(self) -> dict[str, Any]:
        """Return what diffusers' UNet2DConditionModel is built with."""
        below = len(self.unet) - 1
        return {
            "sample_size": self.latents,
            "block_out_channels": self.unet,
            "layers_per_block": self.layers,
            "norm_num_groups": self.groups,
            "down_block_types": ("CrossAttnDownBlock2D",) * below + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * below,
            "cross_attention_dim": self.text,
            "attention_head_dim": self.heads,
        }


SMALL_PIPELINE = PipelineSizes(
    latents=8, unet=(32, 64), layers=1, groups=8, heads=4, text=64, text_heads=4, vae=(16, 16)
)


def write_pipeline(folder: Path, sizes: PipelineSizes = SMALL_PIPELINE) -> None:
    """Write a Stable Diffusion of random weights, which reads letters."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    signs = [chr(code) for code in range(33, 127)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *signs, *(f"{sign}</w>" for sign in signs)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    levels = len(sizes.vae)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline: Any = StableDiffusionPipeline(
            vae=AutoencoderKL(
                block_out_channels=sizes.vae, down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4,
                norm_num_groups=sizes.groups, layers_per_block=sizes.layers,
                sample_size=sizes.latents * 2 ** (levels - 1),
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(pieces), hidden_size=sizes.text, intermediate_size=4 * sizes.text,
                    num_hidden_layers=2, num_attention_heads=sizes.text_heads,
                    max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                )
            ),
            tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
            unet=UNet2DConditionModel(**sizes.unet_settings()),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                steps_offset=1, clip_sample=False,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.to(sizes.dtype).save_pretrained(folder)
