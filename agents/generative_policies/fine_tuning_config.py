"""Settings that DPPO, FPO and ReinFlow share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from agents.on_policy.config import Ranges, at_least_one, check_ranges, not_negative, positive


@dataclass(frozen=True)
class FineTuningConfig:
    """What these agents have in common; defaults from DPPO unless a field says otherwise."""

    rollout_length: int = 256
    """Chunks of every environment between updates (DPPO 500 of 40 environments)."""
    minibatch_size: int = 256
    """Chunks per gradient step, about, each with its whole chain (DPPO 50,000 pairs of chunk and denoising step)."""
    epochs: int = 5
    """Passes over a rollout (DPPO 5 in gym, 10 in Robomimic)."""
    discount: float = 0.99
    """Discount per chunk."""
    gae_lambda: float = 0.95
    """Lambda of the generalized advantage estimate."""
    learning_rate: float = 1e-4
    """Adam step size of the policy (DPPO 1e-4 from states, 1e-5 from pixels)."""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic."""
    critic_warmup: int = 0
    """Rollouts at the start from which only the critic learns (DPPO 2 in Robomimic)."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the critic's hidden layers."""
    max_gradient_norm: float = 1.0
    """Gradients of policy and critic are each scaled down to this norm (ours; DPPO's gym runs bound none)."""
    normalize_advantage: bool = True
    """Bring every minibatch's advantages to mean 0 and spread 1."""
    scale_reward: bool = True
    """Divide rewards by the spread of the discounted return, and clip them to 10."""
    normalize_observation: bool = True
    """Without a base, bring states to mean 0 and spread 1 (FPO); a base keeps the ranges of its data."""
    target_kl: float = 1.0
    """Estimated KL(old || new) after which the remaining passes are left out."""
    clip: float = 0.01
    """Largest |ratio - 1|, of the mean over a chunk's numbers: d times that of the sum (DPPO .01)."""
    teacher_coefficient: float = 1.0
    """Weight of the denoising loss of a teacher's chunks, where there is a teacher (RPD 1, of its own loss)."""
    teacher_decay: int = 0
    """Agent steps in which that weight falls to 0, along half a cosine (RPD's code); 0 keeps it."""
    guidance: float = 0.0
    """Share of episodes that a teacher begins (JSRL: all, in the first part of an episode)."""
    guidance_decay: int = 0
    """Agent steps in which that share falls to 0, in a straight line (ours; JSRL's falls with success); 0 keeps it."""
    guided_decisions: float = 10.0
    """Mean number of a teacher's decisions in an episode that it begins (ours)."""

    RANGES: ClassVar[Ranges] = (
        ("rollout_length minibatch_size epochs", at_least_one, "a positive number"),
        ("max_gradient_norm target_kl", positive, "a positive number"),
        ("learning_rate critic_learning_rate", lambda value: 0 < value < math.inf, "a positive number"),
        ("discount gae_lambda", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
        ("critic_warmup", not_negative, "0 or more"),
        ("clip", lambda value: 0 < value < 1, "a number in (0, 1)"),
        ("hidden", lambda value: min(value, default=1) >= 1, "positive widths"),
        ("teacher_coefficient teacher_decay guidance_decay", not_negative, "0 or more"),
        ("guidance", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
        ("guided_decisions", lambda value: 1 <= value < math.inf, "1 or more"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with; an algorithm's config adds its own `RANGES`."""
        check_ranges(self)
