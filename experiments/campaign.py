"""Kill a run again and again, resume it every time, and compare its end with that of an undisturbed run.

    python -m experiments.campaign --kills 200 --workers 2 --out kills.md
    python -m experiments.campaign --agent sgqn --env dmc/cartpole-swingup --kills 20 -- --distraction video_hard

Kills are SIGKILL to the training process, at seeded moments of three kinds: while it starts, while it trains, and while
a checkpoint is half written. In the end both runs' newest and best checkpoints (networks, optimizers, replay, random
states, simulators) must be equal bit for bit, and metrics.csv must have the same lines, none of them missing or double.
Exits with 1 where they differ. The log is Markdown. A kill takes some seconds, most of them imports.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.registry import find
from envs.registry import get_spec
from experiments.compare import run_difference
from experiments.running.arguments import Parser, add_out_flags, check_out, make_folder, run_command
from experiments.running.runs import command_line, describe_system

MOMENTS = {"starting": 0.2, "training": 0.35, "saving": 0.45}
"""Kinds of moments and their shares."""
LOG_EVERY, CHECKPOINT_EVERY, EVAL_EVERY = 2, 8, 40
STEPS_PER_KILL = 48
"""Agent steps of the run for each kill, enough for the last kill to find it at work."""
RUN_FLAGS = [
    "--preset", "debug", "--device", "cpu", "--threads", "1", "--num-envs", "2",
    "--hidden", "16", "--feature-dim", "8", "--batch-size", "8", "--random-steps", "10",
    "--replay-capacity", "400", "--log-every", str(LOG_EVERY), "--checkpoint-every", str(CHECKPOINT_EVERY),
    "--eval-every", str(EVAL_EVERY), "--eval-episodes", "1",
]  # fmt: skip
"""A small run that learns, logs, evaluates and saves often; its replay wraps around."""
TAIL = 8192
"""Bytes at a log's end that hold its last whole line."""


@dataclass(frozen=True)
class Kill:
    """What one kill met."""

    is_saving: bool
    """It died while it wrote a checkpoint."""
    seconds: float
    """Life of the process."""
    resumed_from: int | None
    """Agent steps of the checkpoint that it began from; None for the run's beginning."""
    reached: int | None
    """Agent steps of the last line that it logged; None where it logged none."""
    newest: int | None
    """Agent steps of the newest checkpoint that it left."""
    half_written: bool
    """A half-written checkpoint lies there, its own or an earlier one's."""

    @property
    def moment(self) -> str:
        """Which kind of moment it met, whatever was waited for."""
        if self.is_saving:
            return "saving"
        is_past_start = self.reached is not None and self.reached > (self.resumed_from or 0)
        return "training" if is_past_start else "starting"


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.campaign", description=__doc__)
    p.add_argument("--agent", default="drq", help="agent [drq]")
    p.add_argument("--env", default="toy/reach", help="task id [toy/reach]")
    p.add_argument("--kills", type=int, default=200, help="how many [200]")
    p.add_argument("--workers", type=int, default=0, help="worker processes of the run [0]")
    p.add_argument("--seed", type=int, default=0, help="of the run and of the moments [0]")
    p.add_argument("--steps", type=int, help=f"agent steps of the run [{STEPS_PER_KILL} per kill]")
    p.add_argument("--folder", type=Path, help="keep both runs here [a temporary folder]")
    add_out_flags(p, "the log")
    p.add_argument("train_flags", nargs="*", metavar="-- FLAGS", help="flags for experiments.train")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    steps = STEPS_PER_KILL * arguments.kills if arguments.steps is None else arguments.steps
    if arguments.kills < 1 or steps < 1 or arguments.workers < 0 or arguments.seed < 0:
        raise UserError("--kills and --steps must be at least 1, --workers and --seed at least 0")
    find(arguments.agent)
    get_spec(arguments.env)
    check_out(arguments.out, overwrite=arguments.overwrite)
    flags = [
        "--agent", arguments.agent, "--env", arguments.env, "--steps", str(steps),
        "--seed", str(arguments.seed), "--workers", str(arguments.workers),
        *RUN_FLAGS, *arguments.train_flags,
    ]  # fmt: skip
    if arguments.folder is not None:
        make_folder(arguments.folder, "--folder")
        folder = arguments.folder.resolve()  # processes start elsewhere
        return campaign(folder, flags, arguments.kills, arguments.seed, arguments.out)
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        return campaign(Path(temporary), flags, arguments.kills, arguments.seed, arguments.out)


def campaign(folder: Path, flags: Sequence[str], kills: int, seed: int, out: Path | None) -> int:
    """Train both runs, compare them, write the log, and return the exit code.

    Args:
        folder: gets the runs `undisturbed` and `killed`, and what their processes print.
        flags: of both runs.
        kills: how many.
        seed: of the moments.
        out: a Markdown file for the log.

    Raises:
        UserError: a run could not be trained, or ended before its last kill.
    """
    whole, run = folder / "undisturbed", folder / "killed"
    for taken in (whole, run):
        if taken.exists():
            raise UserError(f"'{taken}' exists; remove it or give another --folder")
    clock = time.perf_counter()
    with Child(whole, flags) as first:
        first.wait_for(lambda: steps_logged(whole, first.started) is not None)
        startup = time.perf_counter() - clock
        first.end()
    print(
        f"undisturbed: {time.perf_counter() - clock:.0f} s, of which {startup:.1f} s to start",
        flush=True,
    )
    random = np.random.default_rng(seed)
    log: list[Kill] = []
    while len(log) < kills:
        log.append(kill_once(run, flags, random, startup))
        print(_row(len(log), log[-1]), flush=True)
    with Child(run, flags) as last:
        last.end()
    different = run_difference(whole, run)
    text = report(log, different, flags, time.perf_counter() - clock)
    print(text.split("\n| kill |")[0])
    if out is not None:
        out.write_text(text)
    return 1 if different else 0


class Child:
    """`python -m experiments.train` as a process of its own; it goes on with the run where there is one.

    It is a context, at whose end the process ends too.
    """

    def __init__(self, run: Path, flags: Sequence[str]) -> None:
        self.resumed_from = newest_step(run)
        words = [*flags, "--run-dir", str(run)]
        if (run / "config.json").exists():
            words = ["--resume", str(run)]
        self._log = run.with_name(f"{run.name}.log")
        self.started = time.time_ns()
        # From where the user stands, so that flags mean the same files; and this very source, wherever that is.
        home = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        with self._log.open("w") as handle:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *words],
                env=os.environ | {"PYTHONPATH": paths}, stdout=handle, stderr=handle,
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> int:
        """Kill the process if it is not gone, and return its exit code."""
        self.process.kill()
        return self.process.wait()

    def wait_for(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment in the process's life.

        Raises:
            UserError: it ended before.
        """
        while not moment():
            if self.process.poll() is not None:
                raise UserError(
                    f"training ended with exit code {self.process.returncode} before the moment to kill it; "
                    f"give more --steps, or see what it said: {self._said()}"
                )
            time.sleep(0.0005)

    def end(self) -> None:
        """Let it train to its end.

        Raises:
            UserError: it failed.
        """
        if code := self.process.wait():
            raise UserError(f"training ended with exit code {code}: {self._said()}")

    def _said(self) -> str:
        lines = self._log.read_text().splitlines()
        return lines[-1] if lines else "nothing"


def kill_once(run: Path, flags: Sequence[str], random: np.random.Generator, startup: float) -> Kill:
    """Start or go on with a run, and kill it at a moment that is drawn.

    Args:
        run: its folder.
        flags: of a run that is begun.
        random: draws the moment.
        startup: seconds that a process takes to its first logged line.
    """
    moment = str(random.choice(list(MOMENTS), p=list(MOMENTS.values())))
    until = float(random.uniform(0, startup))
    pause = LOG_EVERY * int(random.integers(1, 8))
    delay = float(random.uniform(0, 0.02))  # about as long as a small checkpoint takes
    clock = time.perf_counter()
    with Child(run, flags) as child:
        if moment == "starting":
            child.wait_for(lambda: time.perf_counter() - clock >= until)
        else:
            goal = (child.resumed_from or 0) + pause
            child.wait_for(lambda: (steps_logged(run, child.started) or 0) >= goal)
            if moment == "saving":
                child.wait_for(lambda: is_saving(run, child.started))
            began = time.perf_counter()
            child.wait_for(lambda: time.perf_counter() - began >= delay)
    if child.kill() != -signal.SIGKILL:
        raise UserError("training ended by itself in the moment of its kill; give more --steps")
    return Kill(
        is_saving(run, child.started),
        time.perf_counter() - clock,
        child.resumed_from,
        steps_logged(run, child.started),
        newest_step(run),
        any((run / "checkpoints").glob(".writing-step-*/*")),
    )


def steps_logged(run: Path, since: int) -> int | None:
    """Return the last whole line's agent steps of a metrics.csv written after `since` (ns); None without one."""
    try:
        with (run / "metrics.csv").open("rb") as handle:
            if handle.seek(0, 2) == 0 or (run / "metrics.csv").stat().st_mtime_ns < since:
                return None
            handle.seek(max(handle.tell() - TAIL, 0))
            lines = handle.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    number = lines[-1].split(b",")[0] if lines else b""
    return int(number) if number.isdigit() else None


def newest_step(run: Path) -> int | None:
    """Return the newest checkpoint's agent steps; None where there is none."""
    folder = CheckpointStore(run).latest()
    return int(folder.name.rpartition("-")[2]) if folder else None


def is_saving(run: Path, since: int) -> bool:
    """Whether a checkpoint is half written, by a process that was started at `since` (ns)."""
    with suppress(FileNotFoundError):
        files = list((run / "checkpoints").glob(".writing-*/*"))
        return any(file.stat().st_mtime_ns > since for file in files)
    return False


def report(log: Sequence[Kill], different: str | None, flags: Sequence[str], seconds: float) -> str:
    """Return the campaign's log as Markdown."""
    system = describe_system()
    kinds = Counter(kill.moment for kill in log)
    half = sum(kill.half_written for kill in log)
    outcome = f"**they differ**: {different}" if different else "**equal, bit for bit**"
    lines = [
        "# Kill campaign",
        "",
        "```",
        command_line(),
        "```",
        "",
        f"Commit {system['commit']}, {system['hardware']['cpu']}, {system['hardware']['cores']} cores, torch "
        f"{system['versions']['torch']}; {seconds / 60:.0f} minutes.",
        "",
        f"Two runs of `python -m experiments.train {' '.join(flags)}`: one undisturbed, one killed by SIGKILL "
        f"{len(log)} times ({', '.join(f'{kinds[kind]} while {kind}' for kind in MOMENTS)}) and resumed every time; "
        f"{half} kills left a half-written checkpoint. Compared in the end: the newest checkpoint with networks, "
        "optimizers, the whole replay, random states, counters and simulators, the best checkpoint, and every line of "
        "metrics.csv but wall-clock, none missing and none double.",
        "",
        f"Outcome: {outcome}.",
        "",
        "| kill | while | after seconds | resumed from step | reached step | newest checkpoint | half-written left |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- |",
        *(_row(number, kill) for number, kill in enumerate(log, start=1)),
        "",
    ]
    return "\n".join(lines)


def _row(number: int, kill: Kill) -> str:
    numbers = (kill.resumed_from, kill.reached, kill.newest)
    shown = " | ".join("-" if value is None else f"{value:,}" for value in numbers)
    half = "yes" if kill.half_written else ""
    return f"| {number} | {kill.moment} | {kill.seconds:.1f} | {shown} | {half} |"


if __name__ == "__main__":
    raise SystemExit(main())
