"""Plots of generators' fine-tuning: everything that a monitor measured, and the gains of a grid's methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from agents.core.errors import full_disk_named
from agents.generative_models.monitor import Measurement, on_frontier
from experiments.reporting.statistics import Interval


def monitor_plot(
    file: Path, history: Sequence[Measurement], tolerance: float, *, proxy: str, gold: str
) -> None:
    """Draw what the monitor measured: rewards, diversity, KL, and gold against KL with its frontier.

    Args:
        file: PNG.
        history: at least one measurement.
        tolerance: see `on_frontier`.
        proxy: name of the reward that is optimized.
        gold: name of the one that is not.
    """
    steps = [each.step for each in history]

    def series(name: str) -> list[float]:
        return [each.values[name] for each in history]

    figure, ((rewards, diversity), (divergence, frontier)) = plt.subplots(
        2, 2, figsize=(9, 6.5), layout="constrained"
    )
    error = [
        float(np.std(each.gold_by_prompt)) / math.sqrt(len(each.gold_by_prompt)) for each in history
    ]
    lines = rewards.plot(steps, series("proxy"), "k--", marker="o", label="optimized")
    other = rewards.twinx()  # rewards have scales of their own
    lines += [
        other.errorbar(
            steps,
            series("gold"),
            error,
            color="tab:orange",
            marker="s",
            capsize=2,
            label="not optimized",
        )
    ]
    rewards.set(title="Rewards on held-out prompts", xlabel="iteration", ylabel=f"proxy: {proxy}")
    other.set_ylabel(f"gold: {gold} (1 standard error)", color="tab:orange")
    rewards.legend(handles=lines, fontsize=8)
    for name, style in (("recall", "k-"), ("precision", "k:")):
        diversity.plot(steps, series(name), style, marker=".", label=f"{name} against the base")
    diversity.plot(
        steps,
        series("distance"),
        "--",
        color="tab:orange",
        marker=".",
        label="distance in a prompt",
    )
    diversity.set(
        title="Diversity", xlabel="iteration", ylabel="share, or distance", ylim=(0, None)
    )
    divergence.plot(steps, series("kl"), "k-", marker=".")
    divergence.set(
        title="Distance from the base", xlabel="iteration", ylabel="KL (nats of a chain)"
    )
    kept = on_frontier(history, tolerance)
    for wanted, marker, label in (
        (True, "o", "on the frontier"),
        (False, "x", "an earlier one is better"),
    ):
        chosen = [place for place, on in enumerate(kept) if on == wanted]
        if chosen:
            frontier.scatter(
                [math.sqrt(series("kl")[place]) for place in chosen],
                [series("gold")[place] for place in chosen],
                marker=marker, color="black" if wanted else "tab:red", label=label,
            )  # fmt: skip
    frontier.set(title="Frontier", xlabel="square root of the KL (nats)", ylabel=f"gold: {gold}")
    for axis in (diversity, frontier):
        axis.legend(fontsize=8)
    _save(figure, file)


def gains_plot(
    file: Path, gains: Mapping[str, Interval], steered: Mapping[str, Interval], *, of_what: str
) -> None:
    """Draw each method's gain over the base with its interval, one below the other.

    Args:
        file: PNG.
        gains: by method that was trained, in order from above.
        steered: by method that steers, below a line, for it spends otherwise.
        of_what: the reward.
    """
    rows = [*gains.items(), *((f"{name}, steered", value) for name, value in steered.items())]
    figure, axis = plt.subplots(figsize=(6.5, 1 + 0.28 * len(rows)), layout="constrained")
    for place, (_, value) in enumerate(rows):
        clears = value.low > 0
        point = float(value.point)
        reach = [[point - float(value.low)], [float(value.high) - point]]
        axis.errorbar(
            point, place, xerr=reach, fmt="o" if clears else "x", capsize=3,
            color="black" if clears else "tab:red",
        )  # fmt: skip
    axis.axvline(0, color="gray", linestyle="--", linewidth=1)
    if gains and steered:
        axis.axhline(len(gains) - 0.5, color="gray", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"gain of {of_what} over the base (95 % interval; x: does not clear it)")
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    """Write a figure that appears whole or not at all."""
    with full_disk_named(file.parent):
        temporary = file.with_suffix(".tmp")
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(file)
    plt.close(figure)
