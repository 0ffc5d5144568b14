"""What is held is measured, and growth is told from noise."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from experiments import soak


def test_growth_is_the_slope_of_the_second_half() -> None:
    rng = np.random.default_rng(0)
    minutes = np.arange(100.0)
    filling = np.minimum(minutes, 50) * 30  # a replay that fills in the first half
    megabytes = 500 + filling + 2 * minutes + rng.normal(0, 1, 100)
    rows = [(*pair, 1, 1, 1) for pair in np.stack([minutes, megabytes], axis=1).tolist()]
    assert soak.slope(rows) == pytest.approx(2, abs=0.1)


def test_files_that_stay_open_are_growth_and_one_that_comes_and_goes_is_not() -> None:
    steady = [(float(m), 500.0, 80.0 + (m == 77), 18.0, 3.0) for m in range(100)]
    leaking = [(float(m), 500.0, 80.0 + m // 20, 18.0, 3.0) for m in range(100)]
    assert not soak.holds_more(steady)
    assert soak.holds_more(leaking)


def test_memory_of_children_counts_and_ends_with_them() -> None:
    before = soak.held()
    code = "import sys; held = bytes(1) * 2**26; print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    during = soak.held()
    child.communicate("")
    after = soak.held()
    assert during[0] > before[0] + 64
    assert during[3] == before[3] + 1
    assert after[3] == before[3]
    assert abs(after[0] - before[0]) < 32


def test_environments_are_cycled_and_the_growth_is_written(tmp_path: Path) -> None:
    words = [
        "--env",
        "toy/reach",
        "--minutes",
        "0",
        "--cycles",
        "300",
        "--limit",
        "1000",  # this process holds much besides, and 300 cycles are short: a megabyte of it comes and goes
        "--out",
        str(tmp_path / "out"),
    ]
    assert soak.main(words) == 0
    with (tmp_path / "out" / "environments.csv").open() as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["closed", *soak.HELD]
    assert len(rows) > 200
    assert (tmp_path / "out" / "environments.png").stat().st_size > 1000
    said = (tmp_path / "out" / "README.md").read_text()
    assert "MB per 1000 closed" in said
    assert "Task toy/reach, distraction video_hard." in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--minutes 0", "give --minutes or --cycles"),
        ("--env toy/reech", "did you mean toy/reach"),
        ("--agent sgqm", "did you mean sgqn"),
        ("--distraction colour_hard", "did you mean color_hard"),
        ("--minutes 0 --cycles 5", "too little to tell"),
    ],
)
def test_mistakes_leave_nothing_behind(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_is_watched_from_outside(tmp_path: Path) -> None:
    words = ["--env", "toy/reach", "--minutes", "0.7", "--eval-every", "500", "--limit", "1e6"]
    assert soak.main([*words, "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "training.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[-1]["processes"]) >= 3, "the learner and two workers"
    assert (tmp_path / "out" / "run" / "checkpoints").is_dir(), "it saved when it was told to leave"


def test_memory_is_what_no_other_process_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of what others map too (PSS) jumps when they begin or end."""
    for shared in (0, 900):
        info = SimpleNamespace(uss=5 * 2**20, pss=(5 + shared) * 2**20, rss=2000 * 2**20)
        monkeypatch.setattr(psutil.Process, "memory_full_info", lambda self, info=info: info)
        monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [])
        assert soak.held()[0] == 5.0
