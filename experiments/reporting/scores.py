"""Scores with intervals, and curves on common steps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from experiments.reporting.runs import Axis, Run
from experiments.reporting.statistics import (
    Statistic,
    interquartile_mean,
    mean,
    stratified_bootstrap,
)

CLEAN = "clean"
KINDS = ("color", "video", "camera", "light", "noise", "objects")
SUITE = ("0.025", "0.05", "0.1", "easy", "0.15", "0.2", "medium", "0.3", "hard", "0.4", "0.5")
KNOWN_ORDER = (
    CLEAN,
    *(f"{kind}_{level}" for kind in KINDS for level in ("easy", "hard")),
    "textures",
    *(f"dcs_{level}{end}" for end in ("_static", "") for level in SUITE),
    "randomized",
)
CURVE_POINTS = 60
"""Points on a curve whose seeds logged at different steps; each averages 1/60 of the run."""


@dataclass(frozen=True)
class Score:
    """Returns of one agent on one task under one distraction, with a 95 % interval.

    Mean, IQM and interval are over runs; of a single run, over its episodes.
    """

    mean: float
    low: float
    high: float
    iqm: float
    runs: int
    episodes: int
    success: float | None = None
    """Share of successful episodes in [0, 1]."""
    gap: float | None = None
    """Return lost against clean, in percent; None for clean and where clean is not positive."""
    gap_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A statistic over seeds along what was spent, with a 95 % interval; arrays are float64 [P]."""

    spent: np.ndarray
    point: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


@dataclass(frozen=True)
class Group:
    """All runs of one agent on one task."""

    agent: str
    env_id: str
    runs: list[Run]
    scores: dict[str, Score]
    learned: bool | None
    """Clean's lower limit is above the random policy's upper one; None if one is not measured."""


@dataclass(frozen=True)
class Summary:
    """Everything that tables and plots are drawn from."""

    runs: list[Run]
    groups: list[Group]
    random: dict[str, Score]
    """env id -> the random policy, over episodes."""

    @property
    def env_ids(self) -> list[str]:
        """Return the tasks in order."""
        return list(dict.fromkeys(group.env_id for group in self.groups))

    def of(self, env_id: str) -> list[Group]:
        """Return the agents that ran on a task."""
        return [group for group in self.groups if group.env_id == env_id]

    def distractions(self, env_id: str) -> list[str]:
        """Return what was evaluated on a task."""
        return in_order({name for group in self.of(env_id) for name in group.scores})


def summarize(runs: list[Run]) -> Summary:
    """Group runs by (agent, task) and score every group under every distraction."""
    random = {}
    for env_id in sorted({run.env_id for run in runs}):
        # Seeds evaluated with one evaluation seed met the same random episodes: count them once.
        measured = {
            returns for run in runs if run.env_id == env_id for returns in run.random_returns
        }
        if measured:
            random[env_id] = _score([np.concatenate(sorted(measured))])
    groups = []
    for env_id, agent in sorted({(run.env_id, run.agent) for run in runs}):
        members = [run for run in runs if (run.env_id, run.agent) == (env_id, agent)]
        members.sort(key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
        names = {name for run in members if run.evaluation for name in run.evaluation.results}
        scores = {name: _score_group(members, name) for name in sorted(names)}
        learned = None
        if CLEAN in scores and env_id in random:
            learned = scores[CLEAN].low > random[env_id].high
        groups.append(Group(agent, env_id, members, scores, learned))
    return Summary(runs, groups, random)


def _score(returns: list[np.ndarray]) -> Score:
    """Score runs by their episodes' returns."""
    values = np.array([r.mean() for r in returns]) if len(returns) > 1 else returns[0]
    interval = stratified_bootstrap([values], mean)
    return Score(
        float(interval.point),
        float(interval.low),
        float(interval.high),
        float(interquartile_mean(values)),
        runs=len(returns),
        episodes=sum(map(len, returns)),
    )


def _score_group(runs: list[Run], name: str) -> Score:
    results = [run.evaluation.results for run in runs if run.evaluation]
    found = [r[name] for r in results if name in r]
    score = _score([result.returns for result in found])
    success = [result.success for result in found if result.success is not None]
    if success:
        score = replace(score, success=float(np.mean(success)))
    pairs = [
        (r[CLEAN].returns.mean(), r[name].returns.mean())
        for r in results
        if {CLEAN, name} <= set(r)
    ]
    # A share of a return that is zero or negative has no meaning.
    if name == CLEAN or not pairs or any(clean <= 0 for clean, _ in pairs):
        return score
    interval = stratified_bootstrap([np.array(pairs)], gap_percent)
    limits = (float(interval.low), float(interval.high)) if len(pairs) > 1 else None
    return replace(score, gap=float(interval.point), gap_interval=limits)


def gap_percent(pairs: np.ndarray) -> np.ndarray:
    """Return what is lost against clean, in percent.

    Args:
        pairs: [runs, ..., 2], a run's mean returns clean and distracted.
    """
    clean, distracted = np.moveaxis(pairs.mean(axis=0), -1, 0)
    return 100.0 * (1.0 - distracted / clean)


def curve(
    runs: list[Run], tag: str, statistic: Statistic = mean, axis: Axis = "agent_steps"
) -> Curve | None:
    """Return a logged value along an axis; None if the runs share no range of it."""
    aligned = align(runs, tag, axis)
    if aligned is None:
        return None
    spent, values = aligned
    interval = stratified_bootstrap([values], statistic, repetitions=2_000)
    return Curve(spent, interval.point, interval.low, interval.high, len(values))


def return_tags(runs: Iterable[Run]) -> dict[str, str]:
    """Return the tags that hold returns, with what they mean: training, then evaluation."""
    tags = {tag for run in runs for tag in run.series}
    names = {tag.split("/")[1] for tag in tags if re.fullmatch(r"eval/[^/]+/return_mean", tag)}
    titles = {"train/episode_return": "training episodes"} if "train/episode_return" in tags else {}
    return titles | {f"eval/{name}/return_mean": f"evaluation, {name}" for name in in_order(names)}


def in_order(names: set[str]) -> list[str]:
    """Return distractions as tables show them: clean first, then the known ones, then others."""
    return [d for d in KNOWN_ORDER if d in names] + sorted(names - set(KNOWN_ORDER))


def efficiency_tag(runs: Iterable[Run]) -> str | None:
    """Return what sample efficiency is read from: clean evaluation, else training; None without."""
    tags = {tag for run in runs for tag in run.series}
    known = (f"eval/{CLEAN}/return_mean", "train/episode_return")
    return next((tag for tag in known if tag in tags), None)


def align(
    runs: Iterable[Run], tag: str, axis: Axis = "agent_steps"
) -> tuple[np.ndarray, np.ndarray] | None:
    """Put the runs' values of a tag on common places of an axis.

    Runs that logged at the same places are taken as they are. Others are averaged in bins and
    interpolated over the range that all share, so no seed drops out along a curve.

    Returns:
        places [P] and values [runs, P] of the runs that logged the tag; None if they share no
        range.
    """
    series = [run.series[tag] for run in runs if tag in run.series]
    if not series:
        return None
    places = [one.along(axis) for one in series]
    first = places[0]
    if len(first) <= CURVE_POINTS and len(np.unique(first)) == len(first):
        if all(np.array_equal(first, other) for other in places):
            return first, np.stack([one.values for one in series])
    start = max(place[0] for place in places)
    stop = min(place[-1] for place in places)
    if stop <= start:
        return None
    width = (stop - start) / CURVE_POINTS
    grid = start + width * (np.arange(CURVE_POINTS) + 0.5)
    rows = []
    for place, one in zip(places, series, strict=True):
        _, bins = np.unique(np.floor((place - start) / width), return_inverse=True)
        counts = np.bincount(bins)
        centers = np.bincount(bins, place) / counts
        rows.append(np.interp(grid, centers, np.bincount(bins, one.values) / counts))
    return grid, np.stack(rows)
