"""Scripts that solve the toy tasks from their state, with the returns that `envs.toy` documents as the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from envs.toy import TASKS
from wrappers.errors import UserError


def _reach(state: np.ndarray) -> np.ndarray:
    """Go to the target's place."""
    return state[2:].astype(np.float32)


def _balance(state: np.ndarray) -> np.ndarray:
    """Push against position and velocity."""
    return np.clip([-8 * state[0] - 2 * state[1]], -1, 1).astype(np.float32)


def _catch(state: np.ndarray) -> np.int64:
    """Follow the ball, but not within half a step of the paddle."""
    return np.int64(1 + np.sign(np.trunc((state[1] - state[0]) / 0.13)))


_EXPERTS: dict[str, Callable[[np.ndarray], Any]] = {
    "reach": _reach,
    "balance": _balance,
    "catch": _catch,
}


def scripted_expert(task: str) -> Callable[[np.ndarray], Any]:
    """Return the expert of a toy task as a function from its state observation to an action of its space.

    Args:
        task: its name behind `toy/`, such as `reach`.

    Raises:
        UserError: there is no such task, or nobody has written a script for it.
    """
    if task not in TASKS:
        raise UserError.unknown("toy task", task, TASKS)
    if task not in _EXPERTS:
        raise UserError(
            f"toy/{task} has no scripted expert; those of {', '.join(sorted(_EXPERTS))} have"
        )
    return _EXPERTS[task]
