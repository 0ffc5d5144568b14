"""Episodes of a policy in a vector environment, counted so that short ones are not favored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from envs.vector import VectorEnv

ActFunction = Callable[[Any], np.ndarray]
"""From a batch of observations to a batch of actions."""


@dataclass
class Episodes:
    """What `run_episodes` saw.

    Attributes:
        returns: undiscounted, one per episode.
        lengths: in agent steps.
        success: 0 or 1 per episode, empty where the task does not tell.
        frames: uint8 [T, H, W, 3], the first environment's first episode, if recorded.
        observations: a few of that episode's observation batches, for pictures.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    success: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    observations: list[Any] = field(default_factory=list)


def run_episodes(
    act: ActFunction,
    envs: VectorEnv,
    episodes: int,
    *,
    seed: int,
    record: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Episodes:
    """Run `episodes` episodes from a seeded reset.

    Every environment contributes the same number (the first ones one more where it does not divide): taking the
    first to finish would favor episodes that end early. The result depends on `seed` and `envs.num_envs` only.

    Args:
        act: the policy.
        envs: same-step autoreset with episode statistics.
        episodes: how many.
        seed: of the reset.
        record: keep the first environment's first episode as frames.
        progress: called with the number of episodes that ended.
    """
    n = envs.num_envs
    quota = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
    result, recording = Episodes(), record
    observation, _ = envs.reset(seed=seed)
    succeeded = np.zeros(
        n
    )  # a success at any moment of an episode counts, as in Meta-World's evaluation
    step = 0
    while quota.any():
        if recording:
            result.frames.append(np.asarray(envs.render(0)))
            if step % 25 == 0 and len(result.observations) < 8:
                result.observations.append(observation)
        step += 1
        observation, _, _, _, info = envs.step(act(observation))
        if "episode" not in info:
            succeeded = np.maximum(succeeded, info.get("success", 0.0))
            continue
        final = info["final_info"]
        ended = info["_episode"]
        now = np.where(ended, final.get("success", 0.0), info.get("success", 0.0))
        succeeded = np.maximum(succeeded, now)
        for i in np.flatnonzero(ended):
            recording = recording and i != 0
            if quota[i] == 0:
                continue
            quota[i] -= 1
            result.returns.append(float(info["episode"]["r"][i]))
            result.lengths.append(int(info["episode"]["l"][i]))
            if "success" in final:
                result.success.append(float(succeeded[i]))
            progress(len(result.returns))
        succeeded[ended] = 0.0
    return result


def random_policy(envs: VectorEnv, seed: int) -> ActFunction:
    """Return a policy of uniform actions."""
    envs.action_space.seed(seed)
    return lambda observation: envs.action_space.sample()
