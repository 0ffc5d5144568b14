"""Datasets that Minari reads, that repeat, and whose episodes can be drawn again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import envs
from agents import Policy
from experiments import collect
from experiments.collect import main
from experiments.data import datasets
from experiments.evaluating.rollouts import episode_seeds
from tests.experiments.helpers import difference, refused_by, train

STEPS = 6
REACH = ["--env", "toy/reach", "--size", "24", "--episode-length", str(STEPS), "--episodes", "2"]
RANDOM = ["--random", *REACH]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Minari looks for datasets in this test."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def load(root: Path) -> Any:
    """Return Minari's own function that reads a dataset; the test is skipped without Minari."""
    return pytest.importorskip("minari").load_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train("drq", "toy/reach", folder, steps=16, episode_length=STEPS)


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def refused(capsys: pytest.CaptureFixture[str], *parts: object) -> str:
    """Check that the command refuses its arguments in one line, and return that."""
    return refused_by(main, capsys, words(*parts))


def test_minari_reads_what_the_environment_showed(load: Any, root: Path) -> None:
    assert main(["reach/random-v0", *RANDOM, "--distraction", "color_hard"]) == 0
    dataset = load("reach/random-v0")
    assert len(dataset) == 2
    assert dataset.total_steps == 2 * STEPS
    about = dataset.storage.metadata["sightline"]
    assert about["source"] == "random"
    for episode, seed in zip(dataset, episode_seeds(0, 2), strict=True):
        with closing(envs.make(**about["settings"])) as env:
            seen = [env.reset(seed=seed)[0]]
            steps = [env.step(action) for action in episode.actions]
        np.testing.assert_array_equal(episode.observations, [*seen, *(step[0] for step in steps)])
        np.testing.assert_array_equal(episode.rewards, [step[1] for step in steps])
        assert episode.terminations.tolist() == [step[2] for step in steps]
        assert episode.truncations.tolist() == [step[3] for step in steps]
        assert episode.infos["success"][1:].tolist() == [step[4]["success"] for step in steps]
        assert episode.infos["success"].shape == (STEPS + 1,)
    assert not np.array_equal(dataset[0].actions, dataset[1].actions)


def test_minari_makes_the_environment_again(load: Any, root: Path) -> None:
    assert main(["reach/random-v0", *RANDOM, "--frame-stack", "2"]) == 0
    dataset = load("reach/random-v0")
    with closing(dataset.recover_environment()) as env:
        assert env.observation_space == dataset.observation_space
        seed = episode_seeds(0, 1)[0]
        np.testing.assert_array_equal(env.reset(seed=seed)[0], dataset[0].observations[0])


def test_the_same_command_collects_the_same_episodes(load: Any, root: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([f"reach/{name}-v0", *RANDOM, "--seed", str(seed)]) == 0
    a, b, c = (load(f"reach/{name}-v0")[0] for name in "abc")
    np.testing.assert_array_equal(a.observations, b.observations)
    np.testing.assert_array_equal(a.actions, b.actions)
    assert not np.array_equal(a.actions, c.actions)
    assert not np.array_equal(a.observations[0], c.observations[0])


def test_how_many_episodes_succeeded_is_said_where_the_task_tells(
    load: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that has the time succeeds; one that has a single step does not."""
    flags = ["--expert", "--env", "toy/reach", "--observation", "state", "--episodes", "2"]
    for name, length, said in (("long", "25", "2 of 2"), ("short", "1", "0 of 2")):
        assert main([f"reach/{name}-v0", *flags, "--episode-length", length]) == 0
        assert f"2 episodes, {said} succeeded, return " in capsys.readouterr().out
    untold = ["--random", "--env", "toy/balance", "--observation", "state", "--episodes", "1"]
    assert main(["balance/random-v0", *untold]) == 0
    assert "1 episodes, return " in capsys.readouterr().out


def test_folders_may_be_relative(load: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert main(["reach/relative-v0", *RANDOM, "--root", root.name]) == 0
    assert load("reach/relative-v0").total_episodes > 1


def test_a_runs_policy_acts_in_its_own_task(load: Any, root: Path, run: Path) -> None:
    flags = ["--run", run, "--episodes", 1, "--distraction", "video_hard", "--split", "test"]
    assert main(words("reach/drq-v0", *flags)) == 0
    dataset = load("reach/drq-v0")
    about = dataset.storage.metadata["sightline"]
    policy = Policy.load(run)
    assert (about["source"], about["checkpoint"]) == ("run", policy.checkpoint)
    changes = {"distraction": "video_hard", "split": "test", "camera": "front"}
    assert about["settings"] == {**policy.config["env"], **changes}
    episode = dataset[0]
    chosen = [policy.act(observation) for observation in episode.observations[:-1]]
    np.testing.assert_array_equal(episode.actions, chosen)


@pytest.mark.parametrize("observation", ["state", "both"])
def test_other_observations_are_kept_too(observation: str, load: Any, root: Path) -> None:
    assert main(["reach/random-v0", *RANDOM, "--observation", observation]) == 0
    seen = load("reach/random-v0")[0].observations
    shapes = {"pixels": (STEPS + 1, 9, 24, 24), "state": (STEPS + 1, 4)}
    if observation == "state":
        assert seen.shape == shapes["state"]
    else:
        assert {name: part.shape for name, part in seen.items()} == shapes


def test_states_become_the_pixels_that_a_distraction_would_have_shown(
    load: Any, root: Path
) -> None:
    appearance = ["--distraction", "video_hard", "--split", "test"]
    assert main(["reach/state-v0", *RANDOM, "--observation", "state"]) == 0
    assert main(["reach/wanted-v0", *RANDOM, *appearance]) == 0
    flags = ["--rerender", "reach/state-v0", "--observation", "pixels", *appearance]
    assert main(["reach/drawn-v0", *flags]) == 0
    drawn, wanted = load("reach/drawn-v0"), load("reach/wanted-v0")
    assert len(drawn) == len(wanted) == 2
    for left, right in zip(drawn, wanted, strict=True):
        assert difference({**vars(left)}, {**vars(right)}) is None
    about = drawn.storage.metadata["sightline"]
    assert about["rerendered_from"] == "reach/state-v0"
    assert about["source"] == "random"
    # A dataset that was drawn anew can be drawn anew once more.
    assert main(["reach/clean-v0", "--rerender", "reach/drawn-v0", "--distraction", "clean"]) == 0
    assert main(["reach/random-v0", *RANDOM]) == 0
    clean = load("reach/clean-v0")[1].observations
    np.testing.assert_array_equal(clean, load("reach/random-v0")[1].observations)
    assert (clean != drawn[1].observations).any()


def test_a_failure_midway_leaves_no_dataset(
    load: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[int] = []

    def play(*arguments: Any) -> datasets.Episode:
        if played:
            raise RuntimeError("midway")
        played.append(1)
        return datasets.play(*arguments)

    monkeypatch.setattr(collect, "play", play)
    with pytest.raises(RuntimeError, match="midway"):
        main(["reach/random-v0", *RANDOM])
    assert [path for path in root.rglob("*") if path.is_file()] == []


KILLED = """
import os, sys
from experiments import collect
from experiments.data import datasets
collect.play = lambda *arguments: os.kill(os.getpid(), 9) if done else done.append(1) or datasets.play(*arguments)
done = []
collect.main(sys.argv[1:])
"""
"""A collection that is killed after its first episode."""


def test_what_a_killed_process_left_is_no_dataset_and_is_removed_by_the_next(
    load: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", KILLED, "reach/random-v0", *RANDOM]
    assert (
        subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode
        == -signal.SIGKILL
    )
    (left,) = (root / "reach").iterdir()
    assert left.name.startswith(".writing-")
    assert (left / "data" / "metadata.json").is_file()
    assert main(["reach/new-v0", "--rerender", "reach/randum-v0"]) == 2
    assert capsys.readouterr().err == "error: unknown dataset 'reach/randum-v0'; known: \n"

    with closing(envs.make("toy/reach", size=24)) as env:
        writing = datasets.DatasetWriter(root, "reach/other-v0", env, {})
        assert not left.exists()
        assert f"removed {left}" in capsys.readouterr().out
        with writing:
            datasets.remove_stale(root / "reach")
            assert [path.name.partition("-")[0] for path in (root / "reach").iterdir()] == [
                ".writing"
            ], "what is still written stays"
            writing.add(datasets.play(env, lambda *_: env.action_space.sample(), 0))
    assert sorted(path.name for path in (root / "reach" / "other-v0").iterdir()) == ["data"]
    assert load("reach/other-v0").total_episodes == 1


def test_a_dataset_is_never_overwritten(
    load: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reach/random-v0", *RANDOM]) == 0
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    line = refused(capsys, "reach/random-v0", *RANDOM, "--seed", 5)
    assert f"dataset '{root / 'reach/random-v0'}' exists; choose another version" in line
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["random", *RANDOM], "'random' is no dataset id; give one of the form name-v0"),
        (["x-v0", *RANDOM, "--distraction", "video_hrad"], "did you mean video_hard"),
        (["x-v0", *RANDOM, "--episodes", "0"], "--episodes is 0; give at least 1"),
        (["x-v0", *RANDOM, "--seed", "-1"], "seed is -1"),
        (["x-v0", "--random"], "give --env with --random and --expert"),
        (["x-v0", "--random", "--env", "toy/reech"], "did you mean toy/reach"),
        (
            ["x-v0", "--expert", "--env", "dmc/cartpole-swingup"],
            "--expert is for metaworld/ and toy/ tasks, not for dmc/cartpole-swingup",
        ),
        (["x-v0"], "one of the arguments --run --random --expert --rerender is required"),
        (["x-v0", "--random", "--expert", *REACH], "not allowed with argument"),
        (["x-v0", "--run", "nowhere"], "'nowhere' is no run folder"),
        (["x-v0", "--run", "nowhere", "--env", "toy/reach"], "and with these alone"),
        (["x-v0", "--rerender", "reach/other-v0"], "unknown dataset 'reach/other-v0'"),
        (["x-v0", *RANDOM, "--import", "no_such_module_here"], "there is no module"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(
    flags: list[str], said: str, load: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *flags)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_what_would_not_be_the_same_episodes_is_refused(
    load: Any, root: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reach/random-v0", *RANDOM]) == 0
    line = refused(capsys, "x-v0", "--rerender", "reach/random-v0", "--action-repeat", 2)
    assert "--action-repeat cannot change with --rerender; --observation, --distraction" in line
    line = refused(capsys, "x-v0", "--run", run, "--size", 48)
    assert "--size cannot change with --run; --distraction" in line
    line = refused(capsys, "x-v0", "--rerender", "reach/rondom-v0")
    assert "did you mean reach/random-v0" in line


def test_a_dataset_of_others_has_no_scenes_to_draw(
    load: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reach/random-v0", *RANDOM]) == 0
    file = root / "reach/random-v0/data/metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in metadata.items() if k != datasets.KEY}))
    line = refused(capsys, "x-v0", "--rerender", "reach/random-v0")
    assert "holds no simulator states: it was not collected by Sightline" in line
    newer = {**metadata, datasets.KEY: {**metadata[datasets.KEY], "schema": 2}}
    file.write_text(json.dumps(newer))
    assert "has schema 2, this version reads 1" in refused(
        capsys, "x-v0", "--rerender", "reach/random-v0"
    )


def test_a_damaged_scene_is_told_and_nothing_is_written(
    load: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reach/random-v0", *RANDOM]) == 0
    file = root / "reach/random-v0/data/scenes/episode-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    line = refused(capsys, "reach/x-v0", "--rerender", "reach/random-v0")
    assert f"'{file}' is damaged" in line
    assert [path.name for path in (root / "reach").iterdir()] == ["random-v0"]


def test_a_root_of_ones_own_is_used_instead(load: Any, root: Path, tmp_path: Path) -> None:
    assert main(["reach/random-v0", *RANDOM, "--root", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own/reach/random-v0/data/main_data.hdf5").is_file()
    assert not root.exists()


def test_without_minari_one_line_says_how_to_install_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "--editable '.[data]'" in refused(capsys, "reach/random-v0", *RANDOM)
    assert not root.exists()
