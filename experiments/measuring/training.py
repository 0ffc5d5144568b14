"""Speed of training as a whole, and where the time of an agent step goes."""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from experiments import train
from experiments.measuring.timing import Table
from experiments.sessions.training import Session

AGENTS = ("drqv2", "sgqn")
TASK = "dmc/cartpole-swingup"
PARTS = ("act", "env", "render", "update")
"""What the loop's log takes apart; rendering is a part of the environments' time."""
EVERY = 40
"""Agent steps between two lines of the log; the first lines, which warm up, are left out."""


def training(
    seconds: float, device: str, agents: Sequence[str] = AGENTS, task: str = TASK
) -> list[Table]:
    """Train every agent with the device's preset for some seconds, and take the log's times apart."""
    table = Table(
        f"Training: {task} on {device}, the device's preset",
        [
            "agent",
            "frames/s",
            "agent steps/s",
            "updates/s",
            "act",
            "simulate",
            "render",
            "learn",
            "rest",
        ],
        "The last five columns are milliseconds per agent step, one after the other in this process; rest is the "
        "replay, the log and the loop. DrQ-v2's authors publish 96 frames/s on a V100.",
    )
    for agent in agents:
        table.rows.append([agent, *_measure(agent, task, device, seconds)])
    return [table]


def _measure(agent: str, task: str, device: str, seconds: float) -> list[float]:
    flags = [
        "--agent", agent, "--env", task, "--device", device, "--seed", "0", "--random-steps", "80",
        "--log-every", str(EVERY), "--eval-every", "0", "--checkpoint-every", str(10**9),
        "--steps", str(10**9), "--replay-capacity", "20000",
    ]  # fmt: skip
    config = train.new_config(vars(train.parser(agent).parse_args(flags)))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run = Path(folder)
        with Session(run, config, resume=False) as session:
            until = time.monotonic() + seconds
            enough = 4 * EVERY + config["train"].get("random_steps", 0)
            steps = session.loop.state.progress
            session.settle_threads()
            session.loop.hooks.line = lambda _: None
            session.train(lambda: time.monotonic() > until and steps.agent_steps >= enough)
            repeat = config["env"]["action_repeat"]
            ratio = session.updates_per_step()
        rows = {name: values[3:] for name, values in _log(run / "metrics.csv").items()}
    milliseconds = {name: float(np.mean(rows[f"time/{name}_ms"])) for name in PARTS}
    per_step = float(np.mean(1000 / np.array(rows["time/steps_per_second"])))
    act, simulate, learn = (milliseconds[name] for name in ("act", "env", "update"))
    simulate -= milliseconds["render"]
    rest = per_step - sum(milliseconds[name] for name in ("act", "env", "update"))
    speed = 1000 / per_step
    return [
        speed * repeat, speed, speed * ratio, act, simulate, milliseconds["render"], learn, rest
    ]  # fmt: skip


def _log(file: Path) -> dict[str, list[float]]:
    """Return the values of every tag, in order."""
    rows: dict[str, list[float]] = {}
    with file.open(newline="") as handle:
        for row in csv.DictReader(handle):
            rows.setdefault(row["tag"], []).append(float(row["value"]))
    return rows
