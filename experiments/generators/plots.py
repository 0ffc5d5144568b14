"""One plot of everything that the monitor of a generator's fine-tuning measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from agents.core.errors import full_disk_named
from agents.generative_models.monitor import Measurement, on_frontier


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
    with full_disk_named(file.parent):
        temporary = file.with_suffix(".tmp")
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(file)
    plt.close(figure)
