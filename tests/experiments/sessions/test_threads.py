"""The number of threads is chosen once and kept with the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agents.policy import read_config
from experiments.sessions import training as session
from tests.experiments.helpers import resume, train


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_number_of_threads_is_taken_and_kept_by_a_resume(
    faster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(call: object, **counts: int) -> float:
        return 1.0 if torch.get_num_threads() == faster else 2.0

    monkeypatch.setattr(session, "seconds_per_call", seconds)
    run = train("drq", "toy/reach", tmp_path / "run", steps=12)
    assert read_config(run)["threads"] == torch.get_num_threads() == faster
    torch.set_num_threads(2)
    resume(run, steps=14)
    assert torch.get_num_threads() == faster


def test_threads_that_are_asked_for_are_not_measured(tmp_path: Path) -> None:
    run = train("drq", "toy/reach", tmp_path / "run", steps=12, threads=1)
    assert read_config(run)["threads"] == torch.get_num_threads() == 1
