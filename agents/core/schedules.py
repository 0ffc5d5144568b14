"""Schedules of a scalar over agent steps."""

from __future__ import annotations


def linear(start: float, end: float, duration: int, step: int) -> float:
    """Return the value at `step` of a line from `start` to `end` over `duration` steps, constant after."""
    fraction = min(max(step / duration, 0.0), 1.0) if duration > 0 else 1.0
    return start + (end - start) * fraction
