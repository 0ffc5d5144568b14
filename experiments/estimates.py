"""What a run will take, from random data: memory of a batch, time of an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from agents.core.agent import OnPolicyAgent, as_observation
from agents.core.errors import UserError
from agents.core.fields import free_bytes
from agents.core.replay import Batch
from agents.core.rollout import Rollout


def check_batch(batch_size: int, space: Any, device: str) -> None:
    """Refuse a batch whose observations alone, as floating point numbers, would not fit the memory.

    Raises:
        UserError: names the size that was asked for.
    """
    boxes = space.spaces.values() if hasattr(space, "spaces") else (space,)
    nbytes = 2 * batch_size * sum(4 * int(np.prod(box.shape)) for box in boxes)  # and the next ones
    free = free_bytes("device" if device != "cpu" else "ram", torch.device(device), None)
    if nbytes > free:
        raise UserError(
            f"a batch of {batch_size:,} needs {nbytes / 1e9:.1f} GB for its observations alone, "
            f"{free / 1e9:.1f} GB are free; lower --batch-size"
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


def random_rollout(vector: Any, agent: OnPolicyAgent, frame_stack: int, device: str) -> Rollout:
    """Return a full rollout of samples of a vector environment's spaces, in one endless episode."""
    space, action_space, count = (
        vector.single_observation_space, vector.single_action_space, vector.num_envs
    )  # fmt: skip
    rollout = Rollout(
        space, action_space, length=agent.rollout_length, num_envs=count, frame_stack=frame_stack,
        extras=agent.extras, device=device, log=lambda _: None,
    )  # fmt: skip
    batch = random_batch(vector, count, "cpu")
    seen = {name: value.numpy() for name, value in batch.observation.items()}
    observation: Any = seen if hasattr(space, "spaces") else next(iter(seen.values()))
    if "pixels" in seen:  # an episode begins with one frame repeated
        seen["pixels"][:] = np.tile(seen["pixels"][:, -3:], (1, frame_stack, 1, 1))
    rollout.start(observation)
    never, zeros = np.zeros(count, bool), np.zeros(count, np.float32)
    extras = {name: np.zeros((count, *f.shape), np.float32) for name, f in agent.extras.items()}
    while not rollout.is_full:
        rollout.add(batch.action.numpy(), zeros, never, never, observation, extras=extras)
    return rollout


def seconds_per_call(call: Callable[[], Any], *, calls: int, warmup: int) -> float:
    """Return the mean time of a call, some first ones left out."""
    for _ in range(warmup):
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls
