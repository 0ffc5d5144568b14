"""The kill campaign kills as often as it says, at the moments that it says, and tells when the end differs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agents.core.errors import UserError
from experiments import campaign
from experiments.campaign import Child, Kill, is_saving, main, newest_step, report, steps_logged
from experiments.compare import metrics_rows

FLAGS = ["--agent", "drq", "--env", "toy/reach", "--steps", "48", "--seed", "3"]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one_and_the_log_tells_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "MOMENTS", {"training": 0.5, "saving": 0.5})
    out, folder = tmp_path / "log.md", tmp_path / "runs"
    words = ["--kills", "3", "--seed", "3", "--workers", "2", "--steps", "80"]
    assert main([*words, "--folder", str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    assert "killed by SIGKILL 3 times" in text
    assert "Outcome: **equal, bit for bit**" in text
    assert [line.split()[1] for line in text.splitlines()[-3:]] == ["1", "2", "3"]
    assert newest_step(folder / "killed") == 80
    steps = [step for (step, tag), _ in metrics_rows(folder / "killed") if tag == "time/fps"]
    assert steps == list(range(2, 81, 2))
    assert main([*words, "--folder", str(folder)]) == 2, "nothing is overwritten"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the processes: what is left is the campaign's own course."""

    class Quick(Child):
        def __init__(self, run: Path, flags: object) -> None:
            self.started = 0

        def __exit__(self, *error: object) -> None:
            pass

        def wait_for(self, moment: object) -> None:
            pass

        def end(self) -> None:
            pass

    monkeypatch.setattr(campaign, "Child", Quick)
    monkeypatch.setattr(
        campaign, "kill_once", lambda *_: Kill(True, 1.0, None, 6, None, half_written=True)
    )


@pytest.mark.parametrize(
    ("saving", "resumed_from", "reached", "met"),
    [
        (True, 8, 14, "saving"),
        (False, 8, 14, "training"),
        (False, None, 2, "training"),
        (False, 8, 8, "starting"),
        (False, 8, None, "starting"),
        (False, None, None, "starting"),
    ],
)
def test_a_kill_is_named_by_what_it_met(
    saving: bool, resumed_from: int | None, reached: int | None, met: str
) -> None:
    assert Kill(saving, 1.0, resumed_from, reached, None, half_written=True).moment == met


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("different", "code", "outcome"),
    [
        ("metrics: (4, 'loss/actor') is in one metrics.csv only", 1, "they differ"),
        (None, 0, "equal"),
    ],
)
def test_a_difference_is_told_and_exits_with_one(
    different: str | None, code: int, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "run_difference", lambda *_: different)
    out = tmp_path / "log.md"
    assert main(["--kills", "2", "--out", str(out), "--", "--size", "24"]) == code
    text = out.read_text()
    assert outcome in text.partition("Outcome: ")[2].splitlines()[0]
    assert (different or "") in text
    assert "--size 24`" in text, "the run's own command"
    assert "(0 while starting, 0 while training, 2 while saving)" in text
    assert "2 kills left a half-written checkpoint" in text
    assert text.splitlines()[-1] == "| 2 | saving | 1.0 | - | 6 | - | yes |"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--kills 0", "--kills and --steps must be at least 1"),
        ("--agent drqq", "did you mean drq"),
        ("--env toy/reech", "did you mean toy/reach"),
        ("--out missing/log.md", "folder 'missing' does not exist"),
        ("--workers -1", "--workers and --seed at least 0"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_trained(
    flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.split()) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_ends_before_its_kill_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'error: steps is 0' >&2; exit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with (
        Child(tmp_path / "run", FLAGS) as child,
        pytest.raises(UserError, match=r"exit code 2 before the moment .* steps is 0"),
    ):
        child.wait_for(lambda: False)


def test_only_whole_lines_of_this_process_tell_how_far_it_is(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    assert steps_logged(tmp_path, 0) is None
    file.write_text("")
    assert steps_logged(tmp_path, 0) is None
    file.write_text("agent_steps,tag\n")
    assert steps_logged(tmp_path, 0) is None
    file.write_text("agent_steps,tag\n" + "2,loss\n" * 5000 + "14,loss\n160,lo")
    assert steps_logged(tmp_path, 0) == 14
    assert steps_logged(tmp_path, time.time_ns() + 10**12) is None, "an earlier process wrote it"


def test_a_checkpoint_is_half_written_only_by_this_process(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / ".writing-step-000000008"
    assert not is_saving(tmp_path, 0)
    folder.mkdir(parents=True)
    assert not is_saving(tmp_path, 0)
    (folder / "agent.json").touch()
    assert is_saving(tmp_path, 0)
    os.utime(folder / "agent.json", ns=(5, 5))
    assert not is_saving(tmp_path, 5), "a killed process left it"


def test_the_log_names_command_commit_and_what_was_compared() -> None:
    text = report([Kill(False, 2.0, 8, None, 8, False)], None, FLAGS, 60.0)
    assert f"experiments.train {' '.join(FLAGS)}" in text
    assert "Commit " in text
    assert "whole replay" in text
    assert "| 1 | starting | 2.0 | 8 | - | 8 |  |" in text
