"""The path, the prediction and the times of a diffusers pipeline, from the config of its scheduler.

The scheduler itself is not run: `agents.core.sampling` takes its place, with log-probabilities.

**Differences from diffusers**: a chain ends at the data itself (Stable Diffusion's `set_alpha_to_one` is false: its
last step stops at the first noise level, alpha = .9996). Flows visit the times 1, 1 - 1 / N, ... 1 / N before they are
shifted, as FLUX's pipeline does; Stable Diffusion 3's own begin their last step at the smallest noise of training
instead. Spacings of inference alone (Karras, exponential, beta) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agents.core.errors import UserError
from agents.core.noise_paths import DiscreteVP, Path, Prediction, RectifiedFlow, Spacing

PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
"""By diffusers' names."""
BETAS: dict[str, Any] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
"""Names of noise schedules, theirs to ours."""


@dataclass(frozen=True)
class Schedule:
    """How a pipeline denoises.

    Attributes:
        path: data to noise.
        kind: what its network predicts.
        spacing: of times.
        offset: added to the training steps that a chain visits (Stable Diffusion 1).
        shift: of a flow's times; one that is asked for comes on top.
    """

    path: Path
    kind: Prediction
    spacing: Spacing = "trailing"
    offset: int = 0
    shift: float = 1.0

    def times(self, steps: int, shift: float = 1.0) -> Tensor:
        """Return the times that a chain visits, float64 [steps + 1]; see `Path.times`."""
        times = self.path.times(steps, self.spacing, shift=self.shift * shift)
        if self.offset and self.path.knots:
            # With (nearly) all steps of training there is no room to move up.
            room = self.path.knots * (1 - float(times[0]))
            times[:-1] += min(self.offset, round(room)) / self.path.knots
        return times


def schedule_of(config: Mapping[str, Any], tokens: int) -> Schedule:
    """Return the schedule of a scheduler's config.

    Args:
        config: as its scheduler_config.json has it.
        tokens: of an image, which set FLUX's shift.

    Raises:
        UserError: it is a path that is not known here.
    """
    if "beta_start" not in config:
        return Schedule(RectifiedFlow(), "velocity", shift=_shift(config, tokens))
    schedule, kind = str(config.get("beta_schedule")), config.get("prediction_type", "epsilon")
    for what, name, known in (
        ("beta_schedule", schedule, BETAS),
        ("prediction_type", kind, PREDICTIONS),
    ):
        if name not in known:
            raise UserError.unknown(f"{what} of the pipeline's scheduler", name, known)
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise UserError(
            "the pipeline's scheduler has betas of its own (trained_betas or rescale_betas_zero_snr), which are not "
            "known here; give a pipeline with one of beta_schedule"
        )
    path = DiscreteVP(
        train_steps=config["num_train_timesteps"],
        schedule=BETAS[schedule],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
    )
    spacing = config.get("timestep_spacing", "leading")
    # Their linspace and trailing know no offset.
    offset = config.get("steps_offset", 0) if spacing == "leading" else 0
    return Schedule(path, PREDICTIONS[kind], spacing, offset)


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the time shift of a flow: the config's, or one that grows with the image (Esser et al. 2024, B.3)."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - short) / (long - short)
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
