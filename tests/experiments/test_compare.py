"""Two runs are called equal only when every bit and every logged line is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from agents.core import trees
from experiments.compare import difference, final_state, metrics_difference, run_difference
from tests.experiments.helpers import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose replay has wrapped around; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = {"replay_capacity": 30, "eval_every": 16, "eval_episodes": 1, "episode_length": 9}
    return train("drq", "toy/reach", folder, steps=48, **flags)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_run_equals_its_copy(run: Path, copy: Path) -> None:
    assert run_difference(run, copy) is None
    assert final_state(copy)["replay"]["length"] > 20
    assert "wall_seconds" not in final_state(copy)["progress"]


@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("checkpoints/step-000000048/agent.safetensors", "newest checkpoint: "),
        ("checkpoints/step-000000048/environments.safetensors", "newest checkpoint: "),
        ("replay/segment-*.safetensors", "newest checkpoint: "),
        ("checkpoints/best/agent.safetensors", "best checkpoint: "),
    ],
)
def test_one_bit_anywhere_makes_runs_differ(
    file: str, where: str, run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "read_file", lambda path, *_: path.read_bytes())  # no checksum
    path = sorted(copy.glob(file))[-1]
    tensors = safetensors.torch.load_file(path)
    key = next(key for key, value in sorted(tensors.items()) if value.numel())
    tensors[key].view(-1).view(torch.uint8)[-1] ^= 1
    safetensors.torch.save_file(tensors, path)
    assert str(run_difference(run, copy)).startswith(where)


def test_trees_of_other_types_lengths_and_keys_differ() -> None:
    assert difference({"a": 1}, {"a": 1.0}) == "/a: int and float"
    assert difference({"a": [1, 2]}, {"a": [1]}) == "/a: 2 and 1 entries"
    assert difference({"a": 1}, {"b": 1}) == ": keys ['a', 'b'] are in one only"
    nan = torch.tensor([float("nan")])
    assert difference(nan, nan.clone()) is None
    assert difference(torch.zeros(1), -torch.zeros(1)), "bits count, not values"
    assert difference(torch.zeros(0), torch.zeros(0)) is None


def last_line(lines: list[str]) -> int:
    return next(i for i in reversed(range(len(lines))) if ",loss/" in lines[i])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines.append(lines[last_line(lines)]), "more than once"),
        (lambda lines: lines.pop(last_line(lines)), "in one metrics.csv only"),
        (lambda lines: lines.append(lines[-1].replace("eval/", "eval/x")), "in one metrics.csv"),
        (
            lambda lines: lines.__setitem__(last_line(lines), lines[last_line(lines)] + "1"),
            "at agent step 48: ",
        ),
    ],
)
def test_a_missing_a_double_or_another_line_makes_metrics_differ(
    change: Callable[[list[str]], None], said: str, run: Path, copy: Path
) -> None:
    lines = (copy / "metrics.csv").read_text().splitlines()
    change(lines)
    (copy / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert said in str(metrics_difference(run, copy))
    assert said in str(run_difference(run, copy))


def test_wall_clock_makes_no_difference(run: Path, copy: Path) -> None:
    lines = (copy / "metrics.csv").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "time/fps" in line)
    lines[at] = ",".join([*lines[at].split(",")[:-1], "12345"])
    (copy / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert metrics_difference(run, copy) is None


def test_a_run_without_a_best_checkpoint_differs_from_one_that_has_it(
    run: Path, copy: Path
) -> None:
    assert json.loads((run / "checkpoints" / "best" / "manifest.json").read_text())
    shutil.rmtree(copy / "checkpoints" / "best")
    assert run_difference(run, copy) == "best checkpoint: : dict and NoneType"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(0, dtype=torch.bfloat16), torch.zeros(0)),
        (0.0, -0.0),
    ],
)
def test_kinds_and_shapes_count_too(left: object, right: object) -> None:
    assert difference(left, right) is not None
    assert difference(left, left) is None
    assert difference(float("nan"), float("nan")) is None
