"""Means over runs with the uncertainty that few runs leave (Agarwal et al. 2021, arXiv:2108.13264).

A *run* is one training seed; its score is its mean return over evaluation episodes. Runs, not
episodes, are resampled, because the spread between seeds is what a repetition of the experiment
would meet. Tasks are strata: a resample holds as many runs of each task as the experiment did,
since tasks are chosen, not drawn.

Aggregates over tasks take normalized scores, 1 being the best that a task allows: interquartile
mean (section 4.3), optimality gap (4.3), performance profile (4.2), probability of improvement
(4.3).

Differences from the paper: `median` is that of all runs; the paper takes each task's mean first.
Tasks may have unequal numbers of runs: all but the probability of improvement then weigh a task by
its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
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


def optimality_gap(values: np.ndarray, target: float = 1.0) -> np.ndarray:
    """Return by how much scores miss `target` on average over axis 0; what exceeds it counts as it.

    Lower is better. A single lucky task cannot make up for a failed one, as it does in a mean.
    """
    return target - np.minimum(values, target).mean(axis=0)


def performance_profile(thresholds: ArrayLike) -> Statistic:
    """Return a statistic: the share of runs whose score is above each of T thresholds.

    The statistic turns [runs, *points] into [*points, T], in [0, 1], falling along T. The area
    under it from 0 up is the mean of non-negative scores.
    """
    taus = np.asarray(thresholds, dtype=np.float64)
    return lambda values: (values[..., None] > taus).mean(axis=0)


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
    tasks = _checked(strata)
    rng = np.random.default_rng(seed)
    resampled = [task[rng.integers(len(task), size=(len(task), repetitions))] for task in tasks]
    replicates = statistic(np.concatenate(resampled))
    return _percentiles(np.asarray(statistic(np.concatenate(tasks))), replicates, confidence)


def nested_bootstrap(
    runs: Sequence[ArrayLike],
    *,
    confidence: float = 0.95,
    repetitions: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over runs of each one's mean over its episodes, with its percentile bootstrap interval.

    Runs are drawn with replacement, and within every one that is drawn its episodes: the mean of a run is not known
    either. Of a single run, only its episodes are drawn. With fewer than about five runs the interval is too narrow.

    Args:
        runs: one array [episodes_k] per run.
        confidence: the interval's nominal coverage, in (0, 1).
        repetitions: resamples; memory grows with repetitions * episodes * 8 bytes.
        seed: of the resampling.

    Raises:
        ValueError: as `stratified_bootstrap`.
    """
    episodes = _checked(runs)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(episodes), size=(repetitions, len(episodes)))
    means = np.empty(drawn.shape)
    for index, values in enumerate(episodes):
        here = drawn == index
        which = rng.integers(len(values), size=(len(values), int(here.sum())))
        means[here] = values[which].mean(axis=0)
    point = np.mean([values.mean() for values in episodes])
    return _percentiles(point, means.mean(axis=1), confidence)


def crossed_bootstrap(
    runs: Sequence[Mapping[Hashable, float]],
    *,
    confidence: float = 0.95,
    repetitions: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over runs of each one's mean over its items, with its percentile bootstrap interval.

    For values of the same items, such as prompts, in several runs: an easy item is easy in all of them, so that more
    runs do not tell more of items (`nested_bootstrap` would take them for others in each run, and give too narrow an
    interval). Every replicate draws runs, and one multiset of items for all of these (Owen 2007,
    doi:10.1214/07-AOAS122), which is mildly conservative; items that a run does not have are skipped there, and so is a
    run without any of those drawn. Of a single run, only its items are drawn. With fewer than about five runs the
    interval is too narrow where they differ by more than their items do.

    Args:
        runs: values by item, of each run; runs may have the same items, some of them, or others.
        confidence: the interval's nominal coverage, in (0, 1).
        repetitions: resamples; memory grows with repetitions * (items + runs) * 8 bytes.
        seed: of the resampling.

    Raises:
        ValueError: as `stratified_bootstrap`.
    """
    _checked([list(run.values()) for run in runs])
    items = list(dict.fromkeys(item for run in runs for item in run))
    has = np.array([[item in run for item in items] for run in runs], dtype=np.float64)
    values = np.array([[run.get(item, 0.0) for item in items] for run in runs], dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn_items, drawn_runs = (
        rng.multinomial(size, np.full(size, 1 / size), size=repetitions).astype(np.float64)
        for size in (len(items), len(runs))
    )
    counts = drawn_items @ has.T  # [repetitions, runs]
    means = drawn_items @ values.T / np.maximum(counts, 1)
    drawn_runs *= counts > 0
    weights = drawn_runs.sum(axis=1)
    is_known = weights > 0  # no run that was drawn has an item that was
    replicates = (drawn_runs * means).sum(axis=1)[is_known] / weights[is_known]
    point = np.mean([np.mean(list(run.values())) for run in runs])
    return _percentiles(point, replicates, confidence)


def probability_of_improvement(
    ours: Sequence[ArrayLike],
    theirs: Sequence[ArrayLike],
    *,
    confidence: float = 0.95,
    repetitions: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return how likely a run of one agent beats a run of another on a task drawn at random.

    Per task it is the share of pairs of runs that the first agent wins, a tie counting half (the
    Mann-Whitney U statistic over the number of pairs); tasks count alike. 0.5 is no difference. The
    two agents' runs are resampled independently, inside each task.

    Args:
        ours: one array [runs_k] per task, of the first agent.
        theirs: the second agent's, the same tasks in the same order.
        confidence: the interval's nominal coverage, in (0, 1).
        repetitions: resamples.
        seed: of the resampling.

    Raises:
        ValueError: the agents' numbers of tasks differ, or as `stratified_bootstrap`.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"agents need the same tasks, got {len(ours)} and {len(theirs)}")
    rng = np.random.default_rng(seed)
    points, replicates = [], np.zeros(repetitions)
    for first, second in zip(_checked(ours), _checked(theirs), strict=True):
        wins = (first[:, None] > second) + 0.5 * (first[:, None] == second)
        points.append(wins.mean())
        # How often each run was drawn is enough: no resample is written out.
        drawn = [
            rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=repetitions)
            for runs in (first, second)
        ]
        replicates += np.einsum("ri,ij,rj->r", drawn[0], wins, drawn[1], optimize=True) / wins.size
    return _percentiles(np.mean(points), replicates / len(points), confidence)


def _checked(strata: Sequence[ArrayLike]) -> list[np.ndarray]:
    tasks = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not tasks or any(task.ndim == 0 or len(task) == 0 for task in tasks):
        raise ValueError("every stratum needs at least one run")
    if not all(np.isfinite(task).all() for task in tasks):
        raise ValueError("scores must be finite; leave out or name the runs that are not")
    return tasks


def _percentiles(point: np.ndarray, replicates: np.ndarray, confidence: float) -> Interval:
    """Return the percentile interval of replicates [repetitions, *points]."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(replicates, [tail, 1.0 - tail], axis=0)
    return Interval(np.asarray(point), low, high)
