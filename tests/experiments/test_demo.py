"""The demo goes the whole way, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from experiments.demo import main, steps_left


def test_the_demo_trains_evaluates_reports_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "demo"
    words = ["--run-dir", str(run), "--env", "toy/reach", "--preset", "debug", "--episodes", "2"]
    words += ["--agent", "drq"]
    assert main(words) == 0
    assert steps_left(run) == 0
    assert (run / "report" / "report.html").is_file()
    (file,) = (run / "evaluations").glob("*.json")
    results = json.loads(file.read_text())["results"]
    assert list(results) == ["clean", "color_hard", "video_easy", "video_hard"]
    assert all(len(row["returns"]) == 2 for row in results.values())
    capsys.readouterr()

    shutil.rmtree(run / "checkpoints" / "step-000000400")
    assert steps_left(run) == 200
    with monkeypatch.context() as patch:
        patch.setattr("experiments.train.main", lambda words: 0)  # as if a signal had stopped it
        assert main(words) == 130, "a run that was stopped is not evaluated"
    assert main(words) == 0
    assert "going on with" in capsys.readouterr().out
    assert steps_left(run) == 0

    before = (run / "metrics.csv").read_bytes()
    assert main(words) == 0
    assert "trained already" in capsys.readouterr().out
    assert (run / "metrics.csv").read_bytes() == before


def test_no_episodes_are_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run-dir", str(tmp_path / "demo"), "--episodes", "0"]) == 2
    assert "--episodes is 0" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
