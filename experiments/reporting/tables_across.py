"""Tables over all tasks: aggregates, improvement, generalization gaps, and where agents look."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.reporting.aggregates import Aggregate, Aggregates, counted_tasks, per_agent
from experiments.reporting.blocks import Cell, Table, count, limits, number, slug
from experiments.reporting.runs import SALIENCY
from experiments.reporting.scores import CLEAN, Group, Summary, in_order
from experiments.reporting.statistics import Interval, mean, stratified_bootstrap
from experiments.reporting.tables import FLAG, flag, learned_notes

QUANTITIES: tuple[tuple[str, str, Callable[[Aggregate], Interval | None]], ...] = (
    ("iqm", "Interquartile mean of normalized scores (higher is better)", lambda a: a.iqm),
    (
        "optimality-gap",
        "Optimality gap of normalized scores (lower is better)",
        lambda a: a.optimality_gap,
    ),
    ("mean", "Mean of normalized scores", lambda a: a.mean),
)


def aggregate_tables(aggregates: Aggregates) -> list[Table]:
    """Return one table per aggregate: agents by distractions."""
    notes = _notes(aggregates)
    tables = []
    for name, caption, quantity in QUANTITIES:
        rows = [
            [_agent(aggregates, agent), *(_interval(aggregates, value) for value in values)]
            for agent, values in per_agent(aggregates, quantity)
        ]
        head = ["agent", *aggregates.distractions]
        tables.append(Table(f"aggregate-{name}", f"{caption}.", head, rows, notes))
    return tables


def improvement_tables(aggregates: Aggregates) -> list[Table]:
    """Return, per distraction, the matrix of how likely the row's agent beats the column's.

    There is none of single runs: every entry would be 0 or 1 on one task, and nothing could be said of its error.
    """
    tables = []
    has_any = len(aggregates.agents) > 1 and aggregates.has_intervals
    for name in aggregates.distractions if has_any else ():
        rows = []
        for agent in aggregates.agents:
            row = [_agent(aggregates, agent)]
            for other in aggregates.agents:
                found = aggregates.improvement.get((agent, other, name))
                row.append(_interval(aggregates, found))
            rows.append(row)
        caption = f"P(improvement) under {name}: the row's agent beats the column's on a task."
        head = ["agent", *aggregates.agents]
        tables.append(Table(f"improvement-{slug(name)}", caption, head, rows, _notes(aggregates)))
    return tables


def gap_table(aggregates: Aggregates) -> Table | None:
    """Return the share of the clean score that each distraction takes; None without distractions."""
    rows, any_gap = [], False
    distracted = [name for name in aggregates.distractions if name != CLEAN]
    for agent, values in per_agent(aggregates, lambda a: a.gap):
        row = [_agent(aggregates, agent)]
        for name, value in zip(aggregates.distractions, values, strict=True):
            any_gap |= value is not None
            if name != CLEAN:
                row.append(_interval(aggregates, value, 100, " %"))
        rows.append(row)
    if not any_gap:
        return None
    caption = "Generalization gap: the share of the clean normalized score that is lost."
    return Table("gap", caption, ["agent", *distracted], rows, _notes(aggregates))


def looks_table(summary: Summary, env_id: str) -> Table | None:
    """Return how saliency lies on the foreground, per agent and distraction; None if not measured."""
    groups = summary.of(env_id)
    names = in_order({n for group in groups for n in summary.distractions(env_id)})
    names = [
        n for n in names if any(_saliency(group, n, key) for group in groups for key in SALIENCY)
    ]
    if not names:
        return None
    rows = []
    for group in groups:
        for name in names:
            found = [_saliency(group, name, key) for key in SALIENCY]
            if any(found) or name == names[0]:
                agent = Cell(group.agent, flag=flag(group))
                rows.append([agent, Cell(name), *(_share(values) for values in found)])
    evaluations = [run.evaluation for group in groups for run in group.runs if run.evaluation]
    foregrounds = dict.fromkeys(evaluation.foreground for evaluation in evaluations)
    head = ["agent", "distraction", "IoU", "energy", "pointing", "area (a random look)"]
    caption = (
        f"Where agents look on {env_id}: share of saliency on the foreground, mean over runs with its "
        "95 % interval."
    )
    notes = (
        "IoU: overlap of the most salient pixels with it. Energy: share of all saliency inside "
        "it. Pointing: how often the most salient pixel lies on it. Area: the foreground's share of the "
        "picture, which is the energy and the pointing of a look that knows nothing. "
        f"The foreground is {' or '.join(foregrounds)}.",
        *learned_notes(groups),
    )
    return Table(f"looks-{slug(env_id)}", caption, head, rows, notes)


def _saliency(group: Group, name: str, key: str) -> list[float]:
    results = (run.evaluation.results.get(name) for run in group.runs if run.evaluation)
    return [result.saliency[key] for result in results if result and key in result.saliency]


def _share(values: list[float]) -> Cell:
    if not values:
        return Cell("–")
    if len(values) == 1:
        return Cell(f"{values[0]:.2f}", "†")
    interval = stratified_bootstrap([np.array(values)], mean)
    return Cell(
        f"{interval.point:.2f}", f"{limits(interval.low, interval.high, 1)} n = {len(values)}"
    )


def _agent(aggregates: Aggregates, agent: str) -> Cell:
    """Return the head of a row: the agent, its runs, and on what it did not learn."""
    failed = aggregates.unlearned[agent]
    runs = {aggregates.scores[agent, name].runs for name in aggregates.distractions}
    *fewer, most = sorted(runs)
    below = (" or ".join([*map(str, fewer), count(most, "run")]),)
    total = len(counted_tasks(aggregates))
    where = "" if len(failed) == total else f" on {len(failed)} of {total} tasks"
    return Cell(agent, below=below, flag=f"{FLAG}{where}" if failed else "")


def _interval(
    aggregates: Aggregates, value: Interval | None, scale: float = 1, unit: str = ""
) -> Cell:
    if value is None:
        return Cell("–")
    text = f"{number(float(value.point), scale)}{unit}"
    return Cell(text, limits(value.low, value.high, scale) if aggregates.has_intervals else "†")


def _notes(aggregates: Aggregates) -> tuple[str, ...]:
    short = {a: aggregates.unlearned[a] + aggregates.unknown[a] for a in aggregates.agents}
    learned = [agent for agent in aggregates.agents if not short[agent]]
    texts = [f"Tasks: {', '.join(counted_tasks(aggregates))}."]
    if learned:
        texts.append(f"Learned on all of them: {', '.join(learned)}.")
    else:
        texts.append("No agent is known to have learned on all of them.")
    if not aggregates.has_intervals:
        texts.append("† An agent has one run on a task: no interval over runs can be given.")
    return (*texts, *aggregates.left_out)
