"""Tables of the runs and of one task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.reporting.blocks import Cell, Table, cells, count, limits, number, slug
from experiments.reporting.runs import Run
from experiments.reporting.scores import CLEAN, Group, Score, Summary
from experiments.reporting.settings import differing, settings

FLAG = "did not learn"


def flag(group: Group) -> str:
    """Return the warning that stands beside an agent which learned nothing."""
    return FLAG if group.learned is False else ""


def learned_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """Return, by task, which agents learned: what the other rows of a table are to be held against."""
    texts = []
    for env_id in dict.fromkeys(group.env_id for group in groups):
        here = [group for group in groups if group.env_id == env_id]
        by_state = {
            state: ", ".join(g.agent for g in here if g.learned is state)
            for state in (True, False, None)
        }
        if by_state[True]:
            text = f"{env_id}: learned: {by_state[True]}"
        elif by_state[False]:
            text = f"{env_id}: no agent learned on this task"
        else:
            text = f"{env_id}: whether an agent learned is not known"
        others = {"did not learn": by_state[False], "not known": by_state[None]}
        if not by_state[True] and not by_state[False]:
            others = {}
        texts.append("; ".join([text, *(f"{k}: {v}" for k, v in others.items() if v)]) + ".")
    return tuple(texts)


def runs_table(summary: Summary) -> Table:
    """Return what was run, with what it cost."""
    rows = []
    for group in summary.groups:
        seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in group.runs)
        costs = [
            _span(group.runs, key) for key in ("agent_steps", "env_frames", "gradient_updates")
        ]
        times = [run.counters["wall_seconds"] for run in group.runs if run.counters]
        span = dict.fromkeys(_clock(t) for t in (min(times), max(times))) if times else ["–"]
        how = [
            joined(settings(run).get(f"env.{key}") for run in group.runs)
            for key in ("size", "action_repeat", "quality", "distraction")
        ]
        how[-1] = CLEAN if how[-1] == "None" else how[-1]
        texts = [group.env_id, seeds, *costs, " to ".join(span), *how]
        rows.append([Cell(group.agent, flag=flag(group)), *cells(texts)])
    head = ["agent", "task", "seeds", "agent steps", "environment frames", "gradient updates"]
    head += ["wall clock (h:mm:ss)", "pixels", "action repeat", "quality", "trained under"]
    return Table(
        "runs",
        "The runs, what they cost, and what they saw.",
        head,
        rows,
        learned_notes(summary.groups),
    )


def scores_table(summary: Summary, env_id: str) -> Table | None:
    """Return every agent's return under every distraction; None if nothing was evaluated."""
    names, groups = summary.distractions(env_id), summary.of(env_id)
    if not names:
        return None
    scale = max(abs(score.mean) for group in groups for score in group.scores.values())
    rows = []
    for group in groups:
        below: tuple[str, ...] = ()
        if group.scores:
            counts = {(score.runs, score.episodes // score.runs) for score in group.scores.values()}
            runs, episodes = max(counts)
            below = (f"{count(runs, 'seed')} × {count(episodes, 'episode')}",)
        head = Cell(group.agent, below=below, flag=flag(group))
        rows.append([head, *(_score(group.scores.get(n), scale, group.learned) for n in names)])
    if env_id in summary.random:
        random = summary.random[env_id]
        head = Cell("random policy", below=(count(random.episodes, "episode"),))
        cell = _score(random, scale, None, dagger=False) if CLEAN in names else Cell("")
        rows.append([head, *(cell if name == CLEAN else Cell("as clean") for name in names)])
    caption = f"Return per episode on {env_id}: mean and 95 % interval over seeds."
    return Table(f"scores-{slug(env_id)}", caption, ["agent", *names], rows, learned_notes(groups))


def _score(score: Score | None, scale: float, learned: bool | None, *, dagger: bool = True) -> Cell:
    if score is None:
        return Cell("–")
    below = [f"IQM {number(score.iqm, scale)}"]
    # A policy that learned nothing loses nothing: a gap of zero would read as robustness.
    if score.gap is not None and learned is not False:
        below.append(f"gap {number(score.gap, 100)} %")
        if score.gap_interval is not None:
            below[-1] += f" {limits(*score.gap_interval, 100)}"
    if score.success is not None:
        below.append(f"success {100 * score.success:.0f} %")
    mark = "†" if dagger and score.runs == 1 else ""
    interval = limits(score.low, score.high, scale) + mark
    return Cell(number(score.mean, scale), interval, tuple(below))


def times_table(summary: Summary, env_id: str) -> Table | None:
    """Return the logged times; None if there are none."""
    groups = summary.of(env_id)
    tags = sorted({t for g in groups for run in g.runs for t in run.series if t[:5] == "time/"})
    if not tags:
        return None
    rows = []
    for group in groups:
        texts = []
        for tag in tags:
            medians = [np.median(r.series[tag].values) for r in group.runs if tag in r.series]
            texts.append(number(float(np.mean(medians))) if medians else "–")
        rows.append([Cell(group.agent, flag=flag(group)), *cells(texts)])
    caption = f"Times and rates on {env_id}: median over a run, mean over seeds."
    notes = learned_notes(groups)
    return Table(f"times-{slug(env_id)}", caption, ["agent", *(t[5:] for t in tags)], rows, notes)


def settings_table(summary: Summary) -> Table | None:
    """Return the settings in which runs differ; None if they agree."""
    names = differing(summary.runs)
    if not names:
        return None
    rows = []
    for group in summary.groups:
        seeds: dict[tuple[str, ...], list[str]] = {}
        for run in group.runs:
            values = tuple(settings(run).get(name, "–") for name in names)
            seeds.setdefault(values, []).append(str(run.seed))
        rows += [
            [Cell(group.agent, flag=flag(group)), *cells([group.env_id, ", ".join(s), *values])]
            for values, s in seeds.items()
        ]
    caption = "Settings that differ between runs."
    head = ["agent", "task", "seeds", *names]
    return Table("settings", caption, head, rows, learned_notes(summary.groups), wide=True)


def _span(runs: list[Run], counter: str) -> str:
    values = [run.counters[counter] for run in runs if run.counters]
    texts = dict.fromkeys(f"{v:,.0f}" for v in (min(values), max(values))) if values else ["–"]
    return " to ".join(texts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def joined(values: Iterable[Any], missing: str = "–") -> str:
    """Return the different values once each, `;` between them."""
    texts = dict.fromkeys(str(value) for value in values if value not in (None, "", {}))
    return "; ".join(texts) or missing
