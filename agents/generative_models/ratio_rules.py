"""How log-ratios of an image's denoising steps become comparable: with the image's size, and between steps.

**Size.** An image has d numbers, a step's log-ratio is their sum or their mean. When the mean of every number moves
by delta (in spreads of the step's noise), the mean's log-ratio is noise of size delta / sqrt(d), the sum's delta *
sqrt(d). A clip that was tuned at one size therefore means something else at another: DDPO's 1e-4 at d = 16,384 stops
all learning at d = 48. Here a clip is given **free of size**, as delta: `clip_bounds` turns it into bounds of the
ratio.

| published clip of the mean's ratio | at d | free of size |
| --- | --- | --- |
| DDPO, DPOK 1e-4 | 4 * 64 * 64 = 16,384 (Stable Diffusion 1.5, 512 px) | .0128 |
| Flow-GRPO 1e-4 | 16 * 64 * 64 = 65,536 (SD3.5, 512 px) | .0256 |
| GRPO-Guard 4e-6 | 65,536 | .00102, of normalized ratios |
| DanceGRPO, MixGRPO 1e-4 | 16 * 90 * 90 = 129,600 (FLUX, 720 px) | .036 |

**Steps.** With m the shift of a step's mean and eps the noise that was drawn, a log-ratio is
mean(eps * m / std - m^2 / (2 * std^2)): its mean is negative, and its spread depends on the step's std.
`normalized_log_ratio` is GRPO-Guard's (Wang et al. 2025, arXiv:2510.22319), whose mean is 0 and whose spread is the
shift's alone; `step_weights` then makes gradients of all steps as large.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agents.core.chain_steps import Step, reduce_log_prob
from agents.core.sampling import Sampler

LARGEST_POWER = 88.0
"""Log-ratio whose exponential float32 still holds."""

Reduction = Literal["mean", "sum"]
StepWeight = Literal["none", "gain", "noise"]


class ClipBounds(NamedTuple):
    """How far a ratio may go below and above 1."""

    low: float
    high: float


def clip_bounds(width: float, dimension: int, how: Reduction) -> ClipBounds:
    """Return the bounds of a ratio for a clip that is free of size; see the module.

    Whether a step is clipped does not depend on `how`: the sum's ratio is the d-th power of the mean's.

    Args:
        width: largest |ratio - 1| of the mean's ratio, times sqrt(dimension).
        dimension: d, numbers of an image (or of its latents).
        how: whether log-probabilities are means or sums over them.
    """
    each = width / math.sqrt(dimension)
    if how == "mean":
        return ClipBounds(each, each)
    # A clip may be as wide as to bound nothing: below, a ratio ends at 0; above, powers leave the floats.
    low = 1.0 if each >= 1 else -math.expm1(dimension * math.log1p(-each))
    power = dimension * math.log1p(each)
    return ClipBounds(low, math.expm1(power) if power < LARGEST_POWER else math.inf)


def normalized_log_ratio(log_ratio: Tensor, step: Step, old_mean: Tensor, how: Reduction) -> Tensor:
    """Return GRPO-Guard's log-ratio [B]: std * (log-ratio + KL of the step), which is mean(eps * shift).

    Args:
        log_ratio: [B].
        step: as it is now.
        old_mean: of the step that drew, [B, ...].
        how: see `clip_bounds`; the KL is reduced like the log-ratio, sample by sample.
    """
    return step.std * (log_ratio + reduce_log_prob(step.kl(old_mean), how))


def prediction_gains(sampler: Sampler) -> list[float]:
    """Return for each step how far its mean moves when the network's prediction moves by 1."""
    x = torch.zeros(1, 1, dtype=torch.float64)

    def mean(index: int, said: float) -> float:
        return float(sampler.step(lambda x, t, condition: torch.full_like(x, said), x, index).mean)

    return [abs(mean(index, 1.0) - mean(index, 0.0)) for index in range(sampler.steps)]


def step_weights(how: StepWeight, sampler: Sampler) -> dict[int, float]:
    """Return the weight of each stochastic step's loss by its index, of mean 1.

    Args:
        how: `none`; `gain`, by 1 / how far a prediction moves the mean (GRPO-Guard's 1 / dt, or beta / dt for the Dance
            SDE, with the factor that Flow-SDE has there, too); `noise`, by the step's std, since steps of more noise
            explore more (TempFlow-GRPO, He et al. 2025, arXiv:2508.04324).
        sampler: whose steps.
    """
    chosen = sampler.stochastic
    if how == "none" or not chosen:
        return dict.fromkeys(chosen, 1.0)
    if how == "gain":
        gains = prediction_gains(sampler)
        raw = {index: 1 / gains[index] for index in chosen}
    else:
        x = torch.zeros(1, 1, dtype=torch.float64)
        raw = {
            index: float(sampler.step(lambda x, t, condition: x, x, index).std) for index in chosen
        }
    mean = sum(raw.values()) / len(raw)
    return {index: value / mean for index, value in raw.items()}
