"""An exported policy acts as the run does, wherever it is loaded; and nothing appears that does not."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from agents import Policy
from agents.core.agent import Agent
from agents.core.fields import observation_boxes
from agents.core.greedy import GreedyPolicy
from agents.off_policy.sac import SAC
from agents.policy import space_from_json
from experiments import export, export_formats
from experiments.export import largest_difference, main, random_observations
from tests.experiments.helpers import refused_by, train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exporting.md"

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo-both": ("ppo", "toy/reach", {"observation": "both", "normalize_observation": True}),
    "ppo-discrete": ("ppo", "toy/catch", {"observation": "state"}),
    "sac-state": ("sac", "toy/reach", {"observation": "state"}),
    "rad-pixels": ("rad", "toy/reach", {"precision": "bf16"}),
    "drqv2-chunks": ("drqv2", "toy/reach", {"observation": "both", "action_chunk": 2}),
    "sgqn-pixels": ("sgqn", "toy/reach", {}),
}

ALONE = """
import json, sys
import numpy, torch
for run in sys.argv[1:]:
    extra = {"sightline.json": ""}
    policy = torch.export.load(run + ".pt2", extra_files=extra).module()
    about = json.loads(extra["sightline.json"])
    batches = numpy.load(run + ".npz")
    for size in "1", "7":
        parts = {p["name"]: torch.as_tensor(batches[p["name"] + size]) for p in about["observation"]}
        numpy.save(run + size + ".npy", policy(**parts).numpy())
ours = {name.partition(".")[0] for name in sys.modules} & {"agents", "envs", "wrappers", "experiments"}
assert not ours, ours
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that trains a run of `RUNS`, once."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            agent, task, flags = RUNS[name]
            train(agent, task, folder / name, steps=20, **flags)
        return folder / name

    return make


@pytest.fixture(scope="module")
def exported(
    runs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Return a function that exports a run of `RUNS` as policy.<ending>, once."""
    folder = tmp_path_factory.mktemp("exported")

    def make(name: str, ending: str) -> Path:
        file = folder / f"{name}-{ending}" / f"policy.{ending}"
        if not file.exists():
            file.parent.mkdir()
            assert main(words(runs(name), file)) == 0
            assert list(file.parent.iterdir()) == [file]
        return file

    return make


def observations(run: Path, size: int, seed: int = 5) -> dict[str, np.ndarray]:
    space = space_from_json(Policy.load(run).config["spaces"]["observation"])
    return random_observations(observation_boxes(space), size, np.random.default_rng(seed))


def own_actions(run: Path, observation: dict[str, np.ndarray]) -> np.ndarray:
    policy = Policy.load(run)
    for network in policy.agent.networks().values():
        for part in network.modules():
            if hasattr(part, "bf16"):
                part.bf16 = False
    return policy.act(observation)


def words(run: Path, out: Path, *flags: str) -> list[str]:
    return [str(run), "--out", str(out), "--task-observations", "3", *flags]


@pytest.mark.parametrize("name", RUNS)
def test_onnx_runtime_acts_as_the_run_does_alone_and_in_batches(
    name: str, runs: Callable[[str], Path], exported: Callable[[str, str], Path]
) -> None:
    file = exported(name, "onnx")
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in (1, 7):
        seen = observations(runs(name), size)
        (action,) = session.run(["action"], seen)
        wanted = own_actions(runs(name), seen)
        assert action.dtype == wanted.dtype
        np.testing.assert_allclose(action, wanted, rtol=0, atol=2e-6)


def test_archives_act_as_the_runs_do_in_a_process_without_sightline(
    runs: Callable[[str], Path], exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    seen = {(name, size): observations(runs(name), size) for name in RUNS for size in (1, 7)}
    for name in RUNS:
        (tmp_path / f"{name}.pt2").write_bytes(exported(name, "pt2").read_bytes())
        parts = {f"{p}{size}": seen[name, size][p] for size in (1, 7) for p in seen[name, size]}
        np.savez(tmp_path / f"{name}.npz", **parts)  # type: ignore[arg-type]
    alone = [sys.executable, "-I", "-c", ALONE, *RUNS]
    subprocess.run(alone, cwd=tmp_path, check=True, timeout=300)
    for (name, size), observation in seen.items():
        action = np.load(tmp_path / f"{name}{size}.npy")
        wanted = own_actions(runs(name), observation)
        assert action.dtype == wanted.dtype
        np.testing.assert_allclose(action, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["ppo-both", "ppo-discrete"])
def test_the_metadata_say_what_goes_in_and_what_comes_out(
    name: str, runs: Callable[[str], Path], exported: Callable[[str, str], Path]
) -> None:
    session, extra = onnxruntime.InferenceSession(exported(name, "onnx")), {"sightline.json": ""}
    about = json.loads(session.get_modelmeta().custom_metadata_map["sightline"])
    torch.export.load(exported(name, "pt2"), extra_files=extra)
    assert json.loads(extra["sightline.json"]) == about
    assert [part.name for part in session.get_inputs()] == [p["name"] for p in about["observation"]]
    for given, told in zip(session.get_inputs(), about["observation"], strict=True):
        assert given.shape == ["batch", *told["shape"]]
        assert given.type == {"uint8": "tensor(uint8)", "float32": "tensor(float)"}[told["dtype"]]
    (action,) = session.get_outputs()
    assert action.shape == ["batch", *about["action"]["shape"]]
    if name == "ppo-discrete":
        assert (action.type, about["action"]["count"]) == ("tensor(int64)", 3)
        assert about["frame_stack"] == 1, "a state is no stack of frames"
    else:
        assert (action.type, about["action"]["bounds"]) == ("tensor(float)", [-1, 1])
        assert about["frame_stack"] == 3
    assert about["action_chunk"] == 1
    config = json.loads((runs(name) / "config.json").read_text())
    assert about["config"] == config
    assert about["action_repeat"] == config["env"]["action_repeat"]
    assert about["checkpoint"] == "step-000000020"
    assert about["progress"]["agent_steps"] == 20


def test_the_pages_loaders_load_what_the_command_writes(
    runs: Callable[[str], Path],
    exported: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) == 2
    for ending, block in zip(("onnx", "pt2"), blocks, strict=True):
        assert f"policy.{ending}" in block
        monkeypatch.chdir(exported("sgqn-pixels", ending).parent)
        names: dict[str, Any] = {}
        exec(compile(block, str(PAGE), "exec"), names)
        black = {name: np.asarray(part) for name, part in names["observation"].items()}
        wanted = own_actions(runs("sgqn-pixels"), black)
        np.testing.assert_allclose(np.asarray(names["action"]), wanted, rtol=0, atol=2e-6)


def test_the_default_name_is_the_checkpoints_and_the_line_tells_the_difference(
    runs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("sac-state")
    assert main([str(run), "--task-observations", "60"]) == 0
    file = run / "exports" / "step-000000020.onnx"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote {file} (")
    told = re.fullmatch(
        r"largest difference .*: (\d\.\de-\d\d|0\.0e\+00), over 72 random observations "
        r"and 60 of toy/reach",
        lines[1],
    )
    assert told is not None
    assert float(told[1]) < 2e-6
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == f"error: '{file}' exists; use --overwrite, or another --out\n"
    before = file.stat().st_ino
    assert main([str(run), "--overwrite"]) == 0
    assert file.stat().st_ino != before


# ------------------------------------------------------------------------------------ what is refused


def refused(capsys: pytest.CaptureFixture[str], *given: object) -> str:
    """Run the command, which must refuse in one line, and return it."""
    return refused_by(main, capsys, given)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_module_that_acts_differently_is_not_written(
    ending: str,
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def bolder(self: SAC) -> GreedyPolicy:
        def act(features: torch.Tensor) -> torch.Tensor:
            return 1.01 * self.actor(features)[0].tanh()

        return GreedyPolicy(act, self.action_shape, [self.actor])

    file = tmp_path / f"policy.{ending}"
    file.write_text("precious")
    monkeypatch.setattr(SAC, "greedy", bolder)
    err = refused(capsys, *words(runs("sac-state"), file, "--overwrite"))
    assert "the exported actions differ from the run's own by" in err
    assert [left.name for left in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "precious"


def test_differences_of_type_and_shape_and_of_no_number_are_seen() -> None:
    batch = [{"state": np.zeros((2, 1), np.float32)}]
    wanted = np.array([[0.25], [0.5]], np.float32)
    cases = {
        0.0: wanted,
        0.5: wanted + np.array([[0.0], [-0.5]], np.float32),
        np.inf: wanted[:1],
        -np.inf: wanted.astype(np.float64),
    }
    for difference, other in cases.items():
        seen = largest_difference(lambda _: wanted, lambda _, other=other: other, batch)
        assert seen == abs(difference)
    nan = np.full_like(wanted, np.nan)
    assert np.isnan(largest_difference(lambda _: wanted, lambda _: nan, [*batch, *batch]))


def test_an_agent_that_cannot_be_exported_says_so(
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(SAC, "greedy", Agent.greedy)
    err = refused(capsys, *words(runs("sac-state"), tmp_path / "policy.pt2"))
    assert "SAC cannot be exported" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--format onxx", "invalid choice: 'onxx' (choose from 'onnx', 'pt2')"),
        ("--out policy.bin", "--out is 'policy.bin'; give a file that ends in .onnx or .pt2"),
        ("--out policy.pt2 --format onnx", "give a file that ends in .onnx"),
        ("--out missing/policy.onnx", "folder 'missing' does not exist"),
        ("--out folder.onnx", "is a folder"),
        ("--out taken.onnx", "--out taken.onnx exists; add --overwrite"),
        ("--checkpoint bst", "has no checkpoint bst"),
        ("--task-observations -1", "--task-observations is -1; give 0 or more"),
        ("--import no_such_module_here", "there is no module 'no_such_module_here'"),
        ("--fromat pt2", "did you mean --format"),
    ],
)
def test_a_bad_flag_is_one_line_and_leaves_no_file(
    flags: str,
    said: str,
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs("rad-pixels")
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    Path("taken.onnx").write_text("precious")
    assert said in refused(capsys, run, *flags.split())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.onnx", "taken.onnx"]
    assert not (run / "exports").exists()
    assert Path("taken.onnx").read_text() == "precious"


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("place", ["missing", "taken"])
def test_a_folder_that_takes_no_file_is_one_line_that_names_it(
    ending: str,
    place: str,
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As /proc does, which exists and where nobody may write, not even root."""
    run, folder = runs("sac-state"), tmp_path / "folder"
    folder.mkdir()
    real = export.FORMATS[ending].write

    def write(program: Any, file: Path, about: str) -> None:
        if place == "missing":
            folder.rmdir()
        else:
            file.mkdir()
        real(program, file, about)

    changed = dataclasses.replace(export.FORMATS[ending], write=write)
    monkeypatch.setitem(export.FORMATS, ending, changed)
    err = refused(capsys, *words(run, folder / f"policy.{ending}"))
    reason = {"missing": "No such file or directory", "taken": "Is a directory"}[place]
    assert f"cannot write 'policy.{ending}' into folder '{folder}' ({reason})" in err
    assert "give another --out" in err
    left = [file for file in folder.iterdir() if file.is_file()] if folder.exists() else []
    assert not left


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_file_system_that_takes_no_file_is_one_line(
    ending: str, runs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, *words(runs("sac-state"), Path(f"/proc/policy.{ending}")))
    assert f"cannot write 'policy.{ending}' into folder '/proc' (" in err


def test_a_run_that_does_not_exist_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no run folder" in refused(capsys, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", export_formats.FORMATS["onnx"].needs)
def test_without_the_extra_one_line_says_how_to_install_it(
    package: str,
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs("sac-state")
    monkeypatch.setitem(sys.modules, package, None)
    err = refused(capsys, *words(run, tmp_path / "policy.onnx"))
    assert f"({package})" in err
    assert "--editable '.[export]'" in err
    assert not list(tmp_path.iterdir())


def test_a_task_that_cannot_be_made_here_can_be_left_out(
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise export.UserError("no videos here")

    run, file = runs("sac-state"), tmp_path / "policy.pt2"
    monkeypatch.setattr(export.envs, "make", fail)
    err = refused(capsys, *words(run, file))
    assert err == (
        "error: no videos here (or check on random observations alone: --task-observations 0)\n"
    )
    assert main([str(run), "--out", str(file), "--task-observations", "0"]) == 0
    assert file.exists()
