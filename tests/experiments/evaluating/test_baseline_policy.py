"""A zip of Stable-Baselines3 is evaluated as a run is, and no pickle of it runs unless that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from torch import nn

import envs
from agents.core.seeding import spawn_seeds
from experiments.evaluate import main

FLAGS = ["--distractions", "clean", "--episodes", "4", "--num-envs", "2", "--workers", "0"]
PENDULUM = ["--env", "gym/Pendulum-v1", "--observation", "state"]


@pytest.fixture(scope="module", name="pendulum")
def _pendulum(tmp_path_factory: pytest.TempPathFactory) -> PPO:
    settings = {"n_steps": 256, "n_epochs": 2, "gamma": 0.9, "seed": 1, "device": "cpu"}
    return PPO("MlpPolicy", "Pendulum-v1", **settings).learn(512)  # type: ignore[arg-type]


def test_a_zip_scores_what_its_own_actions_score(pendulum: PPO, tmp_path: Path) -> None:
    """They reach to 2 where our task takes 1."""
    pendulum.save(tmp_path / "model.zip")
    out = tmp_path / "result.json"
    assert main([str(tmp_path / "model.zip"), *PENDULUM, *FLAGS, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["agent_steps"], result["gradient_updates"]) == (512, 2 * 2 * 256 // 64)
    ours = result["results"]["clean"]["returns"]
    vector = envs.make_vec("gym/Pendulum-v1", 2, observation="state", seed=0)
    seen, _ = vector.reset(seed=spawn_seeds(0)[1]["evaluation"])
    returns = np.zeros((2, 2))
    for step in range(400):
        action, _ = pendulum.predict(seen, deterministic=True)
        seen, reward, *_ = vector.step(action / 2)
        returns[step // 200] += reward
    vector.close()
    np.testing.assert_allclose(sorted(ours), sorted(returns.ravel()), rtol=1e-3)


def test_pixels_meet_distractions_and_are_looked_at(tmp_path: Path) -> None:
    env = gym.make("toy/reach-v0", size=36, frame_stack=2, seed=0)
    PPO("CnnPolicy", env, n_steps=8, batch_size=8, device="cpu").save(tmp_path / "cnn.zip")
    words = [
        str(tmp_path / "cnn.zip"), "--env", "toy/reach", "--size", "36", "--frame-stack", "2",
        "--distractions", "clean", "color_hard", "--episodes", "2", "--num-envs", "2",
        "--workers", "0", "--name", "here",
    ]  # fmt: skip
    assert main(words) == 0
    result = json.loads((tmp_path / "cnn-here.json").read_text())
    assert set(result["results"]) == {"clean", "color_hard"}
    assert result["results"]["clean"]["saliency"]["energy"]
    assert (tmp_path / "cnn-here" / "clean.mp4").is_file()
    assert main(words) == 2


class Own(nn.ReLU):
    """An activation of somebody's own."""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "does not say on which task it acts; give --env"),
        (["--env", "gym/Pendulum-v1"], "give --observation state"),
        (["--env", "gym/CartPole-v1", "--observation", "state"], "the task gives [4]"),
        (["--env", "gym/Acrobot-v1", "--observation", "state"], "the task gives [6]"),
        ([*PENDULUM, "--sb3-activation", "rellu"], "did you mean relu"),
        ([*PENDULUM, "--sb3-normalization", __file__], "add --trust-pickle"),
        ([*PENDULUM, "--distractions", "cleen"], "cleen"),
        ([*PENDULUM, "--out", "nowhere/result.json"], "folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], said: str, pendulum: PPO, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pendulum.save(tmp_path / "model.zip")
    assert main([str(tmp_path / "model.zip"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.count("\n") == 0
    assert said in error
    assert not list(tmp_path.glob("*.json"))


def test_flags_of_zips_are_refused_with_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--env", "toy/reach"]) == 2
    assert "--env is for a zip" in capsys.readouterr().err
    assert main([str(tmp_path), "--frame-stack", "2"]) == 2
    assert "--frame-stack is for a zip" in capsys.readouterr().err


def test_a_policy_of_somebodys_own_needs_trust(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"activation_fn": Own}
    model = PPO("MlpPolicy", "Pendulum-v1", policy_kwargs=options, device="cpu", n_steps=64)
    model.save(tmp_path / "model.zip")
    words = [str(tmp_path / "model.zip"), *PENDULUM, *FLAGS]
    assert main(words) == 2
    assert "give --sb3-activation" in capsys.readouterr().err
    assert main([*words, "--sb3-activation", "relu"]) == 0
