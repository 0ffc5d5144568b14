"""Many environments as one, in this process or in workers that are replaced when they fail.

Differences from Gymnasium's `AsyncVectorEnv`, which deadlocks when something renders in a forked
worker's constructor and cannot replace a worker:

- workers come from a fork server that has imported neither PyTorch nor the user's script;
- every wait has a timeout: a worker that dies or hangs, at start or later, is reported, counted and
  replaced; the transitions of its environments are marked in `infos["dropped"]`;
- `reset(seed)` gives environment i a child of the seed of its own, so that results do not depend on
  the number of workers and neighbouring seeds share nothing;
- `get_state` and `set_state` are exact in mid-episode.

The autoreset happens in the same step: `infos["final_obs"]` and `infos["final_info"]` hold what an
episode ended with, `infos["episode"]` its return `r` and length `l`.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, iterate

from envs.processes import FailureError, Local, Memory, Worker, WorkerError
from envs.worker import (
    Description,
    Factory,
    Step,
    copied,
    observation_arrays,
    observation_bytes,
)
from wrappers.errors import UserError

__all__ = ["VectorEnv", "WorkerError"]

ATTEMPTS = 3
"""Failures of one worker, without a step in between, that are an error."""


class VectorEnv(gym.vector.VectorEnv):
    """N environments behind Gymnasium's vector interface, with same-step autoreset.

    Args:
        factories: make one environment each; with workers they are pickled
            (`functools.partial(envs.make, id, ...)` can be).
        workers: processes that share the environments evenly; 0 keeps all in this process.
        timeout: seconds after which a worker that does not answer is replaced.
        seed: of the episodes that replaced workers begin until `reset(seed=)` gives another; None
            draws one.

    Attributes:
        worker_failures: how many workers died or hung so far.
    """

    def __init__(
        self,
        factories: Sequence[Factory],
        *,
        workers: int = 0,
        timeout: float = 60.0,
        seed: int | None = None,
    ) -> None:
        self._members: list[Local | Worker] = []
        if not factories or workers < 0 or timeout <= 0:
            raise UserError(
                f"a vector environment of {len(factories)} environments, {workers} workers and a "
                f"timeout of {timeout} s: expected at least 1, at least 0, and more than 0"
            )
        self.num_envs = len(factories)
        self.worker_failures = 0
        self._timeout = timeout
        workers = min(workers, self.num_envs)
        build = functools.partial(Worker, workers=workers, timeout=timeout) if workers else Local
        parts = np.array_split(np.arange(self.num_envs), workers or 1)
        self._members = [
            build([factories[i] for i in envs], i, envs) for i, envs in enumerate(parts)
        ]
        self._memory = Memory()
        self._stepping = False
        try:
            self._describe(self._start())
        except BaseException:
            self.close_extras()
            raise
        self._seeds = np.random.SeedSequence(seed)
        self._replacements = np.zeros(self.num_envs, np.int64)
        # Environments whose worker was replaced since the last step: that step begins an episode.
        self._fresh = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)

    def _describe(self, descriptions: list[Description]) -> None:
        first = descriptions[0]
        for other in descriptions[1:]:
            if other[:2] != first[:2]:
                raise UserError(
                    "environments of one vector environment must be alike; their spaces are "
                    f"{first[:2]} and {other[:2]}"
                )
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, self.num_envs)
        self.action_space = batch_space(first.action_space, self.num_envs)
        self.metadata = first.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = first.render_mode
        self._memory.allocate(observation_bytes(first.observation_space, self.num_envs))
        self._observations = observation_arrays(
            first.observation_space, self.num_envs, self._memory.map
        )
        for member in self._members:
            member.attach(self._memory, self.num_envs)
        self._receive("attach", self._members)

    # ------------------------------------------------------------------------ Gymnasium's part

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every environment.

        Args:
            seed: a number, of which every environment gets a child of its own; or one for each
                environment, taken as it is; None goes on with the environments' own generators.
            options: handed to every environment.

        Returns:
            The observations [N, ...] and the infos.
        """
        if isinstance(seed, int | np.integer):
            self._seeds = np.random.SeedSequence(int(seed))
            self._replacements[:] = 0
            seeds: list[int | None] = [self._seed_of(i) for i in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else list(seed)
            if len(seeds) != self.num_envs:
                raise UserError(f"{len(seeds)} seeds for {self.num_envs} environments")
        infos: dict[str, Any] = {}
        for i, info in enumerate(self._ask("reset", seeds, options)):
            infos = self._add_info(infos, info, i)
        self._fresh[:] = False
        self._returns[:] = 0
        self._lengths[:] = 0
        return copied(self._observations), infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in every environment; see `step_wait`."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: Any) -> None:
        """Send the actions and return while workers compute; `step_wait` must follow."""
        taken = [
            None if fresh else action
            for fresh, action in zip(self._fresh, iterate(self.action_space, actions), strict=True)
        ]
        self._check_stepping(False)
        for member in self._members:
            member.send("step", [taken[i] for i in member.envs])
        self._stepping = True

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations, rewards, terminations, truncations and infos of the step.

        `infos["dropped"]` (bool [N]) is True where a worker was replaced: the observation begins an
        episode, and the transition to it must be thrown away.
        """
        self._check_stepping(True)
        dropped = self._fresh.copy()
        steps: list[Step] = []
        for member, reply in zip(self._members, self._receive("step", self._members), strict=True):
            if isinstance(reply, FailureError):
                dropped[member.envs] = True
                fresh_infos = self._replace(member, reply)
                reply = [Step(0.0, False, False, info, None) for info in fresh_infos]
            else:
                member.failures = 0
            steps += reply
        self._fresh[:] = False

        rewards = np.array([step.reward for step in steps])
        terminated = np.array([step.terminated for step in steps])
        truncated = np.array([step.truncated for step in steps])
        infos: dict[str, Any] = {"dropped": dropped}
        self._returns = np.where(dropped, 0, self._returns + rewards)
        self._lengths = np.where(dropped, 0, self._lengths + 1)
        for i, step in enumerate(steps):
            if step.final is not None:
                observation, info = step.final
                infos = self._add_info(infos, {"final_obs": observation, "final_info": info}, i)
            infos = self._add_info(infos, step.info, i)
        ended = terminated | truncated
        if ended.any():
            episode = {
                "r": np.where(ended, self._returns, 0),
                "l": np.where(ended, self._lengths, 0),
            }
            infos |= {"episode": episode, "_episode": ended}
            self._returns[ended] = 0
            self._lengths[ended] = 0
        return copied(self._observations), rewards, terminated, truncated, infos

    def render(self, index: int | None = None) -> Any:
        """Return the picture of environment `index`, or a tuple of everyone's."""
        if index is None:
            return self.call("render")
        member = next(member for member in self._members if index in member.envs)
        local = index - int(member.envs[0])
        return self._ask_members("call", {member.number: (local, "render", [()])})[0]

    def close_extras(self, **kwargs: Any) -> None:
        """End every worker: politely, and by force after some seconds."""
        for member in self._members:
            member.send("close")
        deadline = time.monotonic() + min(self._timeout, 5.0)
        for member in self._members:
            member.close(deadline)

    # -------------------------------------------------------------------------------- our part

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Return attribute `name` of every environment, called with `arguments` if it can be."""
        return tuple(self._ask_all_calls(name, [arguments] * self.num_envs))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return attribute `name` of every environment."""
        return self.call(name)

    def get_state(self) -> dict[str, Any]:
        """Return everything that decides what comes next, exact in mid-episode."""
        return {
            "envs": list(self.call("get_state")),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "fresh": self._fresh.copy(),
            "replacements": self._replacements.copy(),
            "entropy": self._seeds.entropy,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state` of a vector environment with as many environments."""
        if len(state["envs"]) != self.num_envs:
            raise UserError(
                f"the state is of {len(state['envs'])} environments and here are {self.num_envs}; "
                "resume with the run's own number"
            )
        self._ask_all_calls("set_state", [(tree,) for tree in state["envs"]])
        self._returns = np.array(state["returns"], np.float64)
        self._lengths = np.array(state["lengths"], np.int64)
        self._fresh = np.array(state["fresh"], bool)
        self._replacements = np.array(state["replacements"], np.int64)
        self._seeds = np.random.SeedSequence(state["entropy"])

    def _seed_of(self, env: int) -> int:
        key = (env, int(self._replacements[env]))
        return int(np.random.SeedSequence(self._seeds.entropy, spawn_key=key).generate_state(1)[0])

    # ------------------------------------------------------------------------------ exchanges

    def _ask_all_calls(self, name: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        requests = {
            member.number: (None, name, [arguments[i] for i in member.envs])
            for member in self._members
        }
        return self._ask_members("call", requests)

    def _ask(self, command: str, per_env: Sequence[Any], *common: Any) -> list[Any]:
        requests = {
            member.number: ([per_env[i] for i in member.envs], *common) for member in self._members
        }
        return self._ask_members(command, requests)

    def _ask_members(self, command: str, requests: dict[int, tuple[Any, ...]]) -> list[Any]:
        """Send requests and return the replies in order; those of replacements where need be."""
        self._check_stepping(False)
        replies: dict[int, Any] = {}
        while len(replies) < len(requests):
            asked = [self._members[i] for i in requests if i not in replies]
            for member in asked:
                member.send(command, *requests[member.number])
            for member, reply in zip(asked, self._receive(command, asked), strict=True):
                if isinstance(reply, FailureError):
                    self._replace(member, reply)
                else:
                    replies[member.number] = reply
        return [value for i in requests for value in replies[i]]

    def _check_stepping(self, expected: bool) -> None:
        if self._stepping != expected:
            now, missing = ("is", "step_wait") if self._stepping else ("is not", "step_async")
            raise RuntimeError(f"the vector environment {now} taking a step: call {missing} first")

    def _receive(self, command: str, members: Sequence[Local | Worker]) -> list[Any]:
        """Return every member's reply or failure; raise what an environment raised, at the end.

        Before it raises, it ends the members that failed: a late reply would be taken for that to
        the next request, which finds them gone and replaces them.
        """
        deadline = time.monotonic() + self._timeout
        replies: list[Any] = []
        errors: list[Exception] = []
        failed: list[Local | Worker] = []
        for member in members:
            try:
                replies.append(member.receive(deadline))
            except FailureError as failure:
                replies.append(failure)
                failed.append(member)
            except Exception as error:
                errors.append(error)
        self._stepping = False  # no reply is left over
        if errors:
            for member in failed:
                member.kill()
            raise errors[0]
        return replies

    def _start(self) -> list[Description]:
        """Start all workers at once and wait; those that fail are started again."""
        for member in self._members:
            member.start()
        descriptions = self._receive("build", self._members)
        for member, reply in zip(self._members, descriptions, strict=True):
            if isinstance(reply, FailureError):
                descriptions[member.number] = self._restart(member, reply, [("build",)])
        return descriptions

    def _replace(self, member: Local | Worker, failure: FailureError) -> list[dict[str, Any]]:
        """Put a new worker in the place of a failed one; its episodes begin with new seeds."""
        self._replacements[member.envs] += 1
        self._fresh[member.envs] = True
        seeds = [self._seed_of(i) for i in member.envs]
        return self._restart(member, failure, [("build",), ("attach",), ("reset", seeds, None)])

    def _restart(
        self, member: Local | Worker, failure: FailureError, requests: list[tuple[Any, ...]]
    ) -> Any:
        """Start a worker anew and return the last request's reply."""
        while True:
            self.worker_failures += 1
            member.failures += 1
            if member.failures == ATTEMPTS:
                raise WorkerError(f"{member.name} failed {ATTEMPTS} times in a row; it {failure}")
            warnings.warn(f"{member.name} {failure}; it is replaced", stacklevel=4)
            member.kill()
            member.start()
            for command, *arguments in requests:
                if command == "attach":
                    member.attach(self._memory, self.num_envs)
                elif command != "build":  # which `start` asks for
                    member.send(command, *arguments)
                (reply,) = self._receive(command, [member])
                if isinstance(reply, FailureError):
                    failure = reply
                    break
            else:
                return reply
