"""Stable-Baselines3's own agents, unmodified, train on `gymnasium.make` of our ids."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy

import envs  # noqa: F401  # tells Gymnasium about our ids

TASKS: dict[str, dict[str, Any]] = {
    "toy/reach-v0": {"size": 36, "distraction": "color_easy"},
    "dmc/cartpole-swingup-v0": {"size": 36, "quality": "fast", "distraction": "video_easy"},
    "metaworld/drawer-open-v0": {"size": 36, "quality": "fast"},
}
"""Three families from pixels; NatureCNN takes 36 pixels at least."""

SETTINGS: dict[type[BaseAlgorithm], dict[str, Any]] = {
    SAC: {"buffer_size": 200, "learning_starts": 20, "batch_size": 8},
    PPO: {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
}


@pytest.mark.parametrize("algorithm", SETTINGS)
@pytest.mark.parametrize("task", TASKS)
def test_their_agents_train_on_our_pixels(algorithm: type[BaseAlgorithm], task: str) -> None:
    env = gym.make(task, seed=0, frame_stack=3, **TASKS[task])
    agent: Any = algorithm("CnnPolicy", env, seed=0, device="cpu", **SETTINGS[algorithm])
    before = {name: value.clone() for name, value in agent.policy.named_parameters()}
    agent.learn(40 if algorithm is SAC else 64)
    after = dict(agent.policy.named_parameters())
    assert all(value.isfinite().all() for value in after.values())
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert any("cnn" in name for name in moved), "the pictures' network learned too"
    action, _ = agent.predict(env.reset(seed=1)[0], deterministic=True)
    assert env.action_space.contains(action)
    env.close()


def test_their_multi_input_policies_train_on_several_cameras() -> None:
    env = gym.make(
        "toy/reach-v0", seed=0, size=36, frame_stack=1, camera=("right", "left"), observation="both"
    )
    agent = PPO("MultiInputPolicy", env, seed=0, device="cpu", **SETTINGS[PPO])
    before = {name: value.clone() for name, value in agent.policy.named_parameters()}
    agent.learn(64)
    after = dict(agent.policy.named_parameters())
    assert all(value.isfinite().all() for value in after.values())
    moved = [name for name, value in after.items() if not value.equal(before[name])]
    for camera in ("left", "right"):
        assert any(f"extractors.{camera}.cnn" in name for name in moved), "each by its own network"
    action, _ = agent.predict(env.reset(seed=1)[0], deterministic=True)
    assert env.action_space.contains(action)
    env.close()


def test_their_sac_learns_our_task_from_a_state() -> None:
    """A random policy scores 12.7, one that stays in the middle 14.1, the best script 23.9."""
    env = gym.make("toy/reach-v0", seed=0, observation="state")
    settings = {"learning_starts": 200, "batch_size": 64, "gamma": 0.9, "learning_rate": 1e-3}
    policy = {"net_arch": [32, 32]}
    agent = SAC("MlpPolicy", env, seed=0, device="cpu", policy_kwargs=policy, **settings)
    agent.learn(1200)
    returns, lengths = evaluate_policy(
        agent, agent.get_env(), n_eval_episodes=20, return_episode_rewards=True
    )
    assert set(lengths) == {25}
    assert np.mean(returns) > 17
    env.close()
