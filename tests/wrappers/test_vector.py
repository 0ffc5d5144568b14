"""Views of a vector environment: the base's actions in every observation, and success as the reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import envs
from wrappers.errors import UserError
from wrappers.vector import BaseActions, SuccessReward

SPACE = gym.spaces.Box(-1, 1, (4,), np.float32)
WITH = gym.spaces.Dict({"state": SPACE, "base": gym.spaces.Box(-1, 1, (2,), np.float32)})


class Clock:
    """Says the step of its episode, and which environment it is, in hundredths; remembers what it was asked."""

    def __init__(self, count: int) -> None:
        self.steps = np.zeros(count)
        self.log: list[Any] = []

    def restart(self, seed: int | None = None) -> None:
        self.log.append(("restart", seed))

    def begin(self, begins: np.ndarray) -> None:
        self.steps[begins] = 0
        self.log.append(("begin", begins.tolist()))

    def act(self, observation: Any) -> np.ndarray:
        self.steps += 1
        return self._told(np.arange(len(self.steps)), self.steps)

    def last(self, observation: Any, rows: np.ndarray) -> np.ndarray:
        self.log.append(("last", observation["state"].copy()))
        return self._told(rows, self.steps[rows] + 1)

    def _told(self, rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return (np.stack([rows, steps], 1) / 100).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        return {"steps": self.steps.copy()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"].copy()


def made(lengths: int = 4, **task: Any) -> tuple[BaseActions, Clock]:
    vector = envs.make_vec(
        "toy/reach", 2, observation="state", episode_length=lengths, seed=1, **task
    )
    clock = Clock(2)
    return BaseActions(vector, clock, WITH, name="base", lone="state"), clock


def steps_of(observation: Any) -> list[float]:
    return np.round(100 * observation["base"][:, 1]).tolist()


def test_every_observation_has_the_action_that_belongs_to_it() -> None:
    view, clock = made()
    assert view.single_observation_space == WITH
    assert view.observation_space["base"].shape == (2, 2)
    seen, _ = view.reset(seed=3)
    assert clock.log[:2] == [("restart", 3), ("begin", [True, True])]
    assert steps_of(seen) == [1, 1]
    for t in range(2, 12):
        seen, _, _, truncated, info = view.step(np.zeros((2, 2), np.float32))
        if (t - 1) % 4:
            assert steps_of(seen) == [1 + (t - 1) % 4] * 2
            assert "final_obs" not in info
            continue
        assert truncated.all()
        assert steps_of(seen) == [1, 1], "the episodes that begin"
        for row in range(2):
            final = info["final_obs"][row]
            np.testing.assert_allclose(final["base"], [row / 100, 0.05], atol=1e-6)
            np.testing.assert_array_equal(final["state"], clock.log[-2][1][row])
            assert not np.array_equal(final["state"], seen["state"][row])
    view.close()


def test_it_is_exact_in_mid_episode() -> None:
    view, _ = made()
    view.reset(seed=3)
    view.step(np.zeros((2, 2), np.float32))
    state = view.get_state()
    ahead = [view.step(np.ones((2, 2), np.float32))[0] for _ in range(5)]
    other, _ = made()
    other.reset(seed=9)
    other.set_state(state)
    for expected in ahead:
        seen = other.step(np.ones((2, 2), np.float32))[0]
        np.testing.assert_array_equal(seen["state"], expected["state"])
        np.testing.assert_array_equal(seen["base"], expected["base"])


def test_what_was_dropped_begins_anew_without_a_last_action() -> None:
    class Lost:
        num_envs = 2

        def step_wait(self) -> tuple[Any, ...]:
            never = np.zeros(2, bool)
            return np.zeros((2, 4)), np.zeros(2), never, never, {"dropped": np.array([False, True])}

    clock = Clock(2)
    clock.steps[:] = 5
    seen, *_ = BaseActions(Lost(), clock, WITH, name="base", lone="state").step_wait()
    assert clock.log == [("begin", [False, True])]
    assert steps_of(seen) == [6, 1]


def test_success_is_the_reward_of_the_step_in_which_it_is_told_also_at_an_episodes_end() -> None:
    plain = envs.make_vec("toy/reach", 3, observation="state", episode_length=5, seed=1)
    paid = SuccessReward(
        envs.make_vec("toy/reach", 3, observation="state", episode_length=5, seed=1)
    )
    seen, _ = plain.reset(seed=2)
    paid.reset(seed=2)
    total, ends = 0.0, 0.0
    for _ in range(10):
        action = seen[:, 2:]
        seen, _, _, truncated, info = plain.step(action)
        _, reward, _, _, others = paid.step(action)
        told = info["final_info"]["success"] if truncated.all() else info["success"]
        np.testing.assert_array_equal(reward, told)
        if truncated.all():
            ends += reward.sum()
            np.testing.assert_array_equal(others["episode"]["r"], info["episode"]["r"])
        total += reward.sum()
    assert total > ends > 0, "both kinds of steps were paid"


def test_a_task_that_does_not_tell_by_an_episodes_end_is_refused() -> None:
    view = SuccessReward(envs.make_vec("toy/balance", 1, observation="state", episode_length=2))
    view.reset(seed=0)
    view.step(np.zeros((1, 1), np.float32))
    with pytest.raises(UserError, match="does not tell whether it is solved"):
        view.step(np.zeros((1, 1), np.float32))


def test_a_task_that_tells_at_an_episodes_end_alone_is_paid_there() -> None:
    class TellsLast:
        num_envs = 2
        steps = iter([[False, False], [True, False], [False, True]])

        def step_wait(self) -> tuple[Any, ...]:
            ended = np.array(next(self.steps))
            infos = {"final_info": {"success": np.where(ended, 1.0, 0.0)}} if ended.any() else {}
            return np.zeros((2, 4)), np.full(2, 7.0), np.zeros(2, bool), ended, infos

    view = SuccessReward(TellsLast())
    assert [view.step_wait()[1].tolist() for _ in range(3)] == [[0, 0], [1, 0], [0, 1]]
