"""What a run will take, from random data: memory of a batch, time of an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from agents.core.agent import Agent, OnPolicyAgent, as_observation
from agents.core.errors import UserError
from agents.core.fields import free_bytes, step_fields
from agents.core.replay import Batch
from agents.core.rollout import TEACHER_ACTION, Rollout


def check_batch(batch_size: int, space: Any, device: str, flag: str = "--batch-size") -> None:
    """Refuse a batch whose observations alone, as floating point numbers, would not fit the memory.

    Args:
        batch_size: samples.
        space: of their observations.
        device: where they are needed.
        flag: what makes it smaller.

    Raises:
        UserError: names the size that was asked for.
    """
    boxes = space.spaces.values() if hasattr(space, "spaces") else (space,)
    nbytes = 2 * batch_size * sum(4 * int(np.prod(box.shape)) for box in boxes)  # and the next ones
    free = free_bytes("device" if device != "cpu" else "ram", torch.device(device), None)
    if nbytes > free:
        raise UserError(
            f"a batch of {batch_size:,} needs {nbytes / 1e9:.1f} GB for its observations alone, "
            f"{free / 1e9:.1f} GB are free; lower {flag}"
        )


def random_batch(vector: Any, batch_size: int, device: str) -> Batch:
    """Return transitions of samples of a vector environment's spaces."""
    space, action = vector.single_observation_space, vector.single_action_space
    samples = [space.sample() for _ in range(batch_size)]
    if isinstance(samples[0], Mapping):
        stacked: Any = {key: np.stack([s[key] for s in samples]) for key in samples[0]}
    else:
        stacked = np.stack(samples)
    observation = {
        key: torch.nan_to_num(value.clamp(-10, 10)) if value.is_floating_point() else value
        for key, value in as_observation(stacked, torch.device(device)).items()
    }
    ones = torch.ones(batch_size, device=device)
    actions = torch.as_tensor(np.stack([action.sample() for _ in range(batch_size)]), device=device)
    ids = torch.zeros(batch_size, dtype=torch.int64)
    return Batch(observation, actions, ones, 0.99 * ones, observation, ids, {})


def random_rollout(
    vector: Any, agent: OnPolicyAgent, frame_stack: int, device: str, *, is_taught: bool = False
) -> Rollout:
    """Return a full rollout of samples of a vector environment's spaces, in one endless episode.

    Args:
        vector: the environments.
        agent: who learns from it.
        frame_stack: frames in a stack.
        device: where it is needed.
        is_taught: it holds a teacher's actions, too.
    """
    space, action_space, count = (
        vector.single_observation_space, vector.single_action_space, vector.num_envs
    )  # fmt: skip
    fields = dict(agent.extras)
    if is_taught:
        fields[TEACHER_ACTION] = step_fields(action_space)["action"]
    rollout = Rollout(
        space, action_space, length=agent.rollout_length, num_envs=count, frame_stack=frame_stack,
        extras=fields, device=device, log=lambda _: None,
    )  # fmt: skip
    batch = random_batch(vector, count, "cpu")
    seen = {name: value.numpy() for name, value in batch.observation.items()}
    observation: Any = seen if hasattr(space, "spaces") else next(iter(seen.values()))
    if "pixels" in seen:  # an episode begins with one frame repeated
        seen["pixels"][:] = np.tile(seen["pixels"][:, -3:], (1, frame_stack, 1, 1))
    rollout.start(observation)
    never, zeros = np.zeros(count, bool), np.zeros(count, np.float32)
    extras: dict[str, Any] = {
        name: torch.zeros((count, *field.shape), dtype=field.dtype)
        for name, field in fields.items()
    }
    # What was drawn as it says: from other log-probabilities several passes might lead anywhere.
    shown = as_observation(observation, torch.device(device))
    action, _, told = agent.act(shown, explore=True)
    extras |= {name: value.cpu() for name, value in told.items()}
    while not rollout.is_full:
        rollout.add(action, zeros, never, never, observation, extras=extras)
    return rollout


ENOUGH = 0.5
"""Seconds of an update that is worth measuring; on longer ones, fixed costs weigh as in training."""


class Learning(NamedTuple):
    """What learning takes."""

    seconds: float
    """Of a gradient update."""
    per_step: float
    """Gradient updates for each agent step."""


def measured_learning(
    make: Callable[[int], tuple[OnPolicyAgent, Rollout]], *, shortest: int, longest: int
) -> Learning:
    """Return what learning from rollouts takes, all passes and whatever else an update does included.

    An update of the whole rollout may take minutes, and one of a minibatch is no small copy of it where steps are many
    and small, or where something is done once (TRPO's policy step): the rollout grows until there is enough to measure.

    Args:
        make: from a rollout's length to a new agent and a full rollout for it.
        shortest: length to begin with.
        longest: the run's own.
    """
    learner, rollout = make(shortest)
    learner.update(rollout.experience())  # what is done once is left out
    length = shortest
    while True:
        learner, rollout = make(length)
        start = time.perf_counter()
        learner.update(rollout.experience())
        _synchronize()
        seconds = time.perf_counter() - start
        if seconds >= ENOUGH or length >= longest:
            updates = max(1, learner.gradient_updates)
            return Learning(seconds / updates, updates / (length * rollout.num_envs))
        length = min(2 * length, longest)


def seconds_to_act(agent: Agent, vector: Any, count: int, device: str, *, explore: bool) -> float:
    """Return the time in which an agent, whose random stream goes on, chooses one of `count` actions at once."""
    observation = random_batch(vector, count, device).observation
    call = seconds_per_call(lambda: agent.act(observation, explore=explore), calls=4, warmup=1)
    return call / count


def seconds_per_call(call: Callable[[], Any], *, calls: int, warmup: int) -> float:
    """Return the mean time of a call, some first ones left out."""
    for _ in range(warmup):
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize()
    return (time.perf_counter() - start) / calls


def _synchronize() -> None:
    """Wait for what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
