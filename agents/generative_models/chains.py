"""Images drawn with a record of how: what fine-tuning by denoising steps learns from.

Images of an iteration are drawn in passes of `batch_size`, and each pass stays together as a `ChainBatch`: the loss
sees the same images in the same order as the pass that drew them. Then its log-probabilities are those of the drawing
bit for bit, and ratios start at exactly 1; nothing is computed again to get the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.core.chain_steps import reduce_log_prob, standard_normal
from agents.core.sampling import Denoiser, Sampler
from agents.core.step_rules import CPS, DanceSDE, FlowSDE, Posterior, StepRule, excess_noise
from agents.generative_models.ratio_rules import Reduction
from agents.generative_models.tuning_config import Noise, TuningConfig

STILL = Posterior(0.0)
"""The deterministic step: DDIM's, on a flow Euler's."""

NOISES: dict[Noise, Callable[[float], StepRule]] = {
    "flow_sde": FlowSDE,
    "dance_sde": DanceSDE,
    "posterior": Posterior,
    "cps": lambda level: CPS(level, true_log_prob=True),
}


@dataclass(frozen=True)
class ChainBatch:
    """Images of one pass.

    Attributes:
        prompts: B of them.
        condition: encoded, [B, L, F].
        group: int64 [B]: images of one prompt have one number, in the whole iteration.
        samples: [S + 1, B, C, H, W]: the noise, and what each step drew.
        log_prob: of each stochastic step by its index, [B], reduced; as it was drawn.
        mean: of what was drawn there, [B, C, H, W]; empty unless it is asked for.
        images: [B, 3, H, W] in [0, 1].
    """

    prompts: tuple[str, ...]
    condition: Tensor
    group: Tensor
    samples: Tensor
    log_prob: dict[int, Tensor]
    mean: dict[int, Tensor]
    images: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


def step_rules(config: TuningConfig, window_start: int = 0) -> list[StepRule]:
    """Return the rule of every step: noise in the window (or everywhere), none elsewhere nor in the last step."""
    assert config.noise_level is not None  # see `TuningConfig.on_path`
    noisy = NOISES[config.noise](config.noise_level)
    last = config.denoising_steps - 1
    width = config.window or last
    stochastic = range(window_start, min(window_start + width, last))
    return [noisy if index in stochastic else STILL for index in range(config.denoising_steps)]


def window_starts(config: TuningConfig) -> int:
    """Return how many places a window has; the step to the data is not one of its steps."""
    return max(config.denoising_steps - config.window, 1) if config.window else 1


def window_start(config: TuningConfig, iteration: int, draws: torch.Generator) -> int:
    """Return the window's first step in an iteration."""
    places = window_starts(config)
    if not config.window:
        return 0
    if config.window_moves == "random":
        return int(torch.randint(places, (1,), generator=draws, device=draws.device))
    return iteration // config.window_every % places


def largest_excess(sampler: Sampler) -> float:
    """Return the largest noise in a sample over what the network expects there, after one of its stochastic steps."""
    found = [
        excess_noise(sampler.rules[index], sampler.points[index : index + 2])
        for index in sampler.stochastic
    ]
    return max((excess for each in found for excess in each), default=1.0)


def draw_chains(
    sampler: Sampler,
    denoiser: Denoiser,
    decode: Callable[[Tensor], Tensor],
    prompts: Sequence[str],
    condition: Tensor,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    group: int,
    batch_size: int,
    shared_noise: bool = False,
    how: Reduction = "mean",
    keep_mean: bool = False,
) -> list[ChainBatch]:
    """Draw `group` images of each prompt, with their chains; without gradient.

    Args:
        sampler: of the chains.
        denoiser: with its guidance.
        decode: denoised samples to images.
        prompts: P of them.
        condition: encoded, [P, L, F].
        shape: of a sample, (C, H, W).
        generator: of noise, on the condition's device.
        group: images of each prompt.
        batch_size: images in a pass, at most.
        shared_noise: images of a prompt begin with the same noise.
        how: to reduce log-probabilities.
        keep_mean: keep the steps' means.
    """
    device = condition.device
    number = torch.arange(len(prompts), device=device).repeat_interleave(group)
    batches = []
    with torch.no_grad():
        if shared_noise:
            start = standard_normal((len(prompts), *shape), generator, device=device)[number]
        else:
            start = standard_normal((len(number), *shape), generator, device=device)
        for first in range(0, len(number), batch_size):
            place = number[first : first + batch_size]
            chain = sampler.chain(
                denoiser, start[first : first + batch_size], condition[place], generator
            )
            logs = zip(chain.stochastic, chain.log_prob, strict=True)
            means = zip(chain.stochastic, chain.mean if keep_mean else (), strict=keep_mean)
            batches.append(
                ChainBatch(
                    prompts=tuple(prompts[index] for index in place.tolist()),
                    condition=condition[place],
                    group=place,
                    samples=chain.samples,
                    log_prob={index: reduce_log_prob(each, how) for index, each in logs},
                    mean=dict(means),
                    images=decode(chain.data),
                )
            )
    return batches
