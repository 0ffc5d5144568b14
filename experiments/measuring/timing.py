"""How the speed tables measure: everything that is compared takes turns, of whichever process it is."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

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
    where the times do not. So it is with the calls of an `Elsewhere`: its process sleeps while others have their turn.

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


class Elsewhere:
    """Another Python process whose calls are timed there, by its own clock, when it is their turn here.

    Args:
        module: run as `python -m module *arguments`; it must call `serve`.
        arguments: of its command line.
        without: environment variables of this process that it shall not have.
        python: which Python; None for this one.
        environment: its variables instead of this process's, with this one's packages.

    Attributes:
        calls: what it serves, by name, for `interleave`.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        without: Sequence[str] = (),
        python: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if environment is None:
            own = {name: value for name, value in os.environ.items() if name not in without}
            environment = own | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._command = [str(python or sys.executable), "-W", "ignore", "-m", module, *arguments]
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.calls = {name: RemoteCall(self, name) for name in self._answer().split()}

    def seconds(self, name: str, repeats: int) -> float:
        """Return how long one call took there, of `repeats` in a row."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told when its answer is read
            self._process.stdin.write(f"{name} {repeats}\n")
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            command = " ".join(self._command)
            raise RuntimeError(f"'{command}' ended with exit code {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process: it sees that nobody will ask again."""
        self._process.communicate()


@dataclass(frozen=True)
class RemoteCall:
    """One of an `Elsewhere`'s calls."""

    process: Elsewhere
    name: str

    def __call__(self) -> None:
        """Call it once."""
        self.process.seconds(self.name, 1)


def serve(calls: Mapping[str, Callable[[], object]], requests: TextIO, answers: TextIO) -> None:
    """Be the other side of an `Elsewhere` until it closes: names first, then a time for each request.

    Args:
        calls: what may be asked for.
        requests: lines `name repeats`.
        answers: gets the names, then the seconds per call of each request.
    """
    print(*calls, file=answers, flush=True)
    for request in requests:
        name, repeats = request.split()
        print(_seconds(calls[name], int(repeats), lambda: None), file=answers, flush=True)


def _seconds(call: Callable[[], object], repeats: int, finish: Callable[[], object]) -> float:
    if isinstance(call, RemoteCall):
        return call.process.seconds(call.name, repeats)
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
