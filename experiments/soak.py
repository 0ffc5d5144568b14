"""Watch the memory: an hour of training with an evaluation every minute, ten thousand environments made and closed.

    python -m experiments.soak --minutes 60 --out soak/
    python -m experiments.soak --minutes 0 --cycles 10000 --out cycles/

Training is the real command with two workers, and is watched from outside. Writes a table and a plot of what it and its
workers hold (private memory, open files, threads, processes) and a README.md that says by how much memory
grew: the slope of a straight line through the second half, when the replay is full and every cache is warm. Exit code 1
where that is more than `--limit`.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import psutil

import envs
from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.registry import find
from experiments.running.arguments import Parser, make_folder, run_command, terminate_as_interrupt
from experiments.running.imports import add_import_flag
from experiments.running.runs import command_line, describe_system
from wrappers.distraction.presets import make_distraction

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HELD = ("megabytes", "files", "threads", "processes")
SECONDS_BETWEEN = 5.0
"""Between two measurements while training runs."""
MEASUREMENTS = 200
"""Of the cycles."""

Row = tuple[float, ...]
"""Time or count, then what is held."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.soak", description=__doc__)
    p.add_argument(
        "--out", type=Path, required=True, help="folder for the run and what is measured"
    )
    p.add_argument("--agent", default="drqv2", help="agent [drqv2]")
    p.add_argument("--env", default="dmc/cartpole-swingup", help="task [dmc/cartpole-swingup]")
    add_import_flag(p)
    p.add_argument("--distraction", default="video_hard", help="distraction [video_hard]")
    p.add_argument("--minutes", type=float, default=60.0, help="of training; 0 for none [60]")
    p.add_argument("--eval-every", type=int, default=4000, help="agent steps between evaluations, "
                   "about a minute on two cores [4000]")  # fmt: skip
    p.add_argument("--cycles", type=int, default=0, help="environments to create and close [0]")
    p.add_argument("--limit", type=float, default=50.0,
                   help="MB that may be lost in an hour, or in 10,000 environments [50]")  # fmt: skip
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.minutes < 0 or arguments.cycles < 0 or arguments.minutes + arguments.cycles == 0:
        raise UserError("nothing to do: give --minutes or --cycles above 0")
    if arguments.out.exists():
        raise UserError(f"'{arguments.out}' exists; give another --out")
    import_modules(arguments.imports)
    find(arguments.agent)
    envs.get_spec(arguments.env)
    make_distraction(arguments.distraction)
    if 0 < arguments.minutes < 1 / 3 or 0 < arguments.cycles < 100:
        raise UserError(
            "too little to tell growth from noise: give a third of a minute, or 100 cycles, at least"
        )
    terminate_as_interrupt()  # the training is ended too
    make_folder(arguments.out, "--out")
    grown = []
    scene = f"Task {arguments.env}, distraction {arguments.distraction}"
    of = f"{scene}, agent {arguments.agent}"
    if arguments.minutes:
        rows = watch_training(arguments)
        said = (arguments.out / "training.log").read_text()
        note = (
            f"{said.count('evaluation:')} evaluations; the log ends with: {said.splitlines()[-2]}"
        )
        lost = summarize(rows, arguments.out, "training", "minutes", per=60, of=of, note=note)
        grown.append(lost > arguments.limit or holds_more(rows))
    if arguments.cycles:
        rows = cycle(arguments.env, arguments.distraction, arguments.cycles)
        lost = summarize(rows, arguments.out, "environments", "closed", per=1000, of=scene)
        grown.append(lost > arguments.limit / 10 or holds_more(rows))
    return int(any(grown))


def watch_training(arguments: argparse.Namespace) -> list[Row]:
    """Train for some minutes, and return what was held every few seconds."""
    command = [
        sys.executable, "-m", "experiments.train", "--agent", arguments.agent, "--env", arguments.env,
        "--distraction", arguments.distraction, "--preset", "cpu", "--seed", "1", "--workers", "2",
        "--steps", str(10**9), "--replay-capacity", "8000", "--eval-every", str(arguments.eval_every),
        "--checkpoint-every", str(arguments.eval_every), "--run-dir", str(arguments.out / "run"),
        *(f"--import={name}" for name in arguments.imports),
    ]  # fmt: skip
    rows: list[Row] = []
    start = time.monotonic()
    with (arguments.out / "training.log").open("w") as log:
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while (minutes := (time.monotonic() - start) / 60) < arguments.minutes:
                if training.poll() is not None:
                    raise UserError(f"training ended by itself, see '{log.name}'")
                rows.append((minutes, *held(training.pid)))
                time.sleep(SECONDS_BETWEEN)
        finally:
            training.terminate()  # it saves and leaves
            code = training.wait()
    if code:
        raise RuntimeError(f"training left with exit code {code}, see '{log.name}'")
    return rows


def cycle(task: str, distraction: str, cycles: int) -> list[Row]:
    """Create, reset, step and close environments one after the other, and return what is held."""
    rows: list[Row] = []
    every = max(1, cycles // MEASUREMENTS)
    for done in range(1, cycles + 1):
        env = envs.make(task, distraction=distraction, seed=done, size=48)
        env.reset()
        env.step(env.action_space.sample())
        env.close()
        if done % every == 0:
            rows.append((done, *held()))
    return rows


def held(pid: int | None = None) -> tuple[float, ...]:
    """Return what a process and its children hold, by `HELD`; children that end meanwhile count as ended.

    Memory is private pages, clean and dirty: a share of the libraries' pages (PSS) would jump whenever another process
    that maps them too begins or ends.
    """
    root = psutil.Process(pid)
    sums = np.zeros(len(HELD))
    for process in (root, *root.children(recursive=True)):
        try:
            memory = process.memory_full_info().uss / 2**20
            sums += (memory, process.num_fds(), process.num_threads(), 1)
        except psutil.Error:
            if process is root:
                raise
    return tuple(sums.tolist())


def slope(rows: Sequence[Row]) -> float:
    """Return by how many MB memory grew per unit of the first column, in the second half of the rows."""
    late = np.array(rows)[len(rows) // 2 :]
    return float(np.polyfit(late[:, 0], late[:, 1], 1)[0])


def holds_more(rows: Sequence[Row]) -> bool:
    """Tell whether files, threads or processes grew from the second half's first fifth to its last."""
    late = np.array(rows)[len(rows) // 2 :, 2:]
    part = max(1, len(late) // 5)
    return bool((np.median(late[-part:], axis=0) > np.median(late[:part], axis=0)).any())


def summarize(
    rows: Sequence[Row], out: Path, what: str, unit: str, per: float, *, of: str, note: str = ""
) -> float:
    """Write <what>.csv, <what>.png and a paragraph of README.md; return the growth in MB per `per` units.

    Args:
        rows: what was held.
        out: folder of the files.
        what: was done.
        unit: of the first column.
        per: units that growth is given for.
        of: what is told of task, agent and distraction.
        note: what else is told.
    """
    with (out / f"{what}.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow((unit, *HELD))
        writer.writerows([f"{value:.2f}" for value in row] for row in rows)
    values, growth = np.array(rows), slope(rows) * per
    figure, (memory, rest) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    memory.plot(values[:, 0], values[:, 1], color="black")
    memory.set(
        ylabel="private memory [MB]",
        ylim=(0, None),
        title=f"{what}: {growth:+.1f} MB per {per:g} {unit}",
    )
    for column, style in zip(range(2, 5), ("-", "--", ":"), strict=True):
        rest.plot(values[:, 0], values[:, column], style, color="black", label=HELD[column - 1])
    rest.set(xlabel=unit, ylabel="number", ylim=(0, None))
    rest.legend(frameon=False)
    figure.savefig(out / f"{what}.png", dpi=100)
    plt.close(figure)
    first, last = (
        dict(zip(HELD, row[1:], strict=True)) for row in (rows[len(rows) // 2], rows[-1])
    )
    changes = ", ".join(f"{name} {first[name]:,.0f} to {last[name]:,.0f}" for name in HELD)
    system = describe_system()
    hardware = ", ".join(f"{name} {value}" for name, value in system["hardware"].items() if value)
    text = (
        f"## {what.capitalize()}\n\n`{command_line()}` at commit {system['commit']}: {hardware}\n\n{of}.\n\n"
        f"{rows[-1][0]:,.0f} {unit}. Private memory grew by {growth:+.1f} MB per {per:g} {unit} over the second half; "
        f"from its first to its last measurement: {changes}. {note}\n\n![{what}]({what}.png)\n"
    )
    with (out / "README.md").open("a") as handle:
        handle.write(text)
    print(text)
    return growth


if __name__ == "__main__":
    raise SystemExit(main())
