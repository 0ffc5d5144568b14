"""Demonstrations take their share of every batch, as a plain loop over their episodes would give them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.errors import UserError
from agents.core.mixing import FOREIGN, Mixture, add_episode
from agents.core.replay import Replay

SPACE = gym.spaces.Dict(
    {
        "pixels": gym.spaces.Box(0, 255, (6, 4, 4), np.uint8),
        "base_action": gym.spaces.Box(-1, 1, (1,), np.float32),
    }
)
ACTION = gym.spaces.Box(-1, 1, (1,), np.float32)


def make(rows: int, seed: int = 0, num_envs: int = 1) -> Replay:
    return Replay(
        SPACE, ACTION, capacity=rows, num_envs=num_envs, frame_stack=2, seed=seed,
        log=lambda _: None,
    )  # fmt: skip


def episode(length: int, first: int, *, terminated: bool = False) -> tuple[Any, ...]:
    """Return an episode whose observations, actions and rewards count up from `first`, in hundredths."""
    count = np.arange(first, first + length + 1)
    seen = {
        "pixels": np.broadcast_to(
            count[:, None, None, None], (length + 1, 3, 4, 4)
        ).astype(np.uint8),
        "base_action": (count[:, None] / 100).astype(np.float32),
    }  # fmt: skip
    steps = count[:-1].astype(np.float32)
    return seen, steps[:, None] / 100, steps, terminated


EPISODES = [episode(5, 0), episode(3, 50, terminated=True), episode(1, 80), episode(4, 90)]


def demonstrations(seed: int = 0) -> Replay:
    replay = make(sum(len(e[1]) + 2 for e in EPISODES), seed)
    for each in EPISODES:
        add_episode(replay, *each)
    return replay


def online() -> Replay:
    """Return a replay whose actions are all -1."""
    replay = make(40, num_envs=2)
    seen = {"pixels": np.zeros((2, 6, 4, 4), np.uint8), "base_action": np.zeros((2, 1))}
    never = np.zeros(2, bool)
    replay.start(seen)
    for _ in range(10):
        replay.add(-np.ones((2, 1)), np.zeros(2), never, never, seen)
    return replay


def test_demonstrated_transitions_are_those_of_a_plain_loop() -> None:
    """At the end of every window, the observation there with the base's action in it, too."""
    replay, discount = demonstrations(), 0.9
    assert len(replay) == 13
    drawn: dict[float, int] = {}
    batch = replay.sample(400, n_step=3, discount=discount)
    for i in range(400):
        now = round(100 * batch.action[i].item())
        drawn[now] = drawn.get(now, 0) + 1
        seen, _, rewards, terminated = next(e for e in EPISODES if now in e[2])
        t = rewards.tolist().index(now)
        window = rewards[t : t + 3]
        end = t + len(window)
        assert batch.reward[i] == pytest.approx(
            sum(discount**j * r for j, r in enumerate(window)), rel=1e-5
        )
        over = terminated and end == len(rewards)
        assert batch.discount[i] == pytest.approx(0.0 if over else discount ** len(window))
        for part, at in ((batch.observation, t), (batch.next_observation, end)):
            stack = np.concatenate([seen["pixels"][max(at - 1, 0)], seen["pixels"][at]])
            np.testing.assert_array_equal(part["pixels"][i], stack)
            np.testing.assert_array_equal(part["base_action"][i], seen["base_action"][at])
    assert len(drawn) == 13


@pytest.mark.parametrize(("share", "shown"), [(0.0, 0), (0.3, 3), (0.5, 5), (0.99, 10), (1.0, 10)])
def test_their_share_of_every_batch_is_exact(share: float, shown: int) -> None:
    mixture = Mixture(demonstrations(), share, "")
    for _ in range(5):
        batch = mixture.sample(online(), 10, n_step=2, discount=0.9)
        is_shown = (batch.action[:, 0] >= 0).tolist()
        assert is_shown == [False] * (10 - shown) + [True] * shown
        assert (batch.ids == FOREIGN).tolist() == is_shown
        assert batch.observation["pixels"].shape == (10, 6, 4, 4)


def test_demonstrations_are_not_written_to_by_the_ids_of_a_batch() -> None:
    replay, mixture = online(), Mixture(demonstrations(), 0.5, "")
    ids = mixture.sample(replay, 10, n_step=1, discount=0.9).ids
    alive = replay.alive(ids)
    assert alive.tolist() == [True] * 5 + [False] * 5


def test_it_goes_on_drawing_from_its_state_and_only_with_the_same_demonstrations() -> None:
    first, second = Mixture(demonstrations(), 1.0, "a"), Mixture(demonstrations(5), 1.0, "a")
    first.sample(online(), 8, n_step=1, discount=0.9)
    second.set_state(first.get_state())
    batches = [m.sample(online(), 50, n_step=1, discount=0.9).action for m in (first, second)]
    assert torch.equal(*batches)
    with pytest.raises(UserError, match="not those that the run began with"):
        Mixture(demonstrations(), 1.0, "b").set_state(first.get_state())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="demonstration_share"):
        Mixture(demonstrations(), share, "")
