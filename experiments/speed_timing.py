"""How the speed tables measure: everything that is compared takes turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Cell = str | float

ROUNDS = 7
"""Turns of everything that is compared; the median of them counts."""


@dataclass
class Table:
    """Rows of names and numbers, and what to know when reading them."""

    title: str
    columns: Sequence[str]
    note: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def column(self, name: str) -> list[Cell]:
        """Return the cells of one column."""
        return [row[list(self.columns).index(name)] for row in self.rows]

    def markdown(self) -> str:
        """Return the table as people read it."""
        lines = [f"## {self.title}", "", _line(self.columns)]
        lines.append(_line(["---"] + ["---:"] * (len(self.columns) - 1)))
        lines += [_line([_text(cell) for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def interleave(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Return the median seconds that each call takes.

    A B A B instead of A A B B: what else runs on the machine then slows all of them alike, so that their ratios hold
    where the times do not.

    Args:
        calls: by name; each is called twice before the clock runs.
        seconds: about how long all of it takes.
        finish: waits for a device, before the clock is read.
    """
    repeats, block = {}, seconds / ROUNDS / len(calls)
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(block / max(_seconds(call, 1, finish), 1e-7)))
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            turns[name].append(_seconds(call, repeats[name], finish))
    return {name: statistics.median(times) for name, times in turns.items()}


def rates(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, per_call: float = 1
) -> dict[str, float]:
    """Return how often per second each call happens, times `per_call`; see `interleave`."""
    return {name: per_call / time for name, time in interleave(calls, seconds).items()}


def _seconds(call: Callable[[], object], repeats: int, finish: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return (time.perf_counter() - start) / repeats


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return (
        f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"
    )
