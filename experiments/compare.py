"""Two run folders side by side, bit for bit: the newest checkpoints with the whole replay, and the metrics.

Wall-clock is left out: it is the one thing in which two equal runs differ.
"""

from __future__ import annotations

import csv
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.core.checkpoints import CheckpointStore
from agents.policy import read_config, space_from_json
from agents.registry import find
from experiments.sessions.training import agent_of, make_store


def final_state(run: Path) -> dict[str, Any]:
    """Return everything that a run's newest checkpoint holds, with the whole replay if it has one; no wall-clock.

    Raises:
        UserError: no run or no whole checkpoint is there.
    """
    config = read_config(run)
    if find(config["agent"]).offline:
        parts = CheckpointStore(run).load()
        del parts["progress"]["wall_seconds"]
        return parts
    space = space_from_json(config["spaces"]["observation"])
    action_space = space_from_json(config["spaces"]["action"])
    agent = agent_of(config | {"device": "cpu"}, space, action_space, seed=0)
    replay = make_store(config, space, action_space, agent, storage="ram", log=lambda line: None)
    parts = CheckpointStore(run).load(replay=replay)
    del parts["progress"]["wall_seconds"]
    closed = replay.closed_ids(np.zeros_like(replay.closed))
    rows = {
        "length": len(replay),
        "state": replay.get_state(),
        "closed_ids": closed,
        "closed_rows": replay.export_rows(closed),
    }
    return parts | {"replay": rows}


def best_state(run: Path) -> dict[str, Any] | None:
    """Return what a run's best checkpoint holds, without wall-clock; None where there is none."""
    store = CheckpointStore(run)
    if not (store.folder / "best").exists():
        return None
    parts = store.load("best")
    del parts["progress"]["wall_seconds"]
    return parts


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


def metrics_rows(run: Path) -> Iterator[tuple[tuple[int, str], tuple[str, ...]]]:
    """Yield the lines of metrics.csv: (agent steps, tag), and what stands beside them but the wall-clock."""
    with (run / "metrics.csv").open(newline="") as handle:
        for row in csv.DictReader(handle):
            others = (row["env_frames"], row["gradient_updates"], row["value"])
            yield (int(row["agent_steps"]), row["tag"]), others


def metrics_difference(left: Path, right: Path) -> str | None:
    """Return how two runs' metrics.csv differ first: double lines, gaps, values; None where they do not.

    Values of `time/*` are wall-clock; their lines must be there all the same.
    """
    for run in (left, right):
        double = [key for key, n in Counter(key for key, _ in metrics_rows(run)).items() if n > 1]
        if double:
            return f"{run.name} has {double[0]} more than once in metrics.csv"
    ours, theirs = dict(metrics_rows(left)), dict(metrics_rows(right))
    if only := sorted(ours.keys() ^ theirs.keys()):
        return f"{only[0]} is in one metrics.csv only"
    for (step, tag), value in ours.items():
        if not tag.startswith("time/") and value != theirs[step, tag]:
            return f"{tag} at agent step {step}: {value} and {theirs[step, tag]}"
    return None


def run_difference(left: Path, right: Path) -> str | None:
    """Return how two finished runs differ first: newest and best checkpoint, then metrics; None where they do not."""
    checks = (
        ("newest checkpoint", lambda: difference(final_state(left), final_state(right))),
        ("best checkpoint", lambda: difference(best_state(left), best_state(right))),
        ("metrics", lambda: metrics_difference(left, right)),
    )
    found = ((name, check()) for name, check in checks)
    return next((f"{name}: {text}" for name, text in found if text), None)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor | np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape
        return same and _bytes(left) == _bytes(right)
    if isinstance(left, float):  # 0.0 and -0.0 differ, a NaN equals itself
        return struct.pack("d", left) == struct.pack("d", right)
    return bool(left == right)


def _bytes(values: torch.Tensor | np.ndarray) -> bytes:
    """Return what is in memory; NumPy does not know every dtype of torch."""
    if isinstance(values, np.ndarray):
        return values.tobytes()
    if not values.numel():
        return b""
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _short(leaf: Any) -> str:
    return f"{leaf!r}"[:60].replace("\n", "")
