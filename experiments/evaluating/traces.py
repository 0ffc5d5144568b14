"""A plot of what was done and earned in an episode."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure

_LOOKS = [(line, shade) for shade in ("black", "dimgray", "darkgray") for line in ("-", "--", ":")]
"""Styles that are told apart in grey."""
_MOST = 12
"""Entries of an action that are drawn at most."""


def draw_trace(
    file: Path,
    actions: np.ndarray,
    rewards: Sequence[float],
    *,
    success: Sequence[float] | None = None,
    title: str = "",
) -> None:
    """Write a plot of an episode; an old file is replaced.

    Args:
        file: ends in .png.
        actions: [T, A], or [T] of discrete ones.
        rewards: [T].
        success: 0 or 1 before the first action and after each, [T + 1]; None where the task does not tell.
        title: stands above.
    """
    columns = np.asarray(actions, np.float64).reshape(len(actions), -1)
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for number, (line, color) in zip(
        range(min(columns.shape[1], _MOST)), cycle(_LOOKS), strict=False
    ):
        above.step(
            range(len(columns)),
            columns[:, number],
            where="post",
            ls=line,
            c=color,
            label=str(number),
        )
    above.set_ylabel("action")
    above.legend(title="entry", fontsize="x-small", ncols=3, loc="upper right")
    if columns.shape[1] > _MOST:
        title = f"{title} (the first {_MOST} of {columns.shape[1]} entries of actions)"
    above.set_title(title)
    steps = np.arange(1, len(rewards) + 1)
    below.plot(steps, rewards, c="dimgray", ls="--", label="reward")
    below.set_ylabel("reward of the step")
    below.set_xlabel("agent steps")
    total = below.twinx()
    total.plot(steps, np.cumsum(rewards), c="black", label="return")
    total.set_ylabel("return so far")
    solved = np.flatnonzero(np.asarray(success if success is not None else []) > 0)
    if len(solved):
        total.axvline(solved[0], c="black", ls=":", label="first solved")
    handles = [part for axes in (below, total) for part in axes.get_legend_handles_labels()[0]]
    below.legend(handles=handles, fontsize="x-small", loc="upper left")
    figure.savefig(file, dpi=100)
