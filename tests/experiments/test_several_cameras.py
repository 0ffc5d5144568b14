"""Commands with `--camera A B`: they train, imitate, resume exactly, evaluate and film, and refuse other views."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest

import envs
from agents import Policy
from agents.core.errors import UserError
from experiments import collect, evaluate, imitate, record
from experiments.data.datasets import Dataset, DatasetWriter
from experiments.sessions.imitation import load_demonstrations
from experiments.train import main
from tests.experiments.helpers import (
    arguments,
    as_arguments,
    assert_same_run,
    refused_by,
    resume,
    train,
)

SIDES = ("right", "left")
"""Not the order of the alphabet, into which Gymnasium brings the parts of a Dict."""
TASK = {"camera": SIDES, "episode_length": 9, "num_envs": 2, "distraction": "video_hard"}


@pytest.mark.parametrize("agent", ["sgqn", "ppo"])
def test_training_from_several_views_resumes_exactly(agent: str, tmp_path: Path) -> None:
    whole = train(agent, "toy/reach", tmp_path / "whole", steps=48, **TASK)
    parts = train(agent, "toy/reach", tmp_path / "parts", steps=24, **TASK)
    config = json.loads((parts / "config.json").read_text())
    assert config["env"]["camera"] == ["right", "left"]
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
    assert "side_by_side" not in configs[1]
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
    assert policy.config["env"]["camera"] == ["right", "left"]
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
    datasets = [Dataset(root, name) for name in ("both-v0", "turned-v0")]
    for dataset in datasets:  # Minari's other readers see a picture of each camera
        shown = dataset[0].observations
        assert sorted(shown) == ["left", "right"]
        assert shown["left"].shape == (13, 3, 24, 24)
        assert "side_by_side" not in dataset.about["settings"]
    both, turned = (data.read(0, side_by_side=True).observations["pixels"] for data in datasets)
    assert np.array_equal(both, np.concatenate([shown["right"], shown["left"]], axis=3))
    assert np.array_equal(turned, np.roll(both, 24, axis=3))
    config = imitate.new_config(vars(imitate.parser("bc").parse_args(imitation(root, tmp_path))))
    with closing(envs.make(**config["env"])) as env:
        store = load_demonstrations(
            config, env.observation_space, env.action_space, horizon=4, stride=4
        )
        assert np.array_equal(store.column("pixels")[:12], both[:12])
        seen, _ = env.reset(seed=datasets[0][0].seed)  # as the evaluations show it
        assert np.array_equal(seen, both[0])
    films = tmp_path / "films"
    flags = ["--root", str(root), "--episodes", "1", "--out", str(films)]
    assert record.main(["--dataset", "both-v0", *flags]) == 0
    frame = iio.imread(films / "episode-0.mp4", index=0).astype(float)

    def distance(observation: np.ndarray) -> float:
        large = observation.repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0)
        return float(abs(frame[: len(large)] - large).mean())

    assert distance(both[0]) < distance(turned[0]) / 2, "the right one stands on the left"
    said = refused_by(
        imitate.main, capsys, imitation(root, tmp_path / "run", ("both-v0", "turned-v0"))
    )
    assert "dataset 'turned-v0' has camera left right, 'both-v0' has right left; imitate" in said


def test_names_that_a_data_set_cannot_hold_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("minari")
    with closing(envs.make("toy/reach", camera=("left", "right"))) as env:
        box = env.observation_space["left"]
        env.observation_space = gym.spaces.Dict({"arm/eye": box, "left": box})
        with pytest.raises(UserError, match="part 'arm/eye'; give the camera by its number"):
            DatasetWriter(tmp_path, "some-v0", env, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("observation", ["pixels", "both"])
def test_a_loaded_policy_sees_cameras_in_the_order_that_it_was_trained_with(
    observation: str, tmp_path: Path
) -> None:
    run = train("sac", "toy/reach", tmp_path / "run", steps=24, observation=observation, **TASK)
    policy = Policy.load(run)
    task: dict[str, Any] = policy.config["env"]
    apart_task = {k: v for k, v in task.items() if k != "side_by_side"}
    with closing(envs.make(**task)) as wide, closing(envs.make(**apart_task)) as apart:
        whole, parts = wide.reset(seed=1)[0], apart.reset(seed=1)[0]
    assert {"left", "right"} <= set(parts)
    action = policy.act(whole)
    assert np.array_equal(policy.act(parts), action)
    batch = {name: part[None] for name, part in parts.items()}
    assert np.array_equal(policy.act(batch), action[None])
    seen = whole if observation == "pixels" else whole["pixels"]
    own = seen[None] if observation == "pixels" else {k: v[None] for k, v in whole.items()}
    assert np.array_equal(policy.saliency(batch, action[None]), policy.saliency(own, action[None]))
    swapped = parts | {"left": parts["right"], "right": parts["left"]}
    assert not np.array_equal(policy.act(swapped), action), "the order counts"
    if observation == "pixels":
        root = ["--root", str(tmp_path), "--run", str(run), "--episodes", "1"]
        assert collect.main(["own-v0", *root]) == 0
        assert sorted(Dataset(tmp_path, "own-v0")[0].observations) == ["left", "right"]


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
