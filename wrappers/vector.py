"""Views of a whole vector environment: what a frozen policy would do as a part of what is seen, success as reward.

They stand before any vector environment with same-step autoreset, `step_async` and `step_wait`, and are one themselves:
all that they do not change is that environment's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space

from wrappers.errors import UserError


class VectorView:
    """A vector environment as it is; subclasses change a part of it.

    Args:
        envs: what is behind it.
    """

    def __init__(self, envs: Any) -> None:
        self.envs = envs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.envs, name)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in every environment; see `step_wait`."""
        self.step_async(actions)
        return self.step_wait()

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations, rewards, terminations, truncations and infos of the step."""
        return self.envs.step_wait()


class Acting(Protocol):
    """A policy that is asked in every step, and remembers the episodes that are going on."""

    def restart(self, seed: int | None = None) -> None:
        """Forget everything; `seed` decides about what it draws from here on."""
        ...

    def begin(self, begins: np.ndarray) -> None:
        """Forget the episodes before, where bool [N] says that new ones begin."""
        ...

    def act(self, observation: Any) -> np.ndarray:
        """Return actions for a batch of observations, float32 [N, A]."""
        ...

    def last(self, observation: Any, rows: np.ndarray) -> np.ndarray:
        """Return actions for the last observations of the episodes of environments `rows`."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return everything that decides about the next actions."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `get_state`."""
        ...


class BaseActions(VectorView):
    """Observations are dicts that say what a policy would do in them, under `name`; those of ended episodes too.

    Args:
        envs: a vector environment with continuous actions [A].
        policy: asked once for every observation.
        space: of one observation with the further part.
        name: of that part.
        lone: what the observation of an environment without named parts is called.
    """

    def __init__(
        self, envs: Any, policy: Acting, space: gym.spaces.Dict, *, name: str, lone: str
    ) -> None:
        super().__init__(envs)
        self.policy, self.name, self.lone = policy, name, lone
        self.single_observation_space = space
        self.observation_space = batch_space(space, envs.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode in every environment; a number as seed decides about the policy's stream, too."""
        observation, infos = self.envs.reset(seed=seed, options=options)
        if isinstance(seed, int | np.integer):
            self.policy.restart(int(seed))
        self.policy.begin(np.ones(self.envs.num_envs, bool))
        return self._shown(observation, self.policy.act(observation)), infos

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return what the environments do, with the policy's actions in what is seen."""
        observation, reward, terminated, truncated, infos = self.envs.step_wait()
        ended = terminated | truncated
        dropped = infos.get("dropped", np.zeros_like(ended))
        rows = np.flatnonzero(ended & ~dropped)
        if len(rows):
            lasts = [self._parts(infos["final_obs"][row]) for row in rows]
            batch = {name: np.stack([parts[name] for parts in lasts]) for name in lasts[0]}
            actions = self.policy.last(batch, rows)
            final = infos["final_obs"].copy()
            for row, parts, action in zip(rows, lasts, actions, strict=True):
                final[row] = self._shown(parts, action)
            infos = infos | {"final_obs": final}
        self.policy.begin(ended | dropped)
        shown = self._shown(observation, self.policy.act(observation))
        return shown, reward, terminated, truncated, infos

    def get_state(self) -> dict[str, Any]:
        """Return everything that decides what comes next, exact in mid-episode."""
        return {**self.envs.get_state(), self.name: self.policy.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
        self.envs.set_state(state)
        self.policy.set_state(state[self.name])

    def _parts(self, observation: Any) -> dict[str, Any]:
        return dict(observation) if isinstance(observation, Mapping) else {self.lone: observation}

    def _shown(self, observation: Any, action: np.ndarray) -> dict[str, Any]:
        return self._parts(observation) | {self.name: action}


class SuccessReward(VectorView):
    """The reward of a step is 1 if the task is solved in it, and 0 if not; returns in the infos stay the task's.

    A task that tells of success at the end of its episodes only is paid there.
    """

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return what the environments do, with other rewards.

        Raises:
            UserError: an episode has ended, and the task does not tell.
        """
        observation, reward, terminated, truncated, infos = self.envs.step_wait()
        final = infos.get("final_info", {})
        ended = (terminated | truncated) & ~np.asarray(infos.get("dropped", False))
        if ended.any() and "success" not in final:
            raise UserError(
                "the task does not tell whether it is solved; learn from its own reward, or take another task"
            )
        now, last = infos.get("success", 0.0), final.get("success", 0.0)
        solved = np.where(terminated | truncated, last, now) > 0
        return observation, solved.astype(reward.dtype), terminated, truncated, infos
