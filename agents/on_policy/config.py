"""Settings that on-policy agents have in common, and how an algorithm's own are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from agents.core.encoders import EncoderName
from agents.core.errors import UserError
from agents.on_policy.quantile_critic import Critic

Ranges = tuple[tuple[str, Callable[[Any], bool], str], ...]
"""Fields (several names in one string), what fits them, and how to say so."""


def at_least_one(value: Any) -> bool:
    """Whether a number counts something."""
    return bool(value >= 1)


def not_negative(value: Any) -> bool:
    """Whether a number is a weight or a distance; infinity is none."""
    return bool(0 <= value < math.inf)


def positive(value: Any) -> bool:
    """Whether a number is above 0; infinity is."""
    return bool(value > 0)


def check_ranges(config: Any) -> None:
    """Refuse values outside of the `RANGES` that a config's class, and those that it inherits from, have.

    Raises:
        UserError: names the first.
    """
    for owner in reversed(type(config).__mro__):
        for names, fits, wanted in vars(owner).get("RANGES", ()):
            for name in names.split():
                value = getattr(config, name)
                if not fits(value):
                    raise UserError(f"{name} is {value}; give {wanted}")


@dataclass(frozen=True)
class OnPolicyConfig:
    """What on-policy agents have in common; defaults from Stable-Baselines3's PPO unless a field says otherwise."""

    rollout_length: int = 2048
    """Steps of every environment between updates."""
    minibatch_size: int = 64
    """Steps per gradient step, about."""
    epochs: int = 10
    """Passes over a rollout."""
    discount: float = 0.99
    """Discount per agent step."""
    gae_lambda: float = 0.95
    """Lambda of the generalized advantage estimate."""
    learning_rate: float = 3e-4
    """Adam step size."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    max_gradient_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    normalize_advantage: bool = True
    """Bring every minibatch's advantages to mean 0 and spread 1."""
    normalize_observation: bool = False
    """Bring states to mean 0 and spread 1 (Stable-Baselines3's VecNormalize)."""
    scale_reward: bool = False
    """Divide rewards by the spread of the discounted return (Stable-Baselines3's VecNormalize)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic."""
    initial_log_std: float = 0.0
    """Log standard deviation of a continuous policy at the start."""
    encoder: EncoderName = "drqv2"
    """Convolutions over pixels; see `agents.core.encoders.ENCODERS`."""
    feature_dim: int = 50
    """Length of the projection behind the encoder (DrQ-v2)."""
    memory_size: int = 0
    """Units of a recurrent memory (a GRU) behind the encoder, which policy and value see too; 0 for none."""
    sequence_length: int = 32
    """Consecutive steps through which the memory learns; minibatches are made of such chunks (Sample Factory 32)."""
    value_regularization: float = 0.0
    """Weight of DrAC's term: policy and value of a shifted picture like those of the picture (DrAC .1)."""
    pad: int = 4
    """Largest shift in pixels at 84 x 84, scaled with the picture, for that term (DrAC 12)."""
    critic: Critic = "mean"
    """What the value is: an output of its own (mean), the mean of the return's implicit quantiles (quantile), or
    PG-Rainbow's function of both (distilled); see `agents.on_policy.quantile_critic`."""
    quantiles: int = 32
    """Evenly spaced quantiles that make a value, and random ones in every loss (IQN's K; its loss has 64)."""
    quantile_embedding: int = 64
    """Cosines in the embedding of a quantile's fraction (IQN 64)."""
    quantile_threshold: float = 1.0
    """Error of a quantile below which its loss is quadratic, in units of the return (IQN's kappa 1); 0 for none."""

    RANGES: ClassVar[Ranges] = (
        ("rollout_length minibatch_size epochs feature_dim", at_least_one, "a positive number"),
        ("quantiles quantile_embedding", at_least_one, "a positive number"),
        ("quantile_threshold", lambda value: 0 <= value < math.inf, "0 or more"),
        ("critic", get_args(Critic).__contains__, " or ".join(get_args(Critic))),
        ("sequence_length", at_least_one, "a positive number"),
        ("max_gradient_norm", positive, "a positive number"),
        ("learning_rate", lambda value: 0 < value < math.inf, "a positive number"),
        ("discount gae_lambda", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
        ("value_coefficient value_regularization pad memory_size", not_negative, "0 or more"),
        ("initial_log_std", math.isfinite, "a finite number"),
        ("hidden", lambda value: min(value, default=1) >= 1, "positive widths"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with; an algorithm's config adds its own `RANGES`."""
        check_ranges(self)
