"""Episodes are counted fairly, and a success at any moment counts."""

import gymnasium as gym
import numpy as np

from envs.vector import VectorEnv
from experiments.evaluating.rollouts import run_episodes


class Blink(gym.Env):
    """Succeeds in the second of five steps and lets go again; `luck` says whether at all."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length: int, lucky: bool) -> None:
        self.length, self.lucky = length, lucky

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        success = float(self.lucky and self.steps == 2)
        ended = self.steps == self.length
        return np.zeros(1, np.float32), 1.0, False, ended, {"success": success}


def act(observation):
    return np.zeros((len(observation), 1), np.float32)


def test_a_success_that_does_not_last_counts_and_stays_with_its_episode() -> None:
    envs = VectorEnv([lambda: Blink(5, True), lambda: Blink(5, False)])
    episodes = run_episodes(act, envs, 4, seed=0)
    assert episodes.success == [1.0, 0.0, 1.0, 0.0]


def test_environments_with_short_episodes_are_not_favored() -> None:
    envs = VectorEnv([lambda: Blink(2, True), lambda: Blink(10, True)])
    episodes = run_episodes(act, envs, 5, seed=0)
    assert sorted(episodes.returns) == [2.0, 2.0, 2.0, 10.0, 10.0]
    assert sorted(episodes.lengths) == [2, 2, 2, 10, 10]
