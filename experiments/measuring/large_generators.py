"""Speed and memory of training large image generators on a GPU, as they are and compiled.

A DiT of the size of `pretrain_generator --preset gpu-64` is pretrained and fine-tuned, and a LoRA of a Stable Diffusion
1.5 learns; both have random weights, and a reward that costs nothing. Each has the device's memory for itself: what is
compared runs one after the other, unlike in the other tables.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from agents.core.precision import resolve_precision
from agents.generative_models.drawings import DrawingSettings
from agents.generative_models.generator import GeneratorConfig, ImageGenerator
from agents.generative_models.methods import METHODS
from agents.generative_models.pipeline_generator import PipelineSettings, load_pipeline
from agents.generative_models.pretraining import PictureBatch, Pretrainer, PretrainingConfig
from agents.generative_models.rewards import make_reward
from agents.generative_models.text_to_image import TextToImage
from agents.generative_models.tuners import make_tuner
from experiments.generators.finetuning_configs import PRESETS as FINE_TUNING
from experiments.generators.pretraining import vocabulary_of
from experiments.measuring.generators import PipelineSizes, write_pipeline
from experiments.measuring.timing import Cell, Table
from experiments.pretrain_generator import PRESETS as PRETRAINING
from experiments.running.arguments import fill

Build = Callable[[bool], Callable[[], object]]
"""Whether compiled -> what trains on some images."""

PRESET = "gpu-64"
SHOWN = ("flow-grpo", "ddpo", "alignprop")
COLUMNS = (
    "training", "eager, images/s", "compiled, images/s", "compiled / eager", "eager, GiB",
    "compiled, GiB", "seconds to compile",
)  # fmt: skip
REWARD = "brightness"
SECONDS = 10.0
"""Least that a number on a GPU is measured for, and at least two iterations."""


@dataclass(frozen=True)
class Case:
    """How much is trained.

    Attributes:
        generator: the DiT.
        pictures: a batch of its pretraining.
        pipeline: the Stable Diffusion.
        lora: how it is taken.
        tuning: settings of an iteration on the DiT.
        lora_tuning: those of one on the LoRA.
    """

    generator: GeneratorConfig
    pictures: int
    pipeline: PipelineSizes
    lora: PipelineSettings
    tuning: Mapping[str, Any]
    lora_tuning: Mapping[str, Any]


STABLE_DIFFUSION = PipelineSizes(
    latents=64, unet=(320, 640, 1280, 1280), layers=2, groups=32, heads=8, text=768, text_heads=12,
    vae=(128, 256, 512, 512), dtype=torch.bfloat16,
)  # fmt: skip
"""Stable Diffusion 1.5 at 512 pixels but for its text encoder: 860 million parameters denoise."""

LARGE = Case(
    generator=fill(GeneratorConfig(), PRETRAINING[PRESET]),
    pictures=PRETRAINING[PRESET]["batch_size"],
    pipeline=STABLE_DIFFUSION,
    lora=PipelineSettings(precision="bf16"),
    # Images of two passes, of the preset's size: more of them take longer, and no more memory.
    tuning={"prompts": 8, "group": 16, "batch_size": FINE_TUNING[PRESET]["batch_size"]},
    lora_tuning={"prompts": 4, "group": 4, "batch_size": 8, "denoising_steps": 10},
)


def large_generators(
    seconds: float,
    device: str = "cpu",
    *,
    case: Case = LARGE,
    methods: Sequence[str] = SHOWN,
    anywhere: bool = False,
) -> list[Table]:
    """Measure training on a GPU.

    Args:
        seconds: for each number, at least `SECONDS`.
        device: where.
        case: how much is trained.
        methods: that fine-tune the DiT.
        anywhere: on other devices than CUDA's, too, where nothing is known of memory.
    """
    if not (device.startswith("cuda") or anywhere):
        note = (
            f"Left out on {device}: a DiT of {PRESET} and a Stable Diffusion 1.5 are trained where there is a GPU "
            "(--device cuda)."
        )
        return [Table("Training of large generators", COLUMNS, note)]
    seconds = seconds if anywhere else max(seconds, SECONDS)
    precision = "fp32" if anywhere else resolve_precision("auto", torch.device(device))
    return [
        dit_table(seconds, device, case, methods, precision),
        lora_table(seconds, device, case),
    ]


def dit_table(
    seconds: float, device: str, case: Case, methods: Sequence[str], precision: Any
) -> Table:
    """Measure pretraining of a DiT, and methods that fine-tune it."""
    about = case.generator
    vocabulary = vocabulary_of(DrawingSettings(size=about.size))

    def model() -> ImageGenerator:
        torch.manual_seed(0)
        return ImageGenerator(about, vocabulary).to(device)

    def pretraining(compiled: bool) -> Callable[[], object]:
        settings = PretrainingConfig(batch_size=case.pictures, bf16=precision == "bf16")
        learner = Pretrainer(model(), settings, seed=0)
        if compiled:
            learner.compile()
        draws = torch.Generator(device).manual_seed(0)
        shape = (case.pictures, 3, about.size, about.size)
        images = torch.randint(256, shape, generator=draws, device=device, dtype=torch.uint8)
        tokens = vocabulary.tokens(["a red circle"] * case.pictures).to(device)
        return lambda: learner.update(PictureBatch(images, tokens))

    parameters = sum(p.numel() for p in _without_weights(about, vocabulary).parameters())
    table = Table(
        f"A DiT of {parameters / 1e6:.0f} million parameters, {about.size} x {about.size} pixels, {precision}, "
        f"{device}",
        COLUMNS,
        f"Random weights. Pretraining: {case.pictures} images a step. Fine-tuning: whole iterations (images drawn, "
        f"rewarded by {REWARD}, learned from) of {case.tuning['batch_size']} images in a pass at most, each method "
        "with its own number of steps. GiB: the most that tensors took. Compiling takes that long where the user's "
        "cache has nothing of it yet.",
    )
    table.rows.append(["pretraining", *compared(pretraining, case.pictures, seconds, device)])
    for name in methods:
        build, images = fine_tuning(
            name, lambda: model().compute_in(precision), case.tuning, device
        )
        table.rows.append([name, *compared(build, images, seconds, device)])
    return table


def lora_table(seconds: float, device: str, case: Case) -> Table:
    """Measure DDPO on a LoRA of a Stable Diffusion, with and without its activations kept."""
    settings = case.lora
    side = case.pipeline.latents * 2 ** (len(case.pipeline.vae) - 1)
    table = Table(
        f"A LoRA of a Stable Diffusion, {side} x {side} pixels, {settings.precision}, {device}",
        COLUMNS,
        f"Random weights of the size of Stable Diffusion 1.5, a LoRA of rank {settings.lora_rank}, DDPO in "
        f"{case.lora_tuning['denoising_steps']} steps with guidance, {case.lora_tuning['batch_size']} images in a "
        "pass.",
    )
    with tempfile.TemporaryDirectory() as place:
        write_pipeline(Path(place), case.pipeline)
        for label, checkpointing in (("ddpo", False), ("ddpo, gradient checkpointing", True)):
            how = replace(settings, gradient_checkpointing=checkpointing)

            def model(how: PipelineSettings = how) -> TextToImage:
                return load_pipeline(place, how).to(device)

            build, images = fine_tuning("ddpo", model, case.lora_tuning, device)
            table.rows.append([label, *compared(build, images, seconds, device)])
    return table


def fine_tuning(
    method: str, model: Callable[[], TextToImage], settings: Mapping[str, Any], device: str
) -> tuple[Build, int]:
    """Return what builds an iteration of a method, and the images of one."""
    own = METHODS[method].settings
    images = settings["prompts"] * settings["group"]
    if own.get("group") == 1:  # it compares nothing, and has as many images of different prompts
        settings = {**settings, "prompts": images, "group": 1}
    config = fill(METHODS[method].config(), settings)
    prompts = ["a red circle"] * config.prompts

    def build(compiled: bool) -> Callable[[], object]:
        tuner = make_tuner(model(), make_reward(REWARD), config, device=device)
        if compiled:
            tuner.compile()
        return lambda: tuner.update(prompts)

    return build, images


def compared(build: Build, images: int, seconds: float, device: str) -> list[Cell]:
    """Return the cells of a row behind its name."""
    eager, compiled = (measured(build, kind, images, seconds, device) for kind in (False, True))
    return [
        eager.rate, compiled.rate, compiled.rate / eager.rate, _known(eager.memory),
        _known(compiled.memory), max(0.0, compiled.first - images / compiled.rate),
    ]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What one way to train is like.

    Attributes:
        rate: images per second.
        memory: the most GiB that tensors took after the first call; not a number where it is not known.
        first: seconds of the first call.
    """

    rate: float
    memory: float
    first: float


def measured(build: Build, compiled: bool, images: int, seconds: float, device: str) -> Measured:
    """Measure what `build` builds, with the device's memory for itself."""
    is_cuda = device.startswith("cuda")
    torch._dynamo.reset()  # programs of what was measured before, which count against a limit
    call = build(compiled)

    first = _seconds(call, device)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        times.append(_seconds(call, device))
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if is_cuda else math.nan
    del call
    gc.collect()  # networks know what computes their passes, and that knows them
    if is_cuda:
        torch.cuda.empty_cache()
    return Measured(images / statistics.median(times), memory, first)


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _known(memory: float) -> Cell:
    return "unknown" if math.isnan(memory) else memory


def _without_weights(about: GeneratorConfig, vocabulary: Any) -> ImageGenerator:
    with torch.device("meta"):
        return ImageGenerator(about, vocabulary)
