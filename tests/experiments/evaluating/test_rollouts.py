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


class Losing:
    """Two environments with episodes of four steps; the first one's worker dies in its third step.

    Success comes in the second step and does not last. A picture, and an observation, is the number of the step in
    all, so that it tells which episode it is of.
    """

    num_envs = 2

    def __init__(self) -> None:
        self.step_of, self.steps = np.zeros(2, int), 0

    def reset(self, *, seed):
        return np.zeros((2, 1), np.float32), {}

    def render(self, index):
        return np.full((8, 8, 3), self.steps, np.uint8)

    def call(self, name):
        return [np.arange(8)[:, None].repeat(8, 1) < 4] * 2

    def step(self, action):
        self.steps += 1
        self.step_of += 1
        dropped = np.array([self.steps == 3, False])
        self.step_of[dropped] = 0
        ended = self.step_of == 4
        success = ((self.step_of == 2) & [self.steps < 4, True]).astype(float)
        info = {"dropped": dropped, "success": success}
        if ended.any():
            episode = {"r": np.full(2, 4.0), "l": np.full(2, 4)}
            info |= {"episode": episode, "_episode": ended, "final_info": {"success": success}}
        self.step_of[ended] = 0
        nothing = np.zeros(2)
        return np.full((2, 1), self.steps, np.float32), nothing, ended, ended, info


def test_nothing_of_an_episode_that_was_lost_with_its_worker_is_counted() -> None:
    """Neither its success, nor where the agent looked in it, nor its frames."""

    def look(observation, action):
        """Look off the body in the first three steps, and on it later."""
        heat = np.zeros((2, 8, 8), np.float32)
        heat[:, 0 if observation[0, 0] >= 3 else 7] = 1.0
        return heat

    seen = run_episodes(act, Losing(), 2, seed=0, record=True, look=look)  # type: ignore[arg-type]
    assert [int(frame[0, 0, 0]) for frame in seen.frames] == [3, 4, 5, 6]
    assert [float(batch[0, 0]) for batch in seen.observations] == [3.0]
    assert seen.success == [1.0, 0.0], (
        "the second environment ends first; the first lost its success"
    )
    assert seen.looks["energy"] == [0.0, 1.0]
    assert seen.lengths == [4, 4]
