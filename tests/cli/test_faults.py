"""What breaks around a run (a task, a worker, the disk, the clock) is named in one line and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest

from agents import Policy
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.logging import Logger
from experiments.campaign import newest_step, steps_logged
from experiments.compare import final_state
from experiments.demo import main as demo
from experiments.evaluate import main as evaluate
from experiments.report import main as report
from experiments.running.runs import LOCK, lock_run
from experiments.train import main
from tests.cli.test_kill import Child
from tests.experiments.helpers import (
    arguments,
    assert_same_run,
    metrics,
    resume,
    train,
)

Command = Callable[[list[str]], int]
Failed = Callable[..., str]


@pytest.fixture
def failed(capsys: pytest.CaptureFixture[str]) -> Failed:
    """Return a function that runs a command which must fail, and returns its one line."""

    def check(*words: object, code: int = 2, command: Command = main) -> str:
        capsys.readouterr()
        assert command([str(word) for word in words]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return check


# ------------------------------------------------------------------------------ numbers and tasks


class Sick(gym.Env):
    """A task whose simulator diverges, in the given field, whenever an episode reaches its eighth step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, field: str, value: float, first: int = 8) -> None:
        self.field, self.value, self.first, self.t = field, value, first, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        observation, reward = np.full(3, self.t, np.float32), 1.0
        if self.t == self.first and self.field == "reward":
            reward = self.value
        if self.t == self.first and self.field != "reward":
            observation[1] = self.value
        return observation, reward, self.t == self.first and self.field == "last state", False, {}


@pytest.fixture
def sick() -> Iterator[Callable[..., str]]:
    """Return a function that registers a sick task and returns its id."""

    def register(field: str, value: float, **keywords: int) -> str:
        gym.register(
            "Sick-v0",
            entry_point=Sick,
            max_episode_steps=50,
            kwargs={"field": field, "value": value, **keywords},
        )
        return "gym/Sick-v0"

    yield register
    del gym.registry["Sick-v0"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("reward", np.nan), ("reward", -np.inf), ("state", np.nan), ("last state", np.inf)],
)
def test_what_a_task_gives_that_is_not_finite_is_named_and_the_last_checkpoint_stays(
    field: str, value: float, tmp_path: Path, sick: Callable[..., str], failed: Failed
) -> None:
    run = tmp_path / "run"
    flags = {"steps": 40, "observation": "state", "num_envs": 2, "checkpoint_every": 6}
    line = failed(*arguments("sac", sick(field, value), run, **flags), code=1)
    # Both environments diverge in their eighth step, so seven steps of two are whole.
    assert f"'{field.split()[-1]}' is {value} in environment 0 at agent step 14" in line
    assert "the last checkpoint is kept" in line
    state = final_state(run)
    assert state["progress"]["agent_steps"] == 12
    assert failed("--resume", run, code=1) == line, "an exact resume meets it again"
    assert final_state(run)["progress"]["agent_steps"] == 12


def test_an_evaluation_on_a_task_that_diverges_is_ended(
    tmp_path: Path, sick: Callable[..., str], failed: Failed
) -> None:
    flags = {"steps": 30, "observation": "state", "checkpoint_every": 10, "eval_every": 20}
    words = arguments("sac", sick("reward", np.nan, first=25), tmp_path / "run", **flags)
    line = failed(*words, code=1)
    assert "'reward' is nan in environment 0 at step 25 of an evaluation" in line
    assert newest_step(tmp_path / "run") == 10


# --------------------------------------------------------------------------- workers and signals


def workers_of(child: Child) -> list[psutil.Process]:
    """Return the worker processes, children of the fork server that the learner started."""
    servers = psutil.Process(child.process.pid).children()
    return [worker for server in servers for worker in server.children()]


@pytest.mark.slow
def test_training_goes_on_when_a_worker_is_killed_and_another_hangs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {"num_envs": 2, "workers": 2, "timeout": 2.0, "log_every": 2, "threads": 1}
    words = arguments("drq", "toy/reach", run, steps=600, random_steps=590, **flags)
    child = Child(words, tmp_path / "child.log")

    def strike(step: int, number: int, name: signal.Signals) -> None:
        child.wait_for(lambda: (steps_logged(run, child.started) or 0) >= step)
        workers_of(child)[number].send_signal(name)

    strike(20, 0, signal.SIGKILL)
    child.wait_for(lambda: "was killed by SIGKILL" in child.output)
    strike((steps_logged(run, child.started) or 0) + 20, 0, signal.SIGSTOP)
    assert child.wait() == 0, child.output
    assert "did not answer" in child.output
    assert child.output.count("it is replaced") == 2
    assert "finished after 600 agent steps" in child.output
    last = {tag: value for _, tag, value in metrics(run)}
    assert last["environments/worker_failures"] == 2
    dropped = last["environments/dropped_transitions"]
    assert 2 <= dropped <= 4, "the step of the failure, and the one that began the new episode"
    assert len(CheckpointStore(run).load()["environments"]["envs"]) == 2
    assert final_state(run)["replay"]["length"] == 600 - dropped


def test_a_sigterm_for_the_whole_group_saves_exactly_and_exits_with_zero(tmp_path: Path) -> None:
    """Containers and batch systems send it to workers and fork server too."""
    run = tmp_path / "run"
    flags = {"num_envs": 2, "log_every": 2, "threads": 1, "episode_length": 9}
    child = Child(
        arguments("drq", "toy/reach", run, steps=100_000, workers=2, **flags),
        tmp_path / "child.log",
        group=True,
    )
    child.wait_for(lambda: (steps_logged(run, child.started) or 0) >= 16)
    os.killpg(child.process.pid, signal.SIGTERM)
    assert child.wait() == 0, child.output
    assert "replaced" not in child.output, "no worker may end before it is told to"
    saved = newest_step(run)
    assert f"stopped after {saved:,} agent steps" in child.output
    whole = train("drq", "toy/reach", tmp_path / "whole", steps=saved, **flags)
    assert_same_run(whole, run)


def test_a_sigterm_before_the_first_step_saves_and_exits_with_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Logger.text

    def text(logger: Logger, tag: str, value: str) -> None:  # while the run is being built
        os.kill(os.getpid(), signal.SIGTERM)
        real(logger, tag, value)

    with monkeypatch.context() as patch:
        patch.setattr(Logger, "text", text)
        run = train("drq", "toy/reach", tmp_path / "run", steps=24)
    assert newest_step(run) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resume(run)
    assert_same_run(train("drq", "toy/reach", tmp_path / "whole", steps=24), run)


# ------------------------------------------------------------------------------------- the disk

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may mount no disk; the tests beside this one simulate a full one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes of a disk free; return the file that takes the others."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(shutil.disk_usage(disk).free - left, 0)))
    return ballast


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_goes_on_exactly_when_there_is_space(
    small_disk: Path, tmp_path: Path, failed: Failed
) -> None:
    flags = {"num_envs": 2, "episode_length": 9, "log_every": 4, "checkpoint_every": 20}
    run = train("drq", "toy/reach", small_disk / "run", steps=40, **flags)
    before = final_state(run)
    said = []
    for pages in (0, 1, 2, 4, 8, 16, 32, 64):
        ballast = fill(small_disk, left=pages * 4096)
        said.append(failed("--resume", run, "--steps", 200))
        ballast.unlink()
        assert "is full" in said[-1] or "No space left" in said[-1]
        assert final_state(run)["progress"]["agent_steps"] >= before["progress"]["agent_steps"]
    assert any("was not written, the one before (step-" in line for line in said), said
    assert any(f"the disk of '{run}" in line for line in said), said
    resume(run, steps=200)
    assert_same_run(train("drq", "toy/reach", tmp_path / "whole", steps=200, **flags), run)
    steps = [step for step, tag, _ in metrics(run) if tag == "time/fps"]
    assert steps == list(range(4, 201, 4))


@pytest.mark.parametrize("place", ["metrics.csv", "tensorboard", "segment-", "config.json"])
def test_whatever_does_not_fit_on_the_disk_the_last_checkpoint_loads_and_the_run_goes_on_exactly(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: Failed
) -> None:
    flags = {"episode_length": 9, "log_every": 4, "checkpoint_every": 20}
    run = train("drq", "toy/reach", tmp_path / "run", steps=20, **flags)
    with monkeypatch.context() as patch:
        fill_place(place, patch)
        line = failed("--resume", run, "--steps", 60)
    assert f"the disk of '{run}" in line
    assert "is full" in line
    assert newest_step(run) == 20
    resume(run, steps=60)
    assert_same_run(train("drq", "toy/reach", tmp_path / "whole", steps=60, **flags), run)
    steps = [step for step, tag, _ in metrics(run) if tag == "time/fps"]
    assert steps == list(range(4, 61, 4))


def fill_place(place: str, patch: pytest.MonkeyPatch) -> None:
    """Let writing to one place fail as on a full disk."""
    if place == "tensorboard":  # written by a thread of its own
        name = "tensorboard.summary.writer.record_writer.RecordWriter.write"
        patch.setattr(name, lambda writer, data: (_ for _ in ()).throw(FULL))
    elif place == "metrics.csv":
        real_init = Logger.__init__

        def init(logger: Logger, *words: Any, **flags: Any) -> None:
            real_init(logger, *words, **flags)
            os.dup2(os.open("/dev/full", os.O_WRONLY), logger._handle.fileno())

        patch.setattr(Logger, "__init__", init)
    else:
        real_fsync = os.fsync

        def fsync(handle: int) -> None:
            if place in os.readlink(f"/proc/self/fd/{handle}"):
                raise FULL
            real_fsync(handle)

        patch.setattr(os, "fsync", fsync)


# ------------------------------------------------------------------- folders, clocks and versions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it take a copy."""
    return train("drq", "toy/reach", tmp_path_factory.mktemp("runs") / "run", steps=20)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_folder_in_which_a_process_trains_is_refused_to_a_second_one_until_it_is_killed(
    tmp_path: Path, failed: Failed
) -> None:
    run = tmp_path / "run"
    words = arguments("drq", "toy/reach", run, steps=100_000, checkpoint_every=4, log_every=2)
    child = Child(words, tmp_path / "child.log")
    child.wait_for(lambda: bool(newest_step(run)))
    assert "is in use: another process trains in it" in failed("--resume", run)
    assert "exists" in failed(*words)
    quick = ["--episodes", "1", "--num-envs", "1", "--workers", "0", "--no-media"]
    assert evaluate([str(run), "--distractions", "clean", "--checkpoint", "latest", *quick]) == 0
    child.process.kill()
    assert child.wait() == -signal.SIGKILL
    resume(run, steps=(newest_step(run) or 0) + 4)


def test_two_that_begin_in_one_empty_folder_are_told_apart(tmp_path: Path, failed: Failed) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with lock_run(run):  # by the process that was a moment earlier
        assert "is in use" in failed(*arguments("drq", "toy/reach", run, steps=20))
        assert [file.name for file in run.iterdir()] == [LOCK]
    train("drq", "toy/reach", run, steps=20)


def test_a_folder_of_a_run_that_was_killed_while_it_began_is_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("system.json", "command.txt", "config.json.tmp", LOCK):
        (run / name).write_text("{")
    train("drq", "toy/reach", run, steps=20)
    assert json.loads((run / "system.json").read_text())["python"]


def test_a_log_that_a_kill_left_empty_gets_its_header(run: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.csv").write_text("")  # nothing was flushed yet
    resume(copy)
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert (copy / "metrics.csv").read_text().splitlines()[0] == header


def test_jumps_of_the_wall_clock_change_neither_times_nor_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"steps": 40, "num_envs": 2, "workers": 2, "log_every": 2, "eval_every": 20}
    whole = train("drq", "toy/reach", tmp_path / "whole", **flags)
    random, now = np.random.default_rng(0), time.time()
    with monkeypatch.context() as patch:  # by up to ten years, forward and back, at every look
        patch.setattr(time, "time", lambda: now + random.uniform(-3e8, 3e8))
        run = train("drq", "toy/reach", tmp_path / "run", **flags)
    assert_same_run(whole, run)
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    seconds = np.array([float(line.split(",")[3]) for line in lines])
    assert (np.diff(seconds) >= 0).all()
    assert seconds[0] >= 0
    assert 0 < seconds[-1] < 600
    assert all(value > 0 for _, tag, value in metrics(run) if tag == "time/fps")
    assert "environments/worker_failures" not in {tag for _, tag, _ in metrics(run)}


@pytest.mark.parametrize(("schema", "advice"), [(0, "the version that wrote it"), (2, "upgrade")])
@pytest.mark.parametrize("file", ["config.json", "checkpoints/step-000000020/manifest.json"])
def test_a_run_of_another_schema_is_refused_by_every_command(
    file: str, schema: int, advice: str, copy: Path, tmp_path: Path, failed: Failed
) -> None:
    content = json.loads((copy / file).read_text()) | {"schema": schema}
    (copy / file).write_text(json.dumps(content))
    said = [
        failed("--resume", copy, "--steps", 40),
        failed(copy, command=evaluate),
    ]
    if file == "config.json":
        said.append(failed("--run-dir", copy, command=demo))
        said.append(failed(copy, "--out", tmp_path / "report", command=report))
    with pytest.raises(UserError) as error:
        Policy.load(copy)
    for line in [*said, str(error.value)]:
        assert f"{file.split('/')[-1]}' has schema {schema}, this version reads 1" in line
        assert advice in line
    assert not (tmp_path / "report").exists()
