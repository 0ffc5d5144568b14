"""Means over runs with the uncertainty that few runs leave (Agarwal et al. 2021, arXiv:2108.13264).

A *run* is one training seed; its score is its mean return over evaluation episodes. Runs, not
episodes, are resampled, because the spread between seeds is what a repetition of the experiment
would meet. Tasks are strata: a resample holds as many runs of each task as the experiment did,
since tasks are chosen, not drawn.

Differences from the paper: `median` is that of all runs; the paper takes each task's mean first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Statistic = Callable[[np.ndarray], np.ndarray]
"""Reduces axis 0 (runs of all tasks, pooled) and keeps the axes behind it."""


@dataclass(frozen=True)
class Interval:
    """A statistic and its percentile bootstrap interval.

    Each is float64 [*points], 0-d where scores are scalars.
    """

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over axis 0."""
    return np.mean(values, axis=0)


def median(values: np.ndarray) -> np.ndarray:
    """Return the median over axis 0."""
    return np.median(values, axis=0)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half over axis 0, as `scipy.stats.trim_mean(values, 0.25)`.

    `floor(n / 4)` values are cut at either end, so with fewer than four runs it is the mean.
    """
    ordered = np.sort(values, axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def stratified_bootstrap(
    strata: Sequence[ArrayLike],
    statistic: Statistic = mean,
    *,
    confidence: float = 0.95,
    repetitions: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval.

    Runs are drawn with replacement inside each stratum. Axes behind the first are carried along: a
    run is drawn whole, with every point of its learning curve.

    Args:
        strata: one array [runs_k, *points] per task; the numbers of runs may differ.
        statistic: reduces axis 0 of [runs, *points] and of [runs, repetitions, *points].
        confidence: the interval's nominal coverage, in (0, 1).
        repetitions: resamples; memory grows with repetitions * runs * points * 8 bytes.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: a stratum without runs, a score that is not finite, or a confidence outside
            (0, 1).
    """
    tasks = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not tasks or any(task.ndim == 0 or len(task) == 0 for task in tasks):
        raise ValueError("every stratum needs at least one run")
    if not all(np.isfinite(task).all() for task in tasks):
        raise ValueError("scores must be finite; leave out or name the runs that are not")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    rng = np.random.default_rng(seed)
    resampled = [task[rng.integers(len(task), size=(len(task), repetitions))] for task in tasks]
    replicates = statistic(np.concatenate(resampled))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(replicates, [tail, 1.0 - tail], axis=0)
    return Interval(np.asarray(statistic(np.concatenate(tasks))), low, high)
