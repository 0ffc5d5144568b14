"""Tiny runs of the commands, and a comparison of run folders that names the first difference."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.replay import Replay
from agents.policy import read_config, space_from_json
from agents.registry import find
from experiments.train import main

TINY = {
    "--preset": "debug",
    "--device": "cpu",
    "--seed": 3,
    "--hidden": (16, 16),
    "--feature-dim": 8,
    "--batch-size": 8,
    "--random-steps": 10,
    "--eval-every": 0,
    "--log-every": 8,
    "--checkpoint-every": 1000,
}
"""Flags of a run that learns from its first steps on and takes a second."""

TINY_METHODS = {"--decoder-channels": (4, 4)}
"""More of them, for the agents that know them."""


def arguments(agent: str, env: str, run: Path, **flags: Any) -> list[str]:
    """Return the arguments of `experiments.train` for a tiny run.

    `flags` replace those of `TINY`; True stands for a flag without a value.
    """
    size = 24 if env.startswith("toy/") else 32
    values = {"--agent": agent, "--env": env, "--run-dir": run, "--size": size} | TINY
    if any(hasattr(config, "decoder_channels") for config in find(agent).configs):
        values |= TINY_METHODS
    return as_arguments(values | {"--" + k.replace("_", "-"): v for k, v in flags.items()})


def as_arguments(values: dict[str, Any]) -> list[str]:
    """Return flags and their values as a command line has them."""
    words: list[str] = []
    for flag, value in values.items():
        words.append(flag)
        if value is not True:
            words += [str(part) for part in (value if isinstance(value, tuple) else (value,))]
    return words


def train(agent: str, env: str, run: Path, **flags: Any) -> Path:
    """Train a tiny run in this process and return its folder."""
    assert main(arguments(agent, env, run, **flags)) == 0
    return run


def resume(run: Path, **flags: Any) -> None:
    """Go on with a run in this process."""
    values = {"--resume": run} | {"--" + k.replace("_", "-"): v for k, v in flags.items()}
    assert main(as_arguments(values)) == 0


def final_state(run: Path) -> dict[str, Any]:
    """Return everything that a run's newest checkpoint holds, with the whole replay; no wall time."""
    config = read_config(run)
    replay = Replay(
        space_from_json(config["spaces"]["observation"]),
        space_from_json(config["spaces"]["action"]),
        capacity=config["train"]["replay_capacity"],
        num_envs=config["train"]["num_envs"],
        frame_stack=config["env"]["frame_stack"],
        storage="ram",
        log=lambda line: None,
    )
    parts = CheckpointStore(run).load(replay=replay)
    del parts["progress"]["wall_seconds"]
    rows = {
        "columns": dict(replay._columns),
        "taken": replay._taken,
        "age": replay._age,
        "count": replay._count,
        "length": len(replay),
        "generator": replay._generator.bit_generator.state,
    }
    return parts | {"replay": rows}


def difference(left: Any, right: Any, place: str = "") -> str | None:
    """Return where two trees differ first, and how; None where they are equal bit for bit."""
    if type(left) is not type(right):
        return f"{place}: {type(left).__name__} and {type(right).__name__}"
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{place}: keys {sorted(left.keys() ^ right.keys())} are in one only"
        pairs = [(key, left[key], right[key]) for key in left]
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"{place}: {len(left)} and {len(right)} entries"
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        return None if _equal(left, right) else f"{place}: {_short(left)} and {_short(right)}"
    found = (difference(a, b, f"{place}/{key}") for key, a, b in pairs)
    return next((text for text in found if text), None)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        left, right = (t.contiguous().view(-1).view(torch.uint8).numpy() if t.numel() else t.numpy()
                       for t in (left, right))  # fmt: skip
    if isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape
        return same and left.tobytes() == right.tobytes()
    return bool(left == right)


def _short(leaf: Any) -> str:
    return f"{leaf!r}"[:60].replace("\n", "")


def assert_same_run(left: Path, right: Path) -> None:
    """Compare the newest checkpoints of two runs bit for bit."""
    if place := difference(final_state(left), final_state(right)):
        raise AssertionError(f"{left.name} and {right.name} differ: {place}")


def metrics(run: Path) -> list[tuple[int, str, float]]:
    """Return the rows of metrics.csv: agent steps, tag, value."""
    with (run / "metrics.csv").open(newline="") as handle:
        return [
            (int(row["agent_steps"]), row["tag"], float(row["value"]))
            for row in csv.DictReader(handle)
        ]
