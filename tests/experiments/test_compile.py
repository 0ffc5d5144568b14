"""`experiments.train --compile`: a run's setting, which a resumed run keeps or changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.core.compilation import Program
from experiments.train import main
from tests.experiments.helpers import arguments, assert_same_run, resume, train


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run what was traced without generating code, and return the names of the functions that ran so."""
    seen: list[str] = []
    run = Program.__call__

    def noted(self: Program, tensors: list) -> object:
        seen.append(self.name)
        return run(self, tensors)

    monkeypatch.setattr(Program, "compile", lambda *_: None)
    monkeypatch.setattr(Program, "__call__", noted)
    return seen


def test_a_compiled_run_learns_with_compiled_gradients_and_resumes_exactly(
    tmp_path: Path, calls: list[str]
) -> None:
    flags = {"compile": "on", "episode_length": 9, "num_envs": 2}
    whole = train("drqv2", "toy/reach", tmp_path / "whole", steps=32, **flags)
    parts = train("drqv2", "toy/reach", tmp_path / "parts", steps=20, **flags)
    begun = len(calls)
    resume(parts, steps=32)
    assert len(calls) > begun, "a resumed run is compiled as well"
    assert_same_run(whole, parts)
    names = {name.rpartition(".")[2] for name in calls}
    assert names == {"critic_gradients", "actor_gradients"}


def test_nothing_is_compiled_unless_asked_for(tmp_path: Path, calls: list[str]) -> None:
    for number, flags in enumerate(({}, {"compile": "off"}, {"compile": "auto"})):
        run = train("sac", "toy/reach", tmp_path / str(number), steps=16, **flags)
        assert json.loads((run / "config.json").read_text())["compile"] == flags.get(
            "compile", "off"
        )
    assert calls == []


def test_a_resumed_run_may_change_the_setting(tmp_path: Path, calls: list[str]) -> None:
    run = train("ppo", "toy/reach", tmp_path / "run", steps=12, observation="state")
    assert calls == []
    resume(run, steps=24, compile="on")
    assert calls
    assert json.loads((run / "config.json").read_text())["compile"] == "on"


def test_an_agent_that_cannot_is_refused_in_one_line_and_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments("ppo", "toy/reach", run, compile="on", memory_size=4)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: memory_size is 4")
    assert "--compile off" in told
    assert not run.exists()


def test_a_compiler_that_is_missing_stops_a_run_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(Program, "compile", missing)
    assert main(arguments("sac", "toy/reach", tmp_path / "run", compile="on", steps=16)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No working C++ compiler found" in told
    assert "story" not in told
