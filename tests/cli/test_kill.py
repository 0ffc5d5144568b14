"""A training process that is killed at any moment loses nothing that its last checkpoint holds.

The children are real processes. Moments are seeded: so many steps after the start of the process, or the first
checkpoint that is half written then.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from experiments.campaign import is_saving, newest_step, steps_logged
from experiments.evaluate import main as evaluate
from tests.experiments.helpers import arguments, assert_same_run, metrics, resume, train

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "num_envs": 2,
    "distraction": "video_hard",
    "episode_length": 9,
    "log_every": 2,
    "threads": 1,
}


class Child:
    """`python -m experiments.train`, or another command, as a process of its own."""

    def __init__(
        self, words: list[str], log: Path, *, group: bool = False, name: str = "train"
    ) -> None:
        command = [sys.executable, "-m", f"experiments.{name}", *words]
        self.started = time.time_ns()
        self._log = log
        with log.open("w") as handle:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=handle, stderr=handle, start_new_session=group
            )

    def wait_for(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment in its life."""
        while not moment():
            assert self.process.poll() is None, f"it ended too early: {self._log.read_text()}"
            time.sleep(0.001)

    def signal_when(
        self, moment: Callable[[], bool], number: signal.Signals
    ) -> list[psutil.Process]:
        """Wait for a moment, send the signal, and return the processes that it had started."""
        self.wait_for(moment)
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        return children

    def wait(self) -> int:
        """Return the exit code."""
        return self.process.wait(timeout=120)

    @property
    def output(self) -> str:
        """What it printed."""
        return self._log.read_text()


def kill_repeatedly(folder: Path, kills: int, seed: int, steps: int, workers: int) -> None:
    """Kill and resume one run `kills` times, let it end, and compare with an undisturbed run."""
    random = np.random.default_rng(seed)
    whole = train("sgqn", "toy/reach", folder / "whole", steps=steps, **RUN)
    run = folder / "killed"
    words = arguments(
        "sgqn", "toy/reach", run, steps=steps, workers=workers, checkpoint_every=4, **RUN
    )
    for number in range(kills):
        child = Child(words, folder / f"child-{number}.log")
        start, pause = newest_step(run) or 0, 2 * int(random.integers(1, 8))
        saving = number % 2 == 0

        def moment(
            reached: int = start + pause, saving: bool = saving, since: int = child.started
        ) -> bool:
            at_work = bool(newest_step(run)) and (steps_logged(run, since) or 0) >= reached
            return at_work and (is_saving(run, since) or not saving)

        helpers = child.signal_when(moment, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        _, left = psutil.wait_procs(helpers, timeout=60)
        left = [helper for helper in left if helper.status() != psutil.STATUS_ZOMBIE]
        assert not left, "workers end with their learner"
        words = ["--resume", str(run), "--threads", "1"]
    assert 0 < (newest_step(run) or 0) < steps, "every kill must find it at work"
    child = Child(words, folder / "child-last.log")
    assert child.wait() == 0, child.output
    assert_same_run(whole, run)
    rows = [(step, tag) for step, tag, _ in metrics(run)]
    assert len(rows) == len(set(rows))
    assert sorted({step for step, _ in rows}) == list(range(2, steps + 1, 2))


def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    kill_repeatedly(tmp_path, kills=2, seed=1, steps=60, workers=2)


@pytest.mark.slow
def test_runs_killed_ten_times_end_as_undisturbed_ones(tmp_path: Path) -> None:
    kill_repeatedly(tmp_path, kills=10, seed=2, steps=240, workers=0)


def test_a_run_that_is_asked_to_end_saves_and_exits_with_zero(tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    words = arguments("drqv2", "toy/reach", run, steps=100_000, **RUN)
    child = Child(words, tmp_path / "child.log")
    child.signal_when(lambda: (steps_logged(run, child.started) or 0) >= 16, signal.SIGTERM)
    assert child.wait() == 0, child.output
    saved = newest_step(run)
    assert saved is not None
    assert saved >= 16
    assert f"stopped after {saved:,} agent steps" in child.output
    resume(run, steps=saved + 20)
    whole = train("drqv2", "toy/reach", tmp_path / "whole", steps=saved + 20, **RUN)
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_evaluation_that_is_ended_keeps_what_it_has_done(
    number: signal.Signals, tmp_path: Path
) -> None:
    run = train("sgqn", "toy/reach", tmp_path / "run", steps=16)
    words = [str(run), "--workers", "2", "--episodes", "4", "--no-media", "--name", "it"]
    folder = run / "evaluations"
    rows = folder / "it.partial" / "rows.json"
    child = Child(words, tmp_path / "log", name="evaluate")
    children = child.signal_when(lambda: rows.is_file() and "clean" in rows.read_text(), number)
    code = child.wait()
    assert not psutil.wait_procs(children, timeout=20)[1], "it ends its workers"
    assert [path.name for path in folder.iterdir()] == ["it.partial"]
    if number == signal.SIGTERM:
        assert code == 130
        assert "the same command goes on there" in child.output
        assert "Traceback" not in child.output
    done = rows.stat().st_mtime_ns
    assert evaluate([*words[:2], "0", *words[3:]]) == 0
    assert (folder / "it.json").stat().st_mtime_ns > done
    assert evaluate([*words[:-1], "undisturbed"]) == 0
    assert (folder / "it.json").read_text() == (folder / "undisturbed.json").read_text()
