"""The figures over all tasks: aggregates with intervals, and performance profiles."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.aggregates import (
    THRESHOLDS,
    Aggregate,
    Aggregates,
    counted_tasks,
)
from experiments.reporting.plots import STYLE, legend, png, style
from experiments.reporting.scores import Summary
from experiments.reporting.statistics import Interval


def aggregates(summary: Summary, found: Aggregates) -> bytes:
    """Draw IQM, optimality gap and mean of every agent under every distraction."""
    panels = (
        ("interquartile mean", "normalized score", "iqm"),
        ("optimality gap", "score missing to 1 (lower is better)", "optimality_gap"),
        ("mean", "normalized score", "mean"),
    )
    lines = len(found.distractions) * max(2, len(found.agents))
    height = 1.2 + lines * min(
        0.24, max(0.13, 8 / lines)
    )  # a page where a marker's height allows it
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, height), layout="constrained")
        axes_row = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, label, field) in zip(axes_row, panels, strict=True):
            axes.set_title(title)
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
            for place in range(0, len(found.distractions), 2):
                axes.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", lw=0, zorder=0)
            for index, agent in enumerate(found.agents):
                _dots(axes, summary, found, agent, index, field)
        axes_row[0].set_yticks(range(len(found.distractions)), found.distractions)
        axes_row[0].set_ylim(len(found.distractions) - 0.5, -0.5)
        legend(figure, axes_row)
        return png(figure)


def _dots(
    axes: Axes, summary: Summary, found: Aggregates, agent: str, index: int, field: str
) -> None:
    color, _, marker = style(summary, agent)
    scores: list[Aggregate] = [found.scores[agent, name] for name in found.distractions]
    values: list[Interval] = [getattr(score, field) for score in scores]
    points = np.array([float(value.point) for value in values])
    spread = None
    if found.has_intervals:
        ends = np.array([[value.low, value.high] for value in values], dtype=np.float64).T
        # Percentile intervals of skewed resamples may leave the point itself outside.
        spread = np.maximum([points - ends[0], ends[1] - points], 0)
    offset = 0.7 * ((index + 0.5) / len(found.agents) - 0.5)
    axes.errorbar(
        points,
        np.arange(len(points)) + offset,
        xerr=spread,
        fmt=marker,
        color=color,
        markeredgecolor="black",
        markeredgewidth=0.5,
        capsize=2.5,
        elinewidth=1.4,
        label=_label(found, agent, scores),
    )


def profiles(summary: Summary, found: Aggregates) -> bytes:
    """Draw the share of runs above each normalized score, a panel per distraction."""
    columns = min(2 if len(found.distractions) == 4 else 3, len(found.distractions))
    rows = -(-len(found.distractions) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.8 + 2.3 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, name in zip(panels, found.distractions, strict=False):
            axes.set_title(name)
            for agent in found.agents:
                color, dashes, marker = style(summary, agent)
                score = found.scores[agent, name]
                axes.plot(
                    THRESHOLDS,
                    score.profile.point,
                    color=color,
                    ls=dashes,
                    marker=marker,
                    markevery=(5 + 3 * found.agents.index(agent), 25),
                    drawstyle="steps-post",
                    label=_label(found, agent, [score]),
                )
                if found.has_intervals:
                    axes.fill_between(
                        THRESHOLDS,
                        score.profile.low,
                        score.profile.high,
                        step="post",
                        color=color,
                        alpha=0.15,
                        lw=0,
                    )
            axes.set_ylim(-0.03, 1.03)
            axes.set_xlim(0, 1)
        for axes in panels[len(found.distractions) :]:
            axes.remove()
        figure.supxlabel("normalized score τ", fontsize=9)
        figure.supylabel("share of runs with score > τ", fontsize=9)
        legend(figure, panels[: len(found.distractions)])
        return png(figure)


def _label(found: Aggregates, agent: str, scores: list[Aggregate]) -> str:
    counts = sorted({score.runs for score in scores})
    failed, total = len(found.unlearned[agent]), len(counted_tasks(found))
    where = "" if failed == total else f" on {failed} of {total} tasks"
    state = f", did not learn{where}" if failed else ""
    return f"{agent} (n = {' or '.join(map(str, counts))}{state})"
