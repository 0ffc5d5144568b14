"""Agents over several tasks: normalized scores and what Agarwal et al. 2021 report of them.

Scores become comparable across tasks when 1 is the best that a task allows:

- `dmc/*`: return over episode length (1000 control steps by default), since rewards lie in [0, 1];
  not for the `lqr` tasks, whose rewards are unbounded;
- `metaworld/*`: share of successful episodes;
- `toy/reach*`, `toy/balance`: return over episode length (25 and 40 steps); `toy/catch`: catches over
  those that the time allows, one in 9 steps (6 in 60);
- other tasks have no known best, so they are left out and named.

Only tasks that every agent was evaluated on under a distraction enter its aggregates: an agent
gains nothing from having been tried on the easy ones alone. Published numbers never enter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.reporting.runs import Result, Run
from experiments.reporting.scores import CLEAN, Group, Summary, gap_percent, in_order
from experiments.reporting.statistics import (
    Interval,
    Statistic,
    interquartile_mean,
    mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)

THRESHOLDS = np.linspace(0.0, 1.0, 101)
"""Normalized scores at which profiles are read."""
REPETITIONS = 2_000
"""Resamples of an aggregate; the interval's ends move by about 3 % of its width between seeds."""
DM_CONTROL_LENGTH = 1000
CATCH_STEPS = 9
"""Steps that a ball of `toy/catch` falls."""
NORMALIZATION = (
    "Normalized scores: dmc, return over episode length; metaworld, share of successful episodes; "
    "toy, return over what the episode length allows (reach 25, balance 40, catch 6 by default)."
)
TOY_LENGTHS = {"reach": 25, "reach-drift": 25, "balance": 40, "catch": 60}


@dataclass(frozen=True)
class Aggregate:
    """One agent under one distraction, over the shared tasks; points and 95 % intervals."""

    mean: Interval
    iqm: Interval
    optimality_gap: Interval
    profile: Interval
    """[T] at `THRESHOLDS`."""
    runs: int
    gap: Interval | None
    """Percent of the clean normalized score that is lost; None for clean, without clean scores, and
    for an agent that did not learn on every shared task."""


@dataclass(frozen=True)
class Aggregates:
    """All agents over the tasks that they share."""

    agents: list[str]
    distractions: list[str]
    tasks: Mapping[str, list[str]]
    """By distraction: the shared tasks, at least one."""
    left_out: list[str]
    """Sentences: which tasks do not count, and why."""
    scores: Mapping[tuple[str, str], Aggregate]
    """By (agent, distraction)."""
    improvement: Mapping[tuple[str, str, str], Interval]
    """By (agent, other agent, distraction)."""
    unlearned: Mapping[str, list[str]]
    """By agent: shared tasks on which it did not learn."""
    unknown: Mapping[str, list[str]]
    """By agent: shared tasks on which nobody knows, for want of a clean or a random score."""
    has_intervals: bool
    """Whether every agent has at least two runs on every shared task."""


def normalized(run: Run, result: Result) -> float | None:
    """Return a run's score with 1 the best that its task allows; None where no best is known."""
    family, _, task = run.env_id.partition("/")
    if family == "metaworld":
        return result.success
    length = run.config["env"].get("episode_length")
    if family == "dmc" and not task.startswith("lqr"):
        return float(result.returns.mean()) / (length or DM_CONTROL_LENGTH)
    if family == "toy" and task in TOY_LENGTHS:
        steps = length or TOY_LENGTHS[task]
        best = max(1, steps // CATCH_STEPS) if task == "catch" else steps
        return float(result.returns.mean()) / best
    return None


def aggregate(summary: Summary) -> Aggregates | None:
    """Score every agent over the tasks that all share; None if they share none."""
    agents = sorted({group.agent for group in summary.groups})
    names = in_order({name for group in summary.groups for name in group.scores})
    table = {(group.agent, group.env_id): _scores(group) for group in summary.groups}
    tasks = {
        name: [
            env_id
            for env_id in summary.env_ids
            if all(name in table.get((agent, env_id), {}) for agent in agents)
        ]
        for name in names
    }
    tasks = {name: shared for name, shared in tasks.items() if shared}
    if not tasks:
        return None
    counted = list(dict.fromkeys(env_id for shared in tasks.values() for env_id in shared))
    learned = {(group.agent, group.env_id): group.learned for group in summary.groups}
    unlearned, unknown = (
        {agent: [t for t in counted if learned[agent, t] is state] for agent in agents}
        for state in (False, None)
    )

    def strata(agent: str, name: str) -> list[np.ndarray]:
        return [
            np.array([scores[name] for scores in table[agent, env_id][name]])
            for env_id in tasks[name]
        ]

    def pairs(agent: str, name: str) -> list[np.ndarray]:
        kept = (
            [(s[CLEAN], s[name]) for s in table[agent, env_id][name] if CLEAN in s]
            for env_id in tasks[name]
        )
        return [np.array(rows) for rows in kept if rows]

    scores, improvement = {}, {}
    for name, shared in tasks.items():
        for agent in agents:
            lossy = name != CLEAN and all(learned[agent, env_id] for env_id in shared)
            scores[agent, name] = _aggregate(
                strata(agent, name), pairs(agent, name) if lossy else []
            )
        for agent in agents:
            for other in agents:
                if other != agent:
                    improvement[agent, other, name] = probability_of_improvement(
                        strata(agent, name), strata(other, name), repetitions=REPETITIONS
                    )
    enough = all(len(runs) > 1 for key in scores for runs in strata(*key))
    return Aggregates(
        agents,
        list(tasks),
        tasks,
        _left_out(summary, table, tasks),
        scores,
        improvement,
        unlearned,
        unknown,
        enough,
    )


def _scores(group: Group) -> dict[str, list[dict[str, float]]]:
    """Return, by distraction, the runs that have it, each as its normalized scores by distraction."""
    runs = []
    for run in group.runs:
        results = run.evaluation.results if run.evaluation else {}
        found = {name: normalized(run, result) for name, result in results.items()}
        runs.append({name: score for name, score in found.items() if score is not None})
    names = dict.fromkeys(name for scores in runs for name in scores)
    return {name: [scores for scores in runs if name in scores] for name in names}


def _aggregate(strata: Sequence[np.ndarray], pairs: Sequence[np.ndarray]) -> Aggregate:
    def interval(statistic: Statistic, values: Sequence[np.ndarray] = strata) -> Interval:
        return stratified_bootstrap(values, statistic, repetitions=REPETITIONS)

    # Resamples of a clean mean that is not positive have no percentage to lose.
    positive = pairs and all((rows[:, 0] > 0).all() for rows in pairs)
    return Aggregate(
        interval(mean),
        interval(interquartile_mean),
        interval(optimality_gap),
        interval(performance_profile(THRESHOLDS)),
        sum(map(len, strata)),
        interval(gap_percent, pairs) if positive else None,
    )


def counted_tasks(aggregates: Aggregates) -> list[str]:
    """Return the tasks that count under any distraction."""
    return list(dict.fromkeys(t for shared in aggregates.tasks.values() for t in shared))


def _left_out(
    summary: Summary,
    table: Mapping[tuple[str, str], Mapping[str, object]],
    tasks: Mapping[str, list[str]],
) -> list[str]:
    counted = {env_id for shared in tasks.values() for env_id in shared}
    texts = []
    for env_id in summary.env_ids:
        if env_id in counted:
            continue
        if any(table.get((group.agent, env_id)) for group in summary.groups):
            texts.append(f"{env_id} is left out: not every agent was evaluated on it.")
        else:
            texts.append(f"{env_id} is left out: its best score is not known, or no run has one.")
    for name, shared in tasks.items():
        if set(shared) != counted:
            texts.append(
                f"{name} counts only {', '.join(shared)}: not all agents saw it elsewhere."
            )
    return texts


def per_agent(
    aggregates: Aggregates, quantity: Callable[[Aggregate], Interval | None]
) -> list[tuple[str, list[Interval | None]]]:
    """Return a quantity as rows: an agent, and its values by distraction."""
    return [
        (agent, [quantity(aggregates.scores[agent, name]) for name in aggregates.distractions])
        for agent in aggregates.agents
    ]
