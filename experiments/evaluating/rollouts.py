"""Episodes of a policy in a vector environment, counted so that short ones are not favored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.core.errors import DivergedError
from agents.core.saliency import score_saliency
from agents.core.seeding import spawn_seeds
from envs.vector import VectorEnv

ActFunction = Callable[[Any], np.ndarray]
"""From a batch of observations to a batch of actions."""

LookFunction = Callable[[Any, np.ndarray], np.ndarray | None]
"""From a batch of observations and actions to where the agent looks, float [B, H, W]; see `Policy.saliency`."""

BeginFunction = Callable[[np.ndarray], None]
"""Told bool [N]: whose next observation is the first of an episode; see `Policy.begin`."""

LOOK_EVERY = 10
"""Agent steps between two looks that are scored: neighbors are nearly the same picture."""

SCORES = ("iou", "energy", "pointing", "area")
"""Fields of `SaliencyScores`."""


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
    looks: dict[str, list[float | None]] = field(default_factory=dict)
    """Means over an episode's looks of the fields of `SaliencyScores`, one per episode; None without foreground."""
    frames: list[np.ndarray] = field(default_factory=list)
    observations: list[Any] = field(default_factory=list)


def run_episodes(
    act: ActFunction,
    envs: VectorEnv,
    episodes: int,
    *,
    seed: int,
    record: bool = False,
    look: LookFunction | None = None,
    begin: BeginFunction = lambda begins: None,
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
        look: where the agent looks, to be scored against the foreground at every tenth step of an episode.
        begin: where episodes begin, for policies with a memory.
        progress: called with the number of episodes that ended.

    Raises:
        DivergedError: a reward or an observation is not finite.
    """
    n = envs.num_envs
    quota = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
    result, recording = Episodes(), record
    observation, _ = envs.reset(seed=seed)
    begin(np.ones(n, bool))
    succeeded = np.zeros(
        n
    )  # a success at any moment of an episode counts, as in Meta-World's evaluation
    looks = _Looks(envs, look)
    step = 0
    while quota.any():
        if recording:
            result.frames.append(np.asarray(envs.render(0)))
            if len(result.frames) % 25 == 1 and len(result.observations) < 8:
                result.observations.append(observation)
        action = act(observation)
        looks.score(observation, action)
        step += 1
        observation, reward, _, _, info = envs.step(action)
        _check_finite({"reward": reward, **_parts(observation)}, step)
        ended = info.get("_episode", np.zeros(n, bool))
        lost = np.broadcast_to(info.get("dropped", False), n)  # with a worker: they begin anew
        begin(ended | lost)
        if recording and lost[0]:
            result.frames.clear()
            result.observations.clear()
        looks.forget(np.flatnonzero(lost))
        if "episode" not in info:
            succeeded = np.where(lost, 0.0, np.maximum(succeeded, info.get("success", 0.0)))
            continue
        final = info["final_info"]
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
            for name, score in looks.means(int(i)).items():
                result.looks.setdefault(name, []).append(score)
            progress(len(result.returns))
        succeeded[ended | lost] = 0.0
        looks.forget(np.flatnonzero(ended))
    return result


def evaluation_scalars(seen: Episodes, distraction: str | None) -> dict[str, float]:
    """Return what a training run logs of an evaluation, by tag."""
    tag = f"eval/{distraction or 'clean'}"
    values = {
        f"{tag}/return_mean": float(np.mean(seen.returns)),
        f"{tag}/return_std": float(np.std(seen.returns)),
    }
    if seen.success:
        values[f"{tag}/success"] = float(np.mean(seen.success))
    return values


class _Looks:
    """Scores of the looks in every environment's current episode."""

    def __init__(self, envs: VectorEnv, look: LookFunction | None) -> None:
        self._envs, self._look = envs, look
        self._scores: list[list[np.ndarray]] = [[] for _ in range(envs.num_envs)]
        self._steps = np.zeros(envs.num_envs, np.int64)  # of each one's episode

    def score(self, observation: Any, action: np.ndarray) -> None:
        """Compare where the agent looks now with where the foreground is, where that is due."""
        due = np.flatnonzero(self._steps % LOOK_EVERY == 0)
        self._steps += 1
        seen = self._look(observation, action) if self._look and len(due) else None
        if seen is None:
            self._look = None if len(due) else self._look
            return
        scores = score_saliency(seen[due], np.stack(self._envs.call("foreground"))[due])
        rows = np.stack([getattr(scores, name) for name in SCORES], axis=1)
        for env, row in zip(due, rows, strict=True):
            self._scores[env].append(row)

    def means(self, env: int) -> dict[str, float | None]:
        """Return an episode's mean scores by name, over the looks that had a foreground."""
        if self._look is None:
            return {}
        scores = np.array(self._scores[env])
        scores = scores[~np.isnan(scores).any(axis=1)]
        values = scores.mean(axis=0).tolist() if len(scores) else [None] * len(SCORES)
        return dict(zip(SCORES, values, strict=True))

    def forget(self, ended: Iterable[int]) -> None:
        """Begin new episodes in some environments."""
        for env in ended:
            self._scores[env] = []
            self._steps[env] = 0


def episode_seeds(seed: int, episodes: int) -> list[int]:
    """Return the seeds that an evaluation's environments begin with.

    Raises:
        UserError: the seed is negative.
    """
    entropy = spawn_seeds(seed)[1]["evaluation"]
    children = (np.random.SeedSequence(entropy, spawn_key=(i, 0)) for i in range(episodes))
    return [int(child.generate_state(1)[0]) for child in children]


def _parts(observation: Any) -> dict[str, np.ndarray]:
    return observation if isinstance(observation, dict) else {"observation": observation}


def _check_finite(values: dict[str, np.ndarray], step: int) -> None:
    """Name the first environment that gave a number of [N, ...] which is not finite."""
    for name, value in values.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            env = int(np.argwhere(~np.isfinite(value))[0, 0])
            bad = value[env][~np.isfinite(value[env])].flat[0]
            raise DivergedError(
                f"'{name}' is {bad} in environment {env} at step {step} of an evaluation",
                "mend the task",
            )


def random_policy(envs: VectorEnv, seed: int) -> ActFunction:
    """Return a policy of uniform actions."""
    envs.action_space.seed(seed)
    return lambda observation: envs.action_space.sample()
