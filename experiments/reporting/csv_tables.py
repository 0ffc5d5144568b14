"""The report's numbers as CSV: one line per number, with its interval and its counts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from itertools import product

from experiments.reporting.aggregates import Aggregates
from experiments.reporting.runs import AXES
from experiments.reporting.scores import Summary, curve, efficiency_tag, return_tags
from experiments.reporting.settings import differing, settings
from experiments.reporting.statistics import Statistic

Rows = Iterable[Mapping[str, object]]


def score_rows(summary: Summary) -> Rows:
    """Return a line per task, agent and distraction; the random policy is an agent here."""
    for env_id in summary.env_ids:
        rows = [
            (group.agent, name, group.scores[name], group.learned)
            for group in summary.of(env_id)
            for name in summary.distractions(env_id)
            if name in group.scores
        ]
        if env_id in summary.random:
            rows.append(("random", "clean", summary.random[env_id], None))
        for agent, name, score, learned in rows:
            over = "seeds" if score.runs > 1 else "episodes"
            low, high = score.gap_interval or (None, None)
            yield {
                "env": env_id,
                "agent": agent,
                "distraction": name,
                "mean": score.mean,
                "low_95": score.low,
                "high_95": score.high,
                "iqm": score.iqm,
                "gap_percent": score.gap,
                "gap_low_95": low,
                "gap_high_95": high,
                "success": score.success,
                "seeds": score.runs if agent != "random" else None,
                "episodes": score.episodes,
                "interval_over": over,
                "learned": learned,
            }


def curve_rows(summary: Summary, statistic: Statistic) -> Rows:
    """Return the points of every learning curve, over agent steps."""
    for group in summary.groups:
        for tag in return_tags(group.runs):
            line = curve(group.runs, tag, statistic)
            if line is None:
                continue
            for step, point, low, high in zip(
                line.spent, line.point, line.low, line.high, strict=True
            ):
                yield {
                    "env": group.env_id,
                    "agent": group.agent,
                    "tag": tag,
                    "agent_steps": step,
                    "value": point,
                    "low_95": low if line.seeds > 1 else None,
                    "high_95": high if line.seeds > 1 else None,
                    "seeds": line.seeds,
                    "learned": group.learned,
                }


def efficiency_rows(summary: Summary, statistic: Statistic) -> Rows:
    """Return the points of the sample-efficiency curves, over each cost."""
    for env_id in summary.env_ids:
        tag = efficiency_tag(run for group in summary.of(env_id) for run in group.runs)
        for group, axis in product(summary.of(env_id) if tag else (), AXES):
            line = curve(group.runs, tag or "", statistic, axis)
            points = zip(line.spent, line.point, line.low, line.high, strict=True) if line else ()
            for spent, point, low, high in points:
                yield {
                    "env": env_id,
                    "agent": group.agent,
                    "tag": tag,
                    "axis": axis,
                    "spent": spent,
                    "value": point,
                    "low_95": low if line and line.seeds > 1 else None,
                    "high_95": high if line and line.seeds > 1 else None,
                    "seeds": line.seeds if line else None,
                    "learned": group.learned,
                }


def aggregate_rows(aggregates: Aggregates | None) -> Rows:
    """Return a line per agent, distraction and aggregate, over the tasks that all agents share."""
    if aggregates is None:
        return
    for (agent, name), found in aggregates.scores.items():
        values = {
            "mean": found.mean,
            "iqm": found.iqm,
            "optimality_gap": found.optimality_gap,
            "gap_percent": found.gap,
        }
        improvements = {
            f"probability_of_improvement over {other}": interval
            for (ours, other, where), interval in aggregates.improvement.items()
            if (ours, where) == (agent, name)
        }
        for quantity, interval in (values | improvements).items():
            if interval is None:
                continue
            yield {
                "agent": agent,
                "distraction": name,
                "quantity": quantity,
                "value": float(interval.point),
                "low_95": float(interval.low) if aggregates.has_intervals else None,
                "high_95": float(interval.high) if aggregates.has_intervals else None,
                "runs": found.runs,
                "tasks": " ".join(aggregates.tasks[name]),
                "did_not_learn_on": " ".join(aggregates.unlearned[agent]),
            }


def looks_rows(summary: Summary) -> Rows:
    """Return a line per run, distraction and measure of saliency."""
    for group in summary.groups:
        for run in group.runs:
            results = run.evaluation.results if run.evaluation else {}
            for name, result in results.items():
                for measure, value in result.saliency.items():
                    yield {
                        "env": run.env_id,
                        "agent": run.agent,
                        "seed": run.seed,
                        "distraction": name,
                        "measure": measure,
                        "value": value,
                        "learned": group.learned,
                    }


def run_rows(summary: Summary) -> Rows:
    """Return a line per run: its cost, its returns and the settings in which runs differ."""
    names = differing(summary.runs)
    for group in summary.groups:
        for run in group.runs:
            found = settings(run)
            returns = run.evaluation.results if run.evaluation else {}
            yield {
                "run": str(run.path),
                "env": run.env_id,
                "agent": run.agent,
                "seed": run.seed,
                "learned": group.learned,
                **run.counters,
                **{f"return {name}": result.returns.mean() for name, result in returns.items()},
                **{name: found.get(name) for name in names},
            }


def to_csv(rows: Rows) -> bytes:
    """Return a table whose columns are all keys in order of appearance; None is an empty cell."""
    rows = [
        {key: f"{value:.7g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
