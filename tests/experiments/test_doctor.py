"""The doctor tells what is wrong in one line each, and speaks where most of the installation is broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from agents.core.errors import UserError
from envs import rendering
from experiments import doctor, doctor_checks
from experiments.doctor_checks import Finding
from experiments.running import pins
from experiments.running.hardware import usable_cores

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["packages", "python", "versions", "pins", "gl", "cpu", "gpu", "memory", "disk"]


def by_name(lines: str) -> dict[str, str]:
    """Return the printed lines by the name of their check, which follows the level."""
    return {line.split(": ")[0].split(None, 1)[1]: line for line in lines.splitlines()}


def test_every_check_is_a_line_and_quick_leaves_out_the_pictures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = doctor.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s+|: ", line)[1] for line in lines] == NAMES
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "problem"}
    assert code == any(line.startswith("problem") for line in lines)
    assert str(ROOT) in lines[0]
    assert importlib.metadata.version("mujoco") in lines[2]


def test_json_holds_what_the_lines_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "TASKS", ("toy/reach",))
    monkeypatch.setattr(doctor_checks, "SECONDS", 0.02)
    code = doctor.main(["--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["healthy"] == (code == 0)
    assert [finding["name"] for finding in content["findings"]] == [*NAMES, "frames toy/reach"]
    frames = content["findings"][-1]
    assert frames["level"] == "ok"
    assert frames["details"].keys() == {"clean", "video_hard", "quality"}
    for name in ("clean", "video_hard"):
        assert f"{frames['details'][name]:,.0f} {name}" in frames["text"]
    assert frames["text"].startswith("frames/s at 84 x 84, reference: "), "the toy's own quality"


def test_frames_are_timed_at_the_quality_that_auto_resolves_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendering, "gl_renderer", lambda: "NVIDIA H100")
    monkeypatch.setattr(doctor_checks, "frame_rate", lambda *_: 96.0)
    found = doctor_checks.frames("dmc/cartpole-swingup")
    assert found.text == "frames/s at 84 x 84, reference: 96 clean, 96 video_hard"
    monkeypatch.setattr(rendering, "gl_renderer", lambda: "llvmpipe (LLVM 15)")
    assert "84 x 84, fast: 96 clean" in doctor_checks.frames("dmc/cartpole-swingup").text


@pytest.mark.parametrize(("levels", "code"), [("ok warning", 0), ("warning problem ok", 1)])
def test_only_a_problem_makes_the_exit_code_1(
    levels: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding(level, "x", "y") for level in levels.split()]  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "examine", lambda quick: iter(found))
    assert doctor.main([]) == code


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ImportError("No module named 'x'"), "cannot import it: No module named 'x'; install with"),
        (UserError("no GL; install it"), "no GL; install it"),
        (RuntimeError("one\ntwo"), "failed with RuntimeError: one two; report it"),
    ],
)
def test_a_check_that_raises_is_a_problem_and_the_others_go_on(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Finding:
        raise error

    monkeypatch.setattr(doctor_checks, "gl", fail)
    found = {finding.name: finding for finding in doctor_checks.examine(quick=True)}
    assert list(found) == NAMES
    assert found["gl"].level == "problem"
    assert text in found["gl"].text


def test_it_speaks_without_gl_a_simulator_or_pytorch(tmp_path: Path) -> None:
    for name in ("torch", "dm_control"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} is\\nbroken')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    variables = os.environ | {"PYTHONPATH": path, "MUJOCO_GL": "glfw"}
    variables.pop("SIGHTLINE_GL_RENDERER", None)  # the answer of this process's own probe
    child = subprocess.run(
        [sys.executable, "-m", "experiments.doctor"],
        cwd=tmp_path, env=variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = by_name(child.stdout)
    assert child.returncode == 1
    assert child.stderr == ""
    assert lines["gl"].startswith("problem  gl: no headless OpenGL works here (MUJOCO_GL=glfw)")
    assert "apt-get install" in lines["gl"]
    broken = lines["frames dmc/cartpole-swingup"]
    assert broken.startswith("problem")
    for name in ("gpu", "memory"):
        assert lines[name].startswith(
            f"problem  {name}: cannot import it: torch is broken; install"
        )
    for name in ("packages", "python", "cpu", "frames toy/reach"):
        assert lines[name].startswith("ok"), lines[name]


def test_a_simulator_that_cannot_be_imported_spoils_its_own_line_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_checks, "SECONDS", 0.01)
    monkeypatch.setitem(sys.modules, "envs.dm_control_suite", None)
    found = {finding.name: finding for finding in doctor_checks.examine()}
    assert found["frames toy/reach"].level == "ok"
    assert found["frames dmc/cartpole-swingup"].level == "problem"
    assert "envs.dm_control_suite" in found["frames dmc/cartpole-swingup"].text


def test_a_foreign_agents_package_is_named_before_anything_else(tmp_path: Path) -> None:
    stranger = tmp_path / "agents"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    child = subprocess.run(
        [sys.executable, "-m", "experiments.doctor", "--json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: package 'agents' comes from '{stranger}'")
    assert child.stderr.count("\n") == 1


def test_a_bad_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--quik"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --quik (see --help)\n"


# ----------------------------------------------------------------------------- single findings


def test_pins_that_differ_are_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pins, "pinned", lambda: {"torch": "2.13.0", "mujoco": "3.16.0", "ruff": "1"}
    )
    monkeypatch.setattr(pins, "installed", lambda: {"torch": "2.13.0+cpu", "mujoco": "3.16.1"})
    finding = doctor_checks.constraints()
    assert finding.level == "warning"
    assert "1 of 3 differ from constraints.txt: mujoco 3.16.1 (3.16.0); install" in finding.text
    assert finding.details == {"mujoco": {"installed": "3.16.1", "pinned": "3.16.0"}}
    monkeypatch.setattr(pins, "installed", lambda: {"torch": "2.13.0+cpu", "mujoco": "3.16.0"})
    assert doctor_checks.constraints().level == "ok"
    assert "2 packages as constraints.txt has them, 1 others" in doctor_checks.constraints().text


def test_without_constraints_beside_it_the_doctor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "pinned", lambda pinned=pins.pinned: pinned(tmp_path))
    finding = doctor_checks.constraints()
    assert finding.level == "ok"
    assert "not compared: constraints.txt" in finding.text


def test_a_version_that_does_not_work_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "installed", lambda: {**INSTALLED, "mujoco": "3.17.0"})
    finding = doctor_checks.versions()
    assert finding.level == "problem"
    assert finding.text.startswith("mujoco is 3.17.0, needed is >=3.16,<3.17; install with")
    monkeypatch.setattr(
        pins, "installed", lambda: {k: v for k, v in INSTALLED.items() if k != "dm-control"}
    )
    assert doctor_checks.versions().text.startswith("dm-control is missing; install with")


INSTALLED = pins.installed()
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "level"), [(5e8, "problem"), (2e9, "warning"), (9e9, "ok")])
def test_a_small_disk_is_told_with_what_to_do(
    free: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, int(free)))
    finding = doctor_checks.disk()
    assert finding.level == level
    assert ("remove old runs" in finding.text) == (level != "ok")
    assert finding.details == {"free_bytes": int(free)}


@pytest.mark.parametrize(("free", "level"), [(5e8, "problem"), (2e9, "warning"), (9e9, "ok")])
def test_little_memory_is_told(free: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.core.fields.free_bytes", lambda *where: int(free))
    assert doctor_checks.memory().level == level


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    assert "cannot write in" in doctor_checks.disk().text


def test_a_gpu_that_pytorch_or_gl_does_not_use_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "_GPU_DEVICE", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("envs.rendering.gl_renderer", lambda: "llvmpipe (LLVM 15)")
    monkeypatch.setattr("envs.rendering.choose_backend", lambda: "egl")
    assert doctor_checks.gpu().level == doctor_checks.gl().level == "warning"
    assert "nvidia-smi" in doctor_checks.gpu().text
    assert "in software although a GPU is here" in doctor_checks.gl().text
    monkeypatch.setattr(doctor_checks, "_GPU_DEVICE", tmp_path / "absent")
    assert doctor_checks.gpu().level == doctor_checks.gl().level == "ok"


def test_frames_are_counted_in_finished_episodes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    # 60 steps of the clock pass in 59 agent steps or fewer; an episode of toy/reach has 25.
    assert 0.2 < doctor_checks.frame_rate("toy/reach", "clean", seconds=60) <= 1


@pytest.mark.parametrize(
    ("content", "cores"),
    [("50000 100000", 0.5), ("max 100000", None), ("900000000 100000", None), (None, None)],
)
def test_a_containers_share_of_the_cpu_is_respected(
    content: str | None, cores: float | None, tmp_path: Path
) -> None:
    file = tmp_path / "cpu.max"
    if content is not None:
        file.write_text(content)
    assert usable_cores(file) == (len(os.sched_getaffinity(0)) if cores is None else cores)
