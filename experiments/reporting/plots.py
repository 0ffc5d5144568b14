"""The report's figures as PNG bytes: readable in grey, on a phone, and by color-blind eyes.

Agents differ in color, line style and marker at once. The colors are Okabe and Ito's, ordered so
that neighbors differ in lightness too.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.typing import LineStyleType

from experiments.reporting.published import Comparison, beside
from experiments.reporting.runs import AXES, Axis, Run
from experiments.reporting.scores import (
    Curve,
    Group,
    Summary,
    align,
    curve,
    efficiency_tag,
    return_tags,
)
from experiments.reporting.statistics import Statistic

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#D55E00")
LINES: tuple[LineStyleType, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1)),
    (0, (1, 1)),
    (0, (7, 2)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Style = tuple[str, LineStyleType, str]
AXIS_LABELS: dict[Axis, str] = {
    "agent_steps": "agent steps",
    "env_frames": "environment frames",
    "gradient_updates": "gradient updates",
    "wall_minutes": "wall clock (minutes)",
}
MAX_PANELS = 12
"""Of what else was logged; losses come first."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def learning_curves(
    summary: Summary,
    env_id: str,
    statistic: Statistic,
    published: Sequence[Comparison] = (),
) -> bytes | None:
    """Draw returns in training and in evaluation over agent steps, with 95 % bands over seeds.

    Published end points of the same protocol stand at their own agent steps.
    """
    runs = [run for group in summary.of(env_id) for run in group.runs]
    panels = return_tags(runs)

    def draw(axes: Axes, tag: str) -> None:
        axes.set_title(panels[tag])
        axes.set_ylabel("return per episode")
        if env_id in summary.random:
            _random_line(axes, summary.random[env_id].mean)
        for group in summary.of(env_id):
            line = curve(group.runs, tag, statistic)
            if line is not None:
                _band(axes, _label(group, line.seeds), style(summary, group.agent), line)
            name = tag.split("/")[1] if tag.startswith("eval/") else ""
            for found in beside(published, group, name):
                _published(axes, found.row.agent_steps, found, style(summary, group.agent))

    return _grid(list(panels), _step_label(runs), draw)


def efficiency(summary: Summary, env_id: str, statistic: Statistic) -> bytes | None:
    """Draw the return against each cost: steps, frames, updates and minutes."""
    tag = efficiency_tag(run for group in summary.of(env_id) for run in group.runs)
    if tag is None:
        return None

    def draw(axes: Axes, name: str) -> None:
        axis: Axis = next(axis for axis in AXES if axis == name)
        axes.set_xlabel(AXIS_LABELS[axis])
        axes.set_ylabel("return per episode")
        if env_id in summary.random:
            _random_line(axes, summary.random[env_id].mean)
        apart = []
        for group in summary.of(env_id):
            line = curve(group.runs, tag, statistic, axis)
            if line is not None:
                _band(axes, _label(group, line.seeds), style(summary, group.agent), line)
            elif any(tag in run.series for run in group.runs):
                apart.append(group.agent)
        if apart:
            text = f"not drawn, seeds share no range: {', '.join(apart)}"
            axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top", fontsize=7)

    return _grid(list(AXES), "", draw)


def diagnostics(summary: Summary, env_id: str) -> bytes | None:
    """Draw everything else that was logged (losses, times, norms) as means over seeds."""
    runs = [run for group in summary.of(env_id) for run in group.runs]
    tags = {tag for run in runs for tag in run.series if not tag.startswith(("train/", "eval/"))}

    def draw(axes: Axes, tag: str) -> None:
        axes.set_title(tag)
        axes.set_ylabel(_unit(tag))
        for group in summary.of(env_id):
            aligned = align(group.runs, tag)
            if aligned is not None:
                steps, values = aligned
                color, dashes, _ = style(summary, group.agent)
                label = _label(group, len(values))
                axes.plot(steps, values.mean(0), color=color, ls=dashes, label=label)

    panels = sorted(tags, key=_panel_order)[:MAX_PANELS]
    return _grid(panels, _step_label(runs), draw, columns=3)


def generalization(
    summary: Summary, env_id: str, published: Sequence[Comparison] = ()
) -> bytes | None:
    """Draw the mean return under every distraction with its interval.

    Published numbers stand beside only where `Comparison.comparable` says so.
    """
    names = summary.distractions(env_id)
    groups = [group for group in summary.of(env_id) if group.scores]
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        is_crowded = sum(map(len, names)) > 60  # characters that fit side by side
        figure = Figure(figsize=(7.0, 3.5 if is_crowded else 3.0), layout="constrained")
        axes = figure.subplots()
        if env_id in summary.random:
            random = summary.random[env_id]
            axes.axhspan(random.low, random.high, color="#dddddd", lw=0)
            _random_line(axes, random.mean)
        for index, group in enumerate(groups):
            color, _, marker = style(summary, group.agent)
            places = [i for i, name in enumerate(names) if name in group.scores]
            scores = [group.scores[names[i]] for i in places]
            shift = 0.12 * (index - (len(groups) - 1) / 2)
            means = np.array([score.mean for score in scores])
            # The mean of equal numbers may miss them by rounding, and so lie outside of their interval.
            spread = [means - [s.low for s in scores], [s.high for s in scores] - means]
            axes.errorbar(
                np.array(places) + shift,
                means,
                yerr=np.maximum(spread, 0),
                fmt=marker,
                color=color,
                markeredgecolor="black",
                markeredgewidth=0.5,
                markersize=6,
                capsize=3,
                elinewidth=1.4,
                label=_label(group, max(score.runs for score in scores)),
            )
            for place in places:
                near = [c for c in beside(published, group, names[place]) if c.comparable]
                for k, found in enumerate(near, 1):
                    _published(axes, place + shift + 0.04 * k, found, style(summary, group.agent))
        axes.set_xticks(range(len(names)), names)
        if is_crowded:
            axes.tick_params("x", labelrotation=40)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("return per episode")
        axes.set_xlabel("distraction in evaluation")
        legend(figure, [axes])
        return png(figure)


def _random_line(axes: Axes, value: float) -> None:
    axes.axhline(value, color="#777777", lw=1, ls=(0, (2, 3)), label="random")


def _band(axes: Axes, label: str, look: Style, line: Curve) -> None:
    color, dashes, marker = look
    axes.plot(
        line.spent,
        line.point,
        color=color,
        ls=dashes,
        marker=marker,
        markevery=max(1, len(line.spent) // 8),
        label=label,
    )
    if line.seeds > 1:
        axes.fill_between(line.spent, line.low, line.high, color=color, alpha=0.18, lw=0)
        for limit in (line.low, line.high):
            axes.plot(line.spent, limit, color=color, lw=0.5, alpha=0.6)


def _published(axes: Axes, place: float, found: Comparison, look: Style) -> None:
    """Draw a published number as an open marker in its agent's color; the table tells them apart."""
    color, _, marker = look
    axes.errorbar(
        place,
        found.row.mean,
        yerr=found.row.std,
        fmt=marker,
        color=color,
        markerfacecolor="white",
        markersize=7,
        capsize=5,
        elinewidth=0.8,
        label=f"{found.row.agent.partition(' (')[0]}, published",
    )


def _grid(
    tags: list[str], label: str, draw: Callable[[Axes, str], None], columns: int = 2
) -> bytes | None:
    """Draw one panel per tag, `columns` in a row, under one shared legend."""
    if not tags:
        return None
    columns = min(columns, len(tags))
    rows = -(-len(tags) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.6 + 4.6 / columns * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, tag in zip(panels, tags, strict=False):
            draw(axes, tag)
            if tag != "wall_minutes":  # 20m would read as minutes, and is 0.02
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(10 // columns))
            axes.set_xlim(left=0)
        for axes in panels[len(tags) :]:
            axes.remove()
        if label:
            figure.supxlabel(label, fontsize=9)
        legend(figure, panels[: len(tags)])
        return png(figure)


def legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Put one legend with every label above the panels."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=min(5, len(entries), max(1, 108 // (7 + max(map(len, entries))))),
            handlelength=2.6,
            columnspacing=1.4,
        )


def style(summary: Summary, agent: str) -> Style:
    """Return an agent's look, the same in every figure of a report.

    When the colors begin again, lines and markers go on by one and by two: no pair of them comes twice in 49 agents.
    """
    index = sorted({group.agent for group in summary.groups}).index(agent)
    turn, place = divmod(index, 7)
    return COLORS[place], LINES[(place + turn) % 7], MARKERS[(place + 2 * turn) % 7]


def _label(group: Group, seeds: int) -> str:
    """Return an agent's name in a legend, with its seeds and whether it learned."""
    return f"{group.agent} (n = {seeds}{', did not learn' if group.learned is False else ''})"


def _step_label(runs: list[Run]) -> str:
    repeats = sorted({str(run.config["env"].get("action_repeat")) for run in runs} - {"None"})
    if not repeats:
        return "agent steps"
    return f"agent steps (environment frames = agent steps × {' or '.join(repeats)})"


def _unit(tag: str) -> str:
    if tag.endswith("_ms"):
        return "ms per agent step"
    if tag.endswith("_per_second"):
        return "1 / s"
    if tag.endswith("fps"):
        return "frames / s"
    return "loss" if tag.startswith("loss/") else "value"


def _panel_order(tag: str) -> tuple[int, str]:
    order = ("loss/", "value/", "policy/", "gradient_norm/", "saliency/", "time/")
    return next((i for i, prefix in enumerate(order) if tag.startswith(prefix)), len(order)), tag


def png(figure: Figure) -> bytes:
    """Return the figure's bytes."""
    buffer = io.BytesIO()
    # No creation time or version inside: the same runs give the same bytes.
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
