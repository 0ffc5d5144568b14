"""Imitation in seconds: as good as the demonstrator, unless it is broken; and two ways of doing a thing stay two."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from agents import AGENTS, make_agent
from agents.core.agent import as_observation
from agents.core.demonstrations import Demonstrations
from agents.core.offline import OfflineAgent
from envs.toy_experts import scripted_expert

CPU = torch.device("cpu")
SMALL = {
    "horizon": 6, "denoiser": "mlp", "width": 64, "blocks": 1, "time_features": 16, "batch_size": 64,
    "feature_dim": 32, "encoder": "small", "denoising_steps": 4, "warmup": 20, "learning_rate": 3e-3,
    "ema_decay": 0.98,
}  # fmt: skip
RANDOM, EXPERT = 12.7, 23.9
"""Returns in toy/reach, see `envs.toy`."""


def build(name: str, space: gym.Space, action: gym.Space, **changes: Any) -> OfflineAgent:
    values = {**SMALL, **changes}
    configs = [
        dataclasses.replace(
            config,
            **{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values},
        )
        for config in AGENTS[name].configs
    ]
    agent = make_agent(name, space, action, configs=configs, seed=0)
    assert isinstance(agent, OfflineAgent)
    return agent


def demonstrate(
    observation: str, *, episodes: int = 30, shuffled: bool = False, camera: Any = None
) -> Demonstrations:
    """Return the expert's episodes in toy/reach; shuffled, its actions are of other moments."""
    expert, random = scripted_expert("reach"), np.random.default_rng(0)
    settings: dict[str, Any] = {
        "size": 24,
        "frame_stack": 1,
        "camera": camera,
        "side_by_side": True,
    }
    with closing(envs.make("toy/reach", observation="both", **settings)) as env:
        boxes: Any = env.observation_space
        space = boxes[observation]
        store = Demonstrations(
            space, env.action_space, rows=25 * episodes, horizon=SMALL["horizon"], stride=4, log=lambda _: None
        )  # fmt: skip
        seen, done = [], []
        for seed in range(episodes):
            now, _ = env.reset(seed=seed)
            for _ in range(25):
                seen.append(now[observation])
                # Near what the script does: a demonstrator is no line, and a policy learns to come back.
                done.append(np.clip(expert(now["state"]) + random.normal(0, 0.05, 2), -1, 1))
                now, *_ = env.step(done[-1])
    if shuffled:
        random.shuffle(done)
    for start in range(0, len(done), 25):
        store.add(np.stack(seen[start : start + 25]), np.stack(done[start : start + 25]))
    return store


def learn(
    name: str, observation: str, updates: int, *, sign: float = 1.0, worst: float = 1.0, **data: Any
) -> float:
    """Return the mean return in chunks of four actions after imitating, of a share of episodes, the worst ones."""
    store = demonstrate(observation, **data)
    episodes = 20
    task = {
        "size": 24, "frame_stack": 1, "observation": observation, "action_chunk": 4, "camera": data.get("camera"),
        "side_by_side": True,
    }  # fmt: skip
    with closing(envs.make_vec("toy/reach", episodes, **task)) as vector:
        agent = build(name, vector.single_observation_space, vector.single_action_space)
        agent.prepare(store)
        loss = agent.policy.loss
        agent.policy.loss = lambda *a, **k: sign * loss(*a, **k)
        for step in range(updates):
            agent.set_progress(step)
            agent.update(store.sample(agent.replay_settings.batch_size))
        seen, _ = vector.reset(seed=1234)
        total = np.zeros(episodes)
        for _ in range(7):  # of four actions, the last of one
            action = agent.act(as_observation(seen, CPU), explore=False)[0]
            seen, reward, *_ = vector.step(action)
            total += reward
    return float(np.sort(total)[: round(worst * episodes)].mean())


@pytest.mark.parametrize("name", ["diffusion-policy", "flow-policy", "bc"])
def test_imitation_from_a_state_reaches_the_demonstrator(name: str) -> None:
    assert learn(name, "state", 400) > 21.5


@pytest.mark.parametrize(
    "broken", [{"shuffled": True}, {"sign": -1.0}], ids=["shuffled actions", "ascent"]
)
@pytest.mark.parametrize("name", ["diffusion-policy", "flow-policy"])
def test_a_broken_imitation_stays_far_below(name: str, broken: dict[str, Any]) -> None:
    assert learn(name, "state", 400, **broken) < 17


@pytest.mark.parametrize("name", ["diffusion-policy", "flow-policy"])
def test_imitation_from_pixels_reaches_the_demonstrator(name: str) -> None:
    assert learn(name, "pixels", 400, episodes=40) > 19.5


def test_pixels_with_shuffled_actions_teach_nothing() -> None:
    assert learn("flow-policy", "pixels", 200, shuffled=True) < 17


def test_two_views_show_what_each_of_them_hides() -> None:
    """`left` and `right` see one half of the scene each; the worst episodes have their target in the other."""
    sides = ("left", "right")
    both, *alone = (
        learn("bc", "pixels", 200, worst=0.25, camera=camera) for camera in (sides, *sides)
    )
    assert both > 19.5
    assert max(alone) < 17


# ---------------------------------------------------------------------------------------- two modes

SIGN = gym.spaces.Box(-1, 1, (1,), np.float32)
PAIR = gym.spaces.Box(-1, 1, (4, 1), np.float32)


def modes(name: str, updates: int = 800, **changes: Any) -> np.ndarray:
    """Return chunks [200, 4] drawn in one state, in which half of the demonstrators go left and half go right."""
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    store = Demonstrations(space, SIGN, rows=400, horizon=4, stride=4, log=lambda _: None)
    random = np.random.default_rng(0)
    for number in range(100):
        side = 0.6 if number % 2 else -0.6
        store.add(np.zeros((4, 2)), (side + random.normal(0, 0.03, (4, 1))).clip(-1, 1))
    agent = build(name, space, PAIR, **{"horizon": 4, "denoising_steps": 8, **changes})
    agent.prepare(store)
    for step in range(updates):
        agent.set_progress(step)
        agent.update(store.sample(64))
    return agent.act({"state": torch.zeros(200, 2)}, explore=name == "bc")[0][..., 0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("diffusion-policy", {}),
        ("flow-policy", {}),
        ("flow-policy", {"noise_correlation": 0.5}),
        ("flow-policy", {"draws": 4}),
        ("flow-policy", {"rule": "flow_sde", "noise_level": 0.5, "denoising_steps": 16}),
        ("diffusion-policy", {"noise_level": 1.0, "denoising_steps": 20, "train_steps": 20}),
    ],
)
def test_denoising_keeps_both_ways(name: str, changes: dict[str, Any]) -> None:
    chunks = modes(name, **changes)
    right = chunks.mean(axis=1) > 0
    assert 0.3 < right.mean() < 0.7
    distance = np.abs(np.abs(chunks) - 0.6)
    assert (distance < 0.2).mean() > 0.85, "at the modes, not between them"
    assert (np.sign(chunks) == np.sign(chunks[:, :1])).mean() > 0.97, "a chunk goes one way"


def test_a_gaussian_goes_between_them() -> None:
    chunks = modes("bc")
    assert (np.abs(np.abs(chunks) - 0.6) < 0.2).mean() < 0.5
    assert (np.sign(chunks) == np.sign(chunks[:, :1])).mean() < 0.75, "every action by itself"


def test_noise_correlated_more_than_the_data_alone_does_not_make_two_modes() -> None:
    """Without a trained network chunks are noise: what keeps the modes is what was learned."""
    chunks = modes("flow-policy", updates=0, noise_correlation=0.5)
    assert (np.abs(np.abs(chunks) - 0.6) < 0.2).mean() < 0.6
