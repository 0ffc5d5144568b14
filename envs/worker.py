"""The environments of one process, and the loop by which a worker process serves them.

Observations never travel: they are written into arrays that the processes share. Everything else
(rewards, ends, infos, states) goes through a pipe. This module imports NumPy and Gymnasium only, so
a worker holds what its environments need and no more (PyTorch alone would add 200 MB each).
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from wrappers.errors import UserError

Factory = Callable[[], gym.Env]


class Description(NamedTuple):
    """What all environments of a group have in common."""

    observation_space: gym.Space
    action_space: gym.Space
    metadata: dict[str, Any]
    render_mode: str | None


class Step(NamedTuple):
    """What came of an action; the observation (after the autoreset) is in the shared arrays."""

    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    final: tuple[Any, dict[str, Any]] | None
    """The episode's true last observation and info, when it ended."""


class Group:
    """Some of a vector environment's environments, stepped one after the other."""

    def __init__(self, factories: Sequence[Factory]) -> None:
        self.envs = [factory() for factory in factories]
        self.observations: Any = None

    def describe(self) -> Description:
        """Return spaces and metadata; they must be the same for all."""
        first = self.envs[0]
        for env in self.envs[1:]:
            for name in ("observation_space", "action_space"):
                if getattr(env, name) != getattr(first, name):
                    raise UserError(
                        f"environments of one vector environment must be alike; {name} is "
                        f"{getattr(first, name)} and {getattr(env, name)}"
                    )
        return Description(
            first.observation_space, first.action_space, dict(first.metadata), first.render_mode
        )

    def attach(self, memory: Any, first: int, num_envs: int) -> None:
        """Write observations into rows `first`, ... of arrays of `num_envs` rows in `memory`."""
        arrays = observation_arrays(self.envs[0].observation_space, num_envs, memory)
        self.observations = rows_of(arrays, slice(first, first + len(self.envs)))

    def reset(
        self, seeds: Sequence[int | None], options: dict[str, Any] | None
    ) -> list[dict[str, Any]]:
        """Begin an episode in every environment and return the infos."""
        return [
            self._reset(i, seed=seed, options=options)
            for i, seed in zip(range(len(self.envs)), seeds, strict=True)
        ]

    def step(self, actions: Sequence[Any]) -> list[Step]:
        """Take one step in every environment, and a reset where an episode ended or must begin.

        Args:
            actions: one for each environment; None begins a new episode.
        """
        return [self._step(i, action) for i, action in enumerate(actions)]

    def call(self, index: int | None, name: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Return attribute `name` of one or all environments, called if it can be."""
        envs = self.envs if index is None else [self.envs[index]]
        values = []
        for env, given in zip(envs, arguments, strict=True):
            value = env.get_wrapper_attr(name)
            values.append(value(*given) if callable(value) else value)
        return values

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()

    def _reset(self, index: int, **arguments: Any) -> dict[str, Any]:
        observation, info = self.envs[index].reset(**arguments)
        store(self.observations, index, observation)
        return info

    def _step(self, index: int, action: Any) -> Step:
        if action is None:
            return Step(0.0, False, False, self._reset(index), None)
        observation, reward, terminated, truncated, info = self.envs[index].step(action)
        final = None
        if terminated or truncated:
            final = observation, info
            info = self._reset(index)
        else:
            store(self.observations, index, observation)
        return Step(float(reward), bool(terminated), bool(truncated), info, final)


# -------------------------------------------------------------------------- shared observations


def observation_bytes(space: gym.Space, num_envs: int) -> int:
    """Return the size of the memory that `observation_arrays` needs."""
    if isinstance(space, gym.spaces.Dict):
        return sum(observation_bytes(part, num_envs) for part in space.values())
    if space.shape is None or space.dtype is None:
        raise UserError(f"observations must be arrays or dicts of arrays, not {space}")
    nbytes = num_envs * int(np.prod(space.shape, dtype=np.int64)) * space.dtype.itemsize
    return -(-nbytes // 64) * 64  # aligned to cache lines


def observation_arrays(space: gym.Space, num_envs: int, memory: Any, offset: int = 0) -> Any:
    """Return arrays [num_envs, ...] in `memory`, in dicts as the space has them."""
    if not isinstance(space, gym.spaces.Dict):
        assert space.shape is not None
        return np.ndarray((num_envs, *space.shape), space.dtype, memory, offset)
    arrays = {}
    for name, part in space.items():
        arrays[name] = observation_arrays(part, num_envs, memory, offset)
        offset += observation_bytes(part, num_envs)
    return arrays


def rows_of(arrays: Any, rows: slice) -> Any:
    """Return views of some rows."""
    if isinstance(arrays, dict):
        return {name: rows_of(part, rows) for name, part in arrays.items()}
    return arrays[rows]


def copied(arrays: Any) -> Any:
    """Return copies, which the next step does not overwrite."""
    if isinstance(arrays, dict):
        return {name: copied(part) for name, part in arrays.items()}
    return arrays.copy()


def store(arrays: Any, index: int, observation: Any) -> None:
    """Write one environment's observation."""
    if isinstance(arrays, dict):
        for name, part in arrays.items():
            store(part, index, observation[name])
    else:
        arrays[index] = observation


# ------------------------------------------------------------------------------ worker process


def serve(connection: Connection, factories: bytes, environment: dict[str, str]) -> None:
    """Serve a group until the parent closes it or dies; the process's main function.

    Args:
        connection: requests `(command, arguments)` come in, `(error or None, result)` goes out.
        factories: pickled, because they must not be imported before `environment` holds.
        environment: all variables; the fork server's are those of its first worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then closes us
    # So is SIGTERM, held back so far; programs that we start (ffmpeg) do not inherit a handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    group: list[Group] = []
    with suppress(EOFError, ConnectionError):
        while True:
            command, arguments = connection.recv()
            if command == "close":
                break
            try:
                answer = _answer(group, connection, command, arguments, factories)
                connection.send((None, answer))  # pickled as a whole before anything is sent
            except ConnectionError:
                break
            except Exception as error:
                connection.send((_portable(error), traceback.format_exc()))
    with suppress(Exception):
        group[0].close()
    # Past every atexit hook and destructor: simulators' GL objects make noise there (mujoco #2510).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _answer(
    group: list[Group],
    connection: Connection,
    command: str,
    arguments: tuple[Any, ...],
    factories: bytes,
) -> Any:
    if command == "build":
        group.append(Group(pickle.loads(factories)))
        return group[0].describe()
    if command == "attach":
        nbytes, first, num_envs = arguments
        handle = recv_handle(connection)
        memory = mmap.mmap(handle, nbytes)
        os.close(handle)
        return group[0].attach(memory, first, num_envs)
    return getattr(group[0], command)(*arguments)


def _portable(error: Exception) -> Exception:
    """Return the error, or one that says the same where it cannot be pickled and restored."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
