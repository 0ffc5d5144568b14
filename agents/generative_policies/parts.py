"""What a denoising policy is made of, by name: its config, and how paths, rules and networks follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import gymnasium as gym
from torch import nn

from agents.core.denoisers import DiTDenoiser, MLPDenoiser
from agents.core.denoising import TimeDistribution, check_times
from agents.core.errors import UserError
from agents.core.noise_paths import (
    CosineVP,
    DiscreteVP,
    LinearVP,
    Path,
    Prediction,
    RectifiedFlow,
)
from agents.core.step_rules import Euler, FlowSDE, Heun, Posterior, StepRule
from agents.core.temporal_unet import UNetDenoiser
from agents.generative_policies.conditions import ConditionConfig
from agents.on_policy.config import Ranges, at_least_one, check_ranges, not_negative

PathName = Literal["flow", "diffusion", "cosine", "linear"]
RuleName = Literal["euler", "heun", "posterior", "flow_sde"]
DenoiserName = Literal["mlp", "unet", "dit"]


@dataclass(frozen=True)
class DenoisingConfig(ConditionConfig):
    """What a denoising policy is made of, and how it draws."""

    horizon: int = 16
    """H, actions that are predicted at once (Diffusion Policy 16, DPPO 4 or 8); at least those of the task's chunk."""
    path: PathName = "flow"
    """From data to noise: rectified flow, a diffusion of `train_steps`, or one in continuous time (cosine, linear)."""
    train_steps: int = 100
    """Noise levels of the path `diffusion` (Diffusion Policy 100, DPPO 20)."""
    prediction: Prediction = "velocity"
    """What the network says of a noisy chunk (flows: velocity; Diffusion Policy: noise)."""
    times: TimeDistribution = "uniform"
    """How training times are drawn (uniform; pi0 beta)."""
    times_first: float | None = None
    """First number of the times' distribution; none is beta's 1.5 (pi0), or 0, the mean of a logit_normal."""
    times_second: float | None = None
    """Second number of the times' distribution; none is beta's 1 (pi0), or 1, the spread of a logit_normal."""
    denoiser: DenoiserName = "mlp"
    """The network: residual MLP (DPPO), 1-D U-Net (Diffusion Policy), diffusion transformer (CogACT)."""
    width: int = 512
    """Hidden units of the MLP, features of the transformer (DPPO 512, DiT-S 384)."""
    blocks: int = 2
    """Residual blocks of the MLP, blocks of the transformer (DPPO 1, DiT-S 12)."""
    heads: int = 4
    """Attention heads of the transformer."""
    channels: tuple[int, ...] = (256, 512, 1024)
    """Channels of the U-Net's resolutions (Diffusion Policy from states)."""
    time_features: int = 32
    """Length of the time's embedding in MLP (DPPO 16 or 32) and U-Net (Diffusion Policy 128 or 256)."""
    rule: RuleName = "euler"
    """How a chain steps when the policy acts: euler, heun (no noise on the way), posterior (DDIM to DDPM), flow_sde."""
    denoising_steps: int = 10
    """Steps of a chain when the policy acts (FPO 10; Diffusion Policy's robots 10 to 16)."""
    noise_level: float = 0.0
    """Noise on the way: eta of posterior (0 DDIM, 1 DDPM), a of flow_sde (Flow-GRPO .7)."""
    min_std: float = 0.0
    """Floor of the noise on the way, where a rule has any (DPPO .1 while it explores)."""
    start_noise: float = 1.0
    """Factor of the noise that chains start from when the policy acts; 0 is FPO++'s zero-noise sampling."""
    clip_x0: float = 0.0
    """Largest chunk that is predicted on the way (Diffusion Policy 1); 0 clips only what comes out, to 1."""
    noise_correlation: float = 0.0
    """Share of the demonstrated chunks' correlation in the noise (BEHAVIOR 2025's winner .5); 0 is white noise."""
    inpaint: bool = False
    """Begin a chunk with what the last one had predicted for these actions (needs horizon above the task's chunk)."""
    inpaint_until: float = 0.3
    """Time below which inpainted actions are free again (BEHAVIOR 2025's winner .3; 0 keeps them as they were)."""

    RANGES: ClassVar[Ranges] = (
        ("horizon train_steps width blocks heads time_features", at_least_one, "a positive number"),
        ("denoising_steps feature_dim", at_least_one, "a positive number"),
        ("noise_level min_std start_noise clip_x0", not_negative, "0 or more"),
        ("inpaint_until", lambda value: 0 <= value <= 1, "a time from 0 to 1"),
        ("times_first times_second", lambda value: value is None or math.isfinite(value), "a finite number"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Reject values that no policy can be built with."""
        check_ranges(self)
        if min(self.channels, default=0) < 1:
            shown = " ".join(map(str, self.channels)) or "empty"
            raise UserError(f"channels is {shown}; give positive numbers, one for each resolution")
        if self.times not in TIMES:
            raise UserError.unknown("distribution of times", self.times, TIMES)
        check_times(self.times, *self.numbers_of_times)
        if self.noise_correlation and self.clip_x0:
            raise UserError(
                "correlated noise runs in coordinates of its own, where clip_x0 has no meaning; set one of them to 0"
            )

    @property
    def numbers_of_times(self) -> tuple[float, float]:
        """The numbers of the times' distribution; where the config has none, its usual ones."""
        first, second = TIMES[self.times]
        return (
            first if self.times_first is None else self.times_first,
            second if self.times_second is None else self.times_second,
        )


def missing_for(config: DenoisingConfig, name: str) -> str:
    """Return what a field needs to count and a config does not have, as flags say it; empty where it counts."""
    needed, has = NEEDED.get(name, ("", lambda config: True))
    return "" if has(config) else needed


NEEDED: dict[str, tuple[str, Callable[[DenoisingConfig], bool]]] = {
    "train_steps": ("--path diffusion", lambda config: config.path == "diffusion"),
    "times_first": ("other --times than uniform", lambda config: config.times != "uniform"),
    "times_second": ("other --times than uniform", lambda config: config.times != "uniform"),
    "width": ("--denoiser mlp or dit", lambda config: config.denoiser != "unet"),
    "blocks": ("--denoiser mlp or dit", lambda config: config.denoiser != "unet"),
    "heads": ("--denoiser dit", lambda config: config.denoiser == "dit"),
    "channels": ("--denoiser unet", lambda config: config.denoiser == "unet"),
    "time_features": ("--denoiser mlp or unet", lambda config: config.denoiser != "dit"),
    "inpaint_until": ("--inpaint", lambda config: config.inpaint),
}
"""Fields that count under a condition: what that is, as flags say it, and whether a config meets it."""


TIMES: dict[TimeDistribution, tuple[float, float]] = {
    "uniform": (0.0, 1.0), "logit_normal": (0.0, 1.0), "beta": (1.5, 1.0),
}  # fmt: skip
"""Usual numbers of each distribution of times (Esser et al. 2024: rf/lognorm(0, 1); pi0); the uniform one has none."""


class Chunks(NamedTuple):
    """What an action space says of chunks."""

    executed: int
    """h, actions of a step of the environment."""
    action: int
    """A."""
    is_chunk: bool
    """Whether the environment takes [h, A]; otherwise [A]."""


def read_chunks(space: gym.Space, horizon: int) -> Chunks:
    """Return what an environment's actions are: Box [A], or [h, A] of one that takes chunks.

    Args:
        space: the environment's.
        horizon: H, actions that a policy is to predict.

    Raises:
        UserError: others, or more of them than are predicted.
    """
    if not isinstance(space, gym.spaces.Box) or len(space.shape) not in (1, 2):
        raise UserError(f"policies of chunks take Box [A] or [h, A] actions, not {space}")
    executed = space.shape[0] if len(space.shape) == 2 else 1
    if horizon < executed:
        raise UserError(
            f"horizon is {horizon}, but the task executes chunks of {executed} actions; raise --horizon or lower "
            "--action-chunk"
        )
    return Chunks(executed, space.shape[-1], len(space.shape) == 2)


def make_path(config: DenoisingConfig) -> Path:
    """Return the path that a config names."""
    if config.path == "flow":
        return RectifiedFlow()
    if config.path == "diffusion":
        return DiscreteVP(config.train_steps)
    return CosineVP() if config.path == "cosine" else LinearVP()


def make_rule(name: RuleName, noise_level: float) -> StepRule:
    """Return a step rule by name.

    Raises:
        UserError: a noise level that the rule does not know.
    """
    if name == "posterior":
        return Posterior(noise_level)
    if name == "flow_sde":
        return FlowSDE(noise_level)
    if noise_level:
        raise UserError(f"rule {name} has no noise, but noise_level is {noise_level}; set it to 0")
    return Euler() if name == "euler" else Heun()


def make_denoiser(config: DenoisingConfig, chunks: Chunks, condition: int) -> nn.Module:
    """Return the network that a config names, for chunks [B, horizon, A] and conditions [B, condition]."""
    if config.denoiser == "mlp":
        return MLPDenoiser(
            config.horizon,
            chunks.action,
            condition,
            hidden=config.width,
            blocks=config.blocks,
            time_features=config.time_features,
        )
    if config.denoiser == "unet":
        return UNetDenoiser(
            chunks.action,
            condition,
            widths=config.channels,
            time_features=config.time_features,
        )
    return DiTDenoiser(
        chunks.action, condition, features=config.width, blocks=config.blocks, heads=config.heads
    )
