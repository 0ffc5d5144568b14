"""Tiny runs of the commands, and a comparison of run folders that names the first difference."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from agents.registry import find
from experiments.compare import difference, final_state
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

TINY_ON_POLICY = {
    **{
        flag: value
        for flag, value in TINY.items()
        if flag not in ("--batch-size", "--random-steps")
    },
    "--rollout-length": 6,
    "--minibatch-size": 4,
    "--epochs": 2,
}
"""The same for agents that learn from rollouts."""

TINY_VINES = {"--branches": 1, "--vines": 3, "--vine-length": 1, "--set-size": 2}
"""The same for agents whose rollouts branch."""

TINY_METHODS = {"--decoder-channels": (4, 4)}
"""More of them, for the agents that know them."""


def arguments(agent: str, env: str, run: Path, **flags: Any) -> list[str]:
    """Return the arguments of `experiments.train` for a tiny run.

    `flags` replace those of `TINY`; True stands for a flag without a value.
    """
    size = 24 if env.startswith("toy/") else 32
    values = {"--agent": agent, "--env": env, "--run-dir": run, "--size": size}
    values |= TINY_ON_POLICY if find(agent).on_policy else TINY
    if any(hasattr(config, "decoder_channels") for config in find(agent).configs):
        values |= TINY_METHODS
    if any(hasattr(config, "vine_length") for config in find(agent).configs):
        values |= TINY_VINES
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


def refused_by(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], words: Iterable[object]
) -> str:
    """Run a command that is a user's mistake, and return the one line that says so."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error
