"""Stable-Baselines3's PPO trains on our environments as on its own, and its runs are evaluated and reported as ours."""

from __future__ import annotations

import csv
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import envs
from agents import Policy
from agents.core.errors import UserError
from agents.core.logging import Logger
from agents.core.loops import LoopSettings
from agents.on_policy.ppo import PPOConfig
from experiments import baseline, benchmark
from experiments.baseline import LACKING, SHARED, main
from experiments.evaluate import evaluate_run
from experiments.report import build_report
from experiments.sessions.baseline import FIELDS, Protocol, SB3VectorEnv, make_model
from experiments.train import main as train_main

CARTPOLE = {"observation": "state", "episode_length": 14}
"""Some episodes fall, the others are cut off."""

SEEDS = {"exploration": 5, "agent": 6}


def child_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds with which a vector environment begins."""
    children = [np.random.SeedSequence(seed, spawn_key=(i, 0)) for i in range(count)]
    return [int(child.generate_state(1)[0]) for child in children]


def lone_envs(count: int) -> list[gym.Env]:
    return [envs.make("gym/CartPole-v1", seed=0, **CARTPOLE) for _ in range(count)]


def test_the_adapter_says_what_a_loop_by_hand_sees() -> None:
    adapter = SB3VectorEnv(envs.make_vec("gym/CartPole-v1", 3, seed=0, **CARTPOLE), seed=5)
    lone = lone_envs(3)
    seen = adapter.reset()
    by_hand = [env.reset(seed=s)[0] for env, s in zip(lone, child_seeds(5, 3), strict=True)]
    np.testing.assert_array_equal(seen, by_hand)
    rng, returns, ends = np.random.default_rng(0), np.zeros(3), {True: 0, False: 0}
    for _ in range(120):
        actions = rng.integers(0, 2, 3)
        seen, rewards, dones, infos = adapter.step(actions)
        for i, env in enumerate(lone):
            after, reward, terminated, truncated, _ = env.step(actions[i])
            returns[i] += float(reward)
            assert rewards[i] == reward
            assert dones[i] == (terminated or truncated)
            assert ("terminal_observation" in infos[i]) == dones[i]
            if dones[i]:
                np.testing.assert_array_equal(infos[i]["terminal_observation"], after)
                assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
                assert infos[i]["episode"]["r"] == returns[i]
                ends[infos[i]["TimeLimit.truncated"]] += 1
                returns[i], (after, _) = 0, env.reset()
            np.testing.assert_array_equal(seen[i], after)
    adapter.close()
    assert min(ends.values()) >= 3, "both kinds of ends were met"


def test_a_step_lost_with_its_worker_ends_an_episode_where_it_stood() -> None:
    class Vector:
        """Two environments, of which the second loses its worker."""

        num_envs = 2
        single_observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
        single_action_space = gym.spaces.Discrete(2)

        def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
            return None, None

        def reset(self, seed: int | None) -> Any:
            return np.array([[1.0], [2.0]], np.float32), {}

        def step_async(self, actions: Any) -> None:
            pass

        def step_wait(self) -> Any:
            never = np.zeros(2, bool)
            info = {"dropped": np.array([False, True])}
            return np.array([[3.0], [4.0]], np.float32), np.array([1.0, 0.0]), never, never, info

    adapter = SB3VectorEnv(Vector(), seed=0)  # type: ignore[arg-type]
    adapter.reset()
    _, rewards, dones, infos = adapter.step(np.zeros(2, np.int64))
    assert dones.tolist() == [False, True]
    assert rewards.tolist() == [1, 0]
    assert infos[0] == {}
    assert infos[1]["TimeLimit.truncated"] is True
    assert infos[1]["terminal_observation"] == [2.0]


def test_it_learns_what_it_learns_in_its_own_environments() -> None:
    """Weights are equal bit for bit: the adapter, and nothing else of ours, is in between."""
    config = PPOConfig(rollout_length=64, minibatch_size=32, epochs=2, hidden=(8, 8))
    vector = envs.make_vec("gym/CartPole-v1", 2, seed=0, **CARTPOLE)
    ours, _ = make_model(vector, config, seeds=SEEDS)
    ours.learn(256)
    vector.close()
    their_env = DummyVecEnv([lambda env=env: Monitor(env) for env in lone_envs(2)])  # type: ignore[misc]
    theirs = PPO(
        "MlpPolicy", their_env, n_steps=64, batch_size=32, n_epochs=2, seed=6, device="cpu",
        policy_kwargs={"net_arch": [8, 8]},
    )  # fmt: skip
    their_env._seeds = child_seeds(5, 2)  # type: ignore[assignment]
    before = theirs.policy.action_net.weight.clone()
    theirs.learn(256)
    assert not before.equal(theirs.policy.action_net.weight)
    for name, value in theirs.policy.state_dict().items():
        assert value.equal(ours.policy.state_dict()[name]), name


def test_every_hyperparameter_arrives() -> None:
    config = PPOConfig(
        rollout_length=48, minibatch_size=24, epochs=3, discount=0.9, gae_lambda=0.8,
        learning_rate=2e-3, clip=0.3, value_coefficient=0.7, entropy_coefficient=0.01,
        max_gradient_norm=0.4, normalize_advantage=False, normalize_observation=True,
        scale_reward=True, hidden=(9, 7), initial_log_std=-0.5,
    )  # fmt: skip
    told = {*FIELDS, "normalize_observation", "scale_reward", "hidden", "initial_log_std"}
    assert told == set(SHARED)
    assert "surrogate" in LACKING
    assert all(getattr(config, name) != getattr(PPOConfig(), name) for name in told)
    with closing(envs.make_vec("toy/reach", 2, observation="state", seed=0)) as vector:
        model, normalizer = make_model(vector, config, seeds=SEEDS)
    for ours, theirs in FIELDS.items():
        value = getattr(model, theirs)
        assert (value(1.0) if callable(value) else value) == getattr(config, ours), ours
    assert isinstance(normalizer, VecNormalize)
    assert (normalizer.norm_obs, normalizer.norm_reward, normalizer.gamma) == (True, True, 0.9)
    sizes = [layer.out_features for layer in model.policy.mlp_extractor.value_net[::2]]
    assert sizes == [9, 7]
    assert model.policy.log_std.tolist() == [-0.5, -0.5]
    assert model.policy.optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("steps", [96, 100])
def test_evaluations_come_after_the_updates_of_their_step(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts end at steps 32, 64, 96: an evaluation due there sees what was learned from them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # their logger wants a folder
    seen: dict[int, int] = {}
    with closing(envs.make_vec("gym/CartPole-v1", 2, seed=0, **CARTPOLE)) as vector:
        config = PPOConfig(rollout_length=16, minibatch_size=16, epochs=2, hidden=(4,))
        model, _ = make_model(vector, config, seeds=SEEDS)

        def evaluate() -> dict[str, float]:
            seen[model.num_timesteps] = model._n_updates
            return {"eval/clean/return_mean": 0.0}

        settings = LoopSettings(steps=steps, log_every=20, eval_every=16, eval_episodes=1)
        with closing(Logger(tmp_path)) as logger:
            protocol = Protocol(settings, logger, evaluate, action_repeat=1, line=lambda _: None)
            model.learn(steps, callback=protocol)
    assert seen == {step: 2 * (step // 32) for step in range(16, steps + 1, 16)}
    assert model.num_timesteps == steps
    assert not list((tmp_path / "none").glob("SB3*"))


def evaluated_steps(run: Path) -> list[tuple[str, ...]]:
    with (run / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    kept = ("agent_steps", "env_frames", "gradient_updates", "tag")
    return [tuple(row[k] for k in kept) for row in rows if row["tag"].startswith("eval/")]


TINY = [
    "--env", "gym/CartPole-v1", "--observation", "state", "--episode-length", "30", "--seed", "2",
    "--steps", "200", "--eval-every", "32", "--eval-episodes", "2", "--num-envs", "2",
    "--rollout-length", "16", "--minibatch-size", "16", "--epochs", "2", "--hidden", "8",
    "--device", "cpu", "--threads", "1",
]  # fmt: skip


def test_its_run_is_evaluated_at_our_steps_and_reported_beside_ours(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ppo", tmp_path / "sb3"
    assert train_main(["--agent", "ppo", *TINY, "--run-dir", str(ours)]) == 0
    assert main([*TINY, "--run-dir", str(theirs)]) == 0
    assert evaluated_steps(ours) == evaluated_steps(theirs)
    assert len(evaluated_steps(ours)) == 2 * (200 // 32)
    for run in (ours, theirs):
        evaluate_run(run, distractions=["clean"], episodes=2, num_envs=2, workers=0)
    page = build_report([ours, theirs], tmp_path / "report").read_text()
    assert "sb3-ppo" in page
    counts = Policy.load(theirs).progress
    assert (counts["agent_steps"], counts["gradient_updates"]) == (200, 6 * 2 * 2)
    with pytest.raises(UserError, match="keeps its last policy only"):
        Policy.load(theirs, checkpoint="best")


def test_frames_are_the_control_steps_that_were_taken(tmp_path: Path) -> None:
    """Ours are, too: 9 control steps are agent steps of 4, 4 and 1."""
    flags = [
        "--env", "toy/reach", "--observation", "state", "--action-repeat", "4", "--episode-length", "9", "--seed", "2",
        "--steps", "28", "--eval-every", "0", "--log-every", "14", "--num-envs", "2", "--rollout-length", "14",
        "--minibatch-size", "14", "--epochs", "1", "--hidden", "8", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    ours, theirs = tmp_path / "ppo", tmp_path / "sb3"
    assert train_main(["--agent", "ppo", *flags, "--run-dir", str(ours)]) == 0
    assert main([*flags, "--run-dir", str(theirs)]) == 0
    frames = 2 * (4 * 9 + 2 * 4)
    counts = [Policy.load(run).progress for run in (ours, theirs)]
    assert [count["env_frames"] for count in counts] == [frames, frames]
    for run in (ours, theirs):
        with (run / "metrics.csv").open(newline="") as handle:
            rows = {
                (int(row["agent_steps"]), int(row["env_frames"])) for row in csv.DictReader(handle)
            }
        assert (14, 2 * (2 * 9 + 4)) in rows
        assert (28, frames) in rows


def test_what_normalizes_is_kept_with_the_policy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*TINY, "--normalize-observation", "--scale-reward", "--run-dir", str(run)]) == 0
    statistics = json.loads((run / "normalization.json").read_text())
    assert len(statistics["mean"]) == 4
    model = PPO.load(run / "model.zip", device="cpu")
    seen = np.random.default_rng(0).normal(0, 0.5, (50, 4)).astype(np.float32)
    spread = np.sqrt(np.array(statistics["variance"]) + 1e-8)
    normalized = ((seen - statistics["mean"]) / spread).clip(-10, 10).astype(np.float32)
    theirs, _ = model.predict(normalized, deterministic=True)
    np.testing.assert_array_equal(Policy.load(run).act(seen), theirs)
    with torch.no_grad():
        plain, _ = model.policy(torch.as_tensor(seen), deterministic=True)[:2]
    assert (plain.numpy() != theirs).any()


def test_a_run_that_was_stopped_begins_again_and_a_finished_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def stop(self: Protocol) -> bool:
        if self.num_timesteps > 100:
            raise KeyboardInterrupt
        return whole(self)

    whole = Protocol._on_step
    monkeypatch.setattr(Protocol, "_on_step", stop)
    assert main([*TINY, "--run-dir", str(run)]) == 130
    assert (run / "config.json").is_file()
    assert not baseline.is_finished(run)
    monkeypatch.undo()
    assert main([*TINY, "--run-dir", str(run)]) == 0
    assert len(evaluated_steps(run)) == 2 * (200 // 32), "no line of the first try is left"
    before = (run / "model.zip").read_bytes()
    assert main([*TINY, "--run-dir", str(run)]) == 2
    assert "exists; choose another --run-dir" in capsys.readouterr().err
    assert (run / "model.zip").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--agent", "sb3-pop"], "did you mean sb3-ppo"),
        (["--surrogate", "spo"], "unknown flag '--surrogate'"),
        (["--env", "toy/reach", "--size", "24"], "36 x 36 pixels at least"),
        (["--env", "toy/reach", "--observation", "both"], "not both"),
        (["--threads", "0"], "give a positive number"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run-dir", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run").exists()


def test_a_grid_trains_each_agent_by_its_own_command(tmp_path: Path) -> None:
    job = benchmark.Job("sb3-ppo", "sb3-ppo", "gym/CartPole-v1", 1, tmp_path / "run")
    command = benchmark._training(job, ["--steps", "5"], ["--threads", "1"])
    assert command[2:5] == ["experiments.baseline", "--agent", "sb3-ppo"]
    assert command[-4:] == ["--steps", "5", "--threads", "1"]
    words = ["--agent", "sb3-ppo", "--env", "gym/CartPole-v1", "--seed", "1", "--steps", "500"]
    job.folder.mkdir()
    config = baseline.new_config(vars(baseline.parser().parse_args(words)))
    (job.folder / "config.json").write_text(json.dumps(config))
    assert benchmark._training(job, [], [])[2] == "experiments.baseline", "it begins again"
    benchmark.check_same(job, ["--steps", "500"], 10, ["clean"])
    del config["env"]["action_chunk"]  # a version before it wrote none
    (job.folder / "config.json").write_text(json.dumps(config))
    benchmark.check_same(job, ["--steps", "500"], 10, ["clean"])
    with pytest.raises(UserError, match="train/steps"):
        benchmark.check_same(job, ["--steps", "600"], 10, ["clean"])
    (job.folder / "model.zip").touch()
    assert benchmark._training(job, [], []) == []


@pytest.mark.slow
def test_a_grid_of_both_learns_and_is_collected(tmp_path: Path) -> None:
    """CartPole from a state, 5,000 steps; a random policy scores 22."""
    words = ["--agents", "ppo", "sb3-ppo", "--envs", "gym/CartPole-v1", "--seeds", "1"]
    words += ["--distractions", "clean", "--threads", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--"]
    words += [
        "--observation",
        "state",
        "--steps",
        "5000",
        "--eval-every",
        "2500",
        "--num-envs",
        "2",
    ]
    words += ["--rollout-length", "128", "--learning-rate", "1e-3", "--hidden", "64", "64"]
    assert benchmark.main(words) == 0
    with (tmp_path / "out" / "results.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["distraction"] == "clean"]
    assert {row["agent"] for row in rows} == {"ppo", "sb3-ppo"}
    assert all(float(row["return_mean"]) > 100 for row in rows)
    page = build_report([tmp_path / "runs"], tmp_path / "report").read_text()
    assert "sb3-ppo" in page
