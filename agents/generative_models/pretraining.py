"""Pretraining an image generator on pictures with prompts: denoising at random times, and an average that is kept.

The recipe is the usual one (AdamW, warm-up, gradient clipping, an exponential moving average of the parameters that is
what generates). **Difference from most image generators:** the text encoder learns along, as there is no pretrained one
for a vocabulary of thirty words.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.core.agent import Learner
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.logging import Logger
from agents.core.memory import memory_errors_named
from agents.core.parameter_averages import ParameterAverage
from agents.core.run_loop import Hooks, LoopSettings, RunLoop
from agents.generative_models.drawings import Drawings
from agents.generative_models.forward_passes import forward_pass
from agents.generative_models.generator import PART, ImageGenerator

LESS_MEMORY = (
    "lower --batch-size first, then --width, --depth or --size, in a new run; --eval-prompts helps evaluations, and "
    "--pictures where all of them lie on a GPU"
)
"""What to do where memory does not suffice; checkpoints are kept."""


@dataclass(frozen=True)
class PretrainingConfig:
    """How a generator learns from pictures."""

    batch_size: int = 64
    """Pictures a gradient step."""
    learning_rate: float = 1e-3
    """AdamW's, after the warm-up."""
    weight_decay: float = 0.01
    """AdamW's (torch's default)."""
    warmup: int = 100
    """Gradient steps over which the learning rate rises from 0."""
    decay: float = 0.0
    """Share of the run, at its end, over which the learning rate falls to 0 in a straight line (Hägele et al. 2024,
    arXiv:2405.18392: .2 is enough; short runs gain the most); 0 keeps it."""
    noisy_steps: int = 0
    """First gradient steps that only see times near the noise (`text_to_image.NEAR_NOISE`), where it is decided what is
    where. A network that has learned to look for it in clearer pictures first learns it from the prompt no more
    (experiments/results/generators)."""
    noisy_share: float = 0.0
    """Share of the times after these steps that lie there, beside those of the generator's own distribution."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    average_decay: float = 0.998
    """Of the parameters' average: it spans the last 500 steps."""
    bf16: bool = False
    """Compute in bfloat16 (on GPUs; on CPUs with bfloat16 instructions a step takes a tenth to a fifth less time)."""

    def __post_init__(self) -> None:
        """Reject values that nothing learns with."""
        if self.batch_size < 1 or self.learning_rate <= 0:
            raise UserError(
                f"batch_size is {self.batch_size} and learning_rate {self.learning_rate}; give positive numbers"
            )
        for name in ("weight_decay", "warmup", "noisy_steps", "gradient_clip"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not 0 <= self.decay <= 1:
            raise UserError(f"decay is {self.decay}; give a share of the run in [0, 1]")
        if not 0 <= self.noisy_share <= 1:
            raise UserError(f"noisy_share is {self.noisy_share}; give a share in [0, 1]")


@dataclass(frozen=True)
class PretrainingSettings(LoopSettings):
    """How long and how often, and what evaluations are made of."""

    steps: int = 20_000
    """Gradient steps in all; with --resume, the new total."""
    log_every: int = 500
    """Gradient steps between lines of metrics; metrics stay on the device between."""
    eval_every: int = 5_000
    """Gradient steps between evaluations; 0 for none."""
    eval_prompts: int = 128
    """Prompts per evaluation of combinations that were learned, and as many of those held out."""
    eval_steps: int = 20
    """Denoising steps of an evaluation's pictures (deterministic ones)."""
    guidance: float = 3.0
    """Scale of classifier-free guidance in evaluations; 1 is none."""
    checkpoint_every: int = 5_000
    """Gradient steps between checkpoints (one is always saved at the end)."""

    def __post_init__(self) -> None:
        """Reject values that no loop can run with."""
        super().__post_init__()
        for name in ("eval_prompts", "eval_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")


class PictureBatch(NamedTuple):
    """Pictures with the tokens of their prompts."""

    images: Tensor
    """uint8 [B, 3, S, S]."""
    tokens: Tensor
    """int64 [B, L]."""


class PictureStream:
    """Draws random batches of pictures.

    Args:
        drawings: where from.
        tokens: of every prompt of `drawings`, [P, L].
        seed: of the choice.
        device: where pictures are kept and batches come out.
    """

    def __init__(
        self, drawings: Drawings, tokens: Tensor, *, seed: int, device: torch.device | str
    ) -> None:
        self.images = torch.from_numpy(drawings.images).to(device)
        self.tokens = tokens[torch.from_numpy(drawings.prompt)].to(device)
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> PictureBatch:
        """Return the first pictures (all over again where there are fewer), without drawing."""
        rows = torch.arange(count, device=self.images.device) % len(self)
        return PictureBatch(self.images[rows], self.tokens[rows])

    def sample(self, count: int) -> PictureBatch:
        """Return random pictures."""
        rows = torch.from_numpy(self.rng.integers(len(self), size=count)).to(self.images.device)
        return PictureBatch(self.images[rows], self.tokens[rows])


class Pretrainer(Learner):
    """Teaches a generator to denoise pictures.

    Args:
        image_generator: it learns.
        config: how.
        seed: of the noise.
        steps: of the whole run, at whose end the learning rate falls.
    """

    def __init__(
        self,
        image_generator: ImageGenerator,
        config: PretrainingConfig,
        *,
        seed: int,
        steps: int | None = None,
    ) -> None:
        self.config, self.steps = config, steps
        self.image_generator = image_generator
        self.average = ParameterAverage(image_generator, decay=config.average_decay)
        self.device = device = image_generator.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.noisy_share = 1.0 if config.noisy_steps else config.noisy_share
        self.optimizer = torch.optim.AdamW(
            image_generator.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def compile(self, *, backend: str | None = None, fall_back: bool = False) -> None:
        """Compile the denoiser's pass over a batch; see `forward_passes`.

        Evaluations draw with the average, which stays as it is: they are rare, and it would be compiled anew for them.

        Args:
            backend: of `torch.compile`.
            fall_back: go on without compiling, after a warning, where it fails.
        """
        forward_pass(self.image_generator.denoiser).compile(
            {self.config.batch_size}, backend=backend, fall_back=fall_back
        )

    def update(self, batch: PictureBatch) -> dict[str, Tensor]:
        """Take a gradient step."""
        learner, config = self.image_generator, self.config
        device = batch.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16), self._attention(device):
            condition = learner.text(batch.tokens)
            x0 = learner.from_images(batch.images)
            losses = learner.loss(x0, condition, self.generator, noisy_share=self.noisy_share)
            loss = losses.mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learner.parameters(), config.gradient_clip or float("inf"))
        self.optimizer.step()
        self.average.update(learner)
        return {"loss/denoising": loss.detach(), "gradient/norm": norm.detach()}

    def _attention(self, device: str) -> AbstractContextManager[Any]:
        """Return what chooses how attention is computed.

        On CPUs in bfloat16, the backward pass of torch's fused attention takes 23 ms for 32 times 21 tokens, a fifth of
        the whole step; as plain products it does not show (torch 2.13, one core).
        """
        plain = self.config.bf16 and device == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def set_progress(self, agent_steps: int) -> None:
        """Set the learning rate of the step that follows, and how many of its times are near the noise."""
        config = self.config
        self.noisy_share = 1.0 if agent_steps < config.noisy_steps else config.noisy_share
        share = min(1.0, (agent_steps + 1) / max(config.warmup, 1))
        if self.steps is not None and config.decay:
            share *= min(1.0, (self.steps - agent_steps) / (config.decay * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * share

    def networks(self) -> dict[str, nn.Module]:
        """See `Learner`."""
        return {"generator": self.image_generator, "average": self.average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Learner`."""
        return {"optimizer": self.optimizer}


class PretrainingLoop(RunLoop):
    """Takes gradient steps; `Progress.agent_steps` counts them too.

    Checkpoints hold the averaged generator as a part of its own, which `generator.load_generator` takes.

    Args:
        learner: a pretrainer.
        stream: of pictures.
        settings: how long and how often.
        logger: where numbers go.
        checkpoints: where checkpoints go.
        hooks: evaluation and stopping.
    """

    unit = "gradient step"
    remedy = "lower --learning-rate"
    agent: Pretrainer

    def __init__(
        self,
        learner: Pretrainer,
        stream: PictureStream,
        settings: LoopSettings,
        *,
        logger: Logger,
        checkpoints: CheckpointStore,
        hooks: Hooks | None = None,
    ) -> None:
        super().__init__(learner, settings, logger=logger, checkpoints=checkpoints, hooks=hooks)
        self.stream = stream
        self._seconds = 0.0

    def start(self) -> None:
        """See `RunLoop.start`; there is nothing to prepare."""

    def own_parts(self, *, environments: bool) -> dict[str, Any]:
        """See `RunLoop.own_parts`."""
        return {
            "pictures": self.stream.rng.bit_generator.state,
            PART: self.agent.average.module.to_tree(),
        }

    def set_own_parts(self, parts: Mapping[str, Any]) -> None:
        """See `RunLoop.set_own_parts`."""
        self.stream.rng.bit_generator.state = parts["pictures"]

    def _step(self) -> None:
        progress = self.state.progress
        self.agent.set_progress(progress.agent_steps)
        clock = time.perf_counter()
        batch = self.stream.sample(self.agent.config.batch_size)
        with memory_errors_named(LESS_MEMORY):
            self.metrics.append(self.agent.update(batch))
        self._seconds += time.perf_counter() - clock
        progress.gradient_updates += 1
        progress.agent_steps += 1

    def numbers(self, seconds: float, steps: int) -> dict[str, float]:
        """See `RunLoop.numbers`."""
        seen = self.state.progress.gradient_updates * self.agent.config.batch_size
        values = {
            "time/steps_per_second": steps / seconds,
            "time/update_ms": 1000 * self._seconds / steps,
            "data/epochs": seen / len(self.stream),
        }
        self._seconds = 0.0
        return values

    def postfix(self, values: Mapping[str, float]) -> str:
        """See `RunLoop.postfix`."""
        return f"loss {values['loss/denoising']:.4f}"

    def line(self, values: Mapping[str, float], minutes_left: float) -> str:
        """See `RunLoop.line`."""
        return (
            f"step {self.state.progress.agent_steps:>8,}  {self.postfix(values)}  "
            f"{values['time/steps_per_second']:6.1f} steps/s  {minutes_left:5.1f} min left"
        )

    def evaluation_line(self, values: Mapping[str, float]) -> str:
        """See `RunLoop.evaluation_line`."""
        return "  ".join(f"{name.removeprefix('eval/')} {v:.3f}" for name, v in values.items())
