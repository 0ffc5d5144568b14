"""Commands with `--camera A B`: they train, imitate, resume exactly, evaluate and film, and refuse other views."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

import envs
from agents import Policy
from experiments import collect, evaluate, imitate, record
from experiments.data.datasets import Dataset
from experiments.train import main
from tests.experiments.helpers import (
    arguments,
    as_arguments,
    assert_same_run,
    refused_by,
    resume,
    train,
)

SIDES = ("left", "right")
TASK = {"camera": SIDES, "episode_length": 9, "num_envs": 2, "distraction": "video_hard"}


@pytest.mark.parametrize("agent", ["sgqn", "ppo"])
def test_training_from_several_views_resumes_exactly(agent: str, tmp_path: Path) -> None:
    whole = train(agent, "toy/reach", tmp_path / "whole", steps=48, **TASK)
    parts = train(agent, "toy/reach", tmp_path / "parts", steps=24, **TASK)
    config = json.loads((parts / "config.json").read_text())
    assert config["env"]["camera"] == ["left", "right"]
    assert config["spaces"]["observation"]["box"][1:] == [24, 48]
    resume(parts, steps=48)
    assert_same_run(whole, parts)


def test_one_camera_by_name_is_the_run_without_a_flag(tmp_path: Path) -> None:
    flags = {"steps": 24, "episode_length": 9}
    plain = train("drq", "toy/reach", tmp_path / "plain", **flags)
    named = train("drq", "toy/reach", tmp_path / "named", camera="front", **flags)
    assert_same_run(plain, named)
    configs = [json.loads((run / "config.json").read_text())["env"] for run in (plain, named)]
    assert configs[0].pop("camera") is None
    assert configs[1].pop("camera") == "front"
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the script's episodes through both cameras, and of them in the other order."""
    pytest.importorskip("minari")
    root = tmp_path_factory.mktemp("datasets")
    task = ["--env", "toy/reach", "--size", "24", "--frame-stack", "1", "--episode-length", "12"]
    flags = ["--root", str(root), "--camera"]
    assert collect.main(["both-v0", "--expert", *task, "--episodes", "2", *flags, *SIDES]) == 0
    assert collect.main(["turned-v0", "--rerender", "both-v0", *flags, *SIDES[::-1]]) == 0
    return root


def imitation(root: Path, run: Path, dataset: str = "both-v0", **flags: Any) -> list[str]:
    values = {
        "--dataset": dataset, "--root": root, "--run-dir": run, "--preset": "debug", "--device": "cpu",
        "--threads": 1, "--seed": 3, "--steps": 4, "--eval-every": 0, "--checkpoint-every": 4, "--action-chunk": 4,
        "--horizon": 6,
    }  # fmt: skip
    return as_arguments(values | {"--" + k.replace("_", "-"): v for k, v in flags.items()})


@pytest.mark.parametrize("agent", ["diffusion-policy", "flow-policy"])
def test_imitation_from_several_views_resumes_exactly_and_every_command_takes_it(
    agent: str, root: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert imitate.main(imitation(root, whole, agent=agent, steps=8)) == 0
    assert imitate.main(imitation(root, run, agent=agent)) == 0
    assert imitate.main(["--resume", str(run), "--steps", "8"]) == 0
    assert_same_run(whole, run)
    policy = Policy.load(run)
    assert policy.config["env"]["camera"] == ["left", "right"]
    with closing(envs.make(**policy.config["env"])) as env:
        seen, _ = env.reset(seed=0)
        action = policy.act(seen)
        assert env.action_space.contains(action)
        assert policy.saliency(seen[None], action[None]).shape == (1, 24, 48)
    if agent == "flow-policy":
        flags = ["--episodes", "1", "--distractions", "video_hard"]
        assert evaluate.main([str(run), *flags, "--num-envs", "1", "--workers", "0"]) == 0
        (result,) = (run / "evaluations").glob("*.json")
        scores = json.loads(result.read_text())["results"]["video_hard"]["saliency"]
        assert 0 < scores["area"][0] < 0.3
        assert record.main([str(run), *flags, "--out", str(tmp_path / "films")]) == 0
        frame = iio.imread(tmp_path / "films" / "video_hard-1.mp4", index=0)
        assert frame.shape[1] == 3 * 2 * 192, "three panels of two views"


def test_demonstrations_keep_the_views_and_are_not_mixed_with_others(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, turned = (Dataset(root, name)[0].observations for name in ("both-v0", "turned-v0"))
    assert both.shape[1:] == (3, 24, 48)
    assert np.array_equal(turned, np.roll(both, 24, axis=3))
    said = refused_by(
        imitate.main, capsys, imitation(root, tmp_path / "run", ("both-v0", "turned-v0"))
    )
    assert "dataset 'turned-v0' has camera right left, 'both-v0' has left right; imitate" in said


def test_a_policy_is_not_fine_tuned_on_other_views(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "base"
    assert imitate.main(imitation(root, run, agent="flow-policy")) == 0
    capsys.readouterr()
    words = arguments("dppo", "toy/reach", tmp_path / "tuned", steps=2, base=run, camera="left")
    said = refused_by(main, capsys, words)
    assert "observes uint8 [3, 24, 48], this task uint8 [3, 24, 24]" in said
    assert "--camera" in said
