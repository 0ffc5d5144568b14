"""A session whose agent acts on top of a frozen policy, and learns from demonstrations, too."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from agents.core.base_policy import BasePolicy, BaseStream
from agents.core.demonstrations import check_steps, checked_actions
from agents.core.errors import UserError
from agents.core.fields import is_image, observation_boxes
from agents.core.mixing import Mixture, add_episode
from agents.core.replay import Replay
from agents.off_policy.residual import BASE_ACTION, ResFiT, ResidualLoop, with_base_action
from agents.policy import BASE, load_base, space_to_json
from experiments.data.datasets import Episode
from experiments.running.estimates import random_batch, seconds_per_call
from experiments.sessions.demonstrations import chosen_episodes
from experiments.sessions.frozen_bases import check_spaces, keep_base
from experiments.sessions.teachers import weights_digest
from experiments.sessions.training import Session
from wrappers.vector import BaseActions, VectorView

SIDE_BY_SIDE = 16
"""Episodes of demonstrations whose base actions are computed together."""


class ResidualSession(Session):
    """Environments that show what the base does, demonstrations, and the rest of a run; see `Session`."""

    agent: ResFiT
    loop: ResidualLoop

    def _prepare(self, seeds: Mapping[str, int]) -> None:
        """Give the agent its base, and the environments its actions."""
        keep_base(self.config["base"], self.run)
        space, action_space = self.spaces
        parts = {"observation": space_to_json(space), "action": space_to_json(action_space)}
        check_spaces(self.run, parts)
        self.base = load_base(self.run, device=self.config["device"], imports=True)
        if weights_digest(self.base.agent) != self.config["base"]["digest"]:
            raise UserError(
                f"'{self.run / BASE}' is not the base that this run began with: its weights differ; put that one back, "
                "or begin a new run"
            )
        self.agent.take_base(self.base)
        self.base_seed = seeds["exploration"]
        self.envs = self._seen(self.envs)

    def _complete(self, seeds: Mapping[str, int]) -> None:
        """Give the loop its demonstrations, where the run has some."""
        if "demonstrations" not in self.config or self.agent.config.demonstration_share == 0:
            return
        self.loop.mixture = load_mixture(
            self.config,
            self.spaces,
            self.config.get("reward", "task"),
            self.agent.config.demonstration_share,
            self.base,
            seed=seeds["replay"],
            directory=self.run / "replay-memory",
        )

    def _seen(self, vector: Any) -> VectorView:
        """Return a vector environment whose observations say what the base would do."""
        space, action_space = self.spaces
        (lone, *_) = observation_boxes(space)
        return BaseActions(
            vector,
            BaseStream(self.base, self.base_seed),
            with_base_action(space, action_space),
            name=BASE_ACTION,
            lone=lone,
        )

    def _measure_steps(self) -> tuple[float, float]:
        """See `Session._measure_steps`; the base acts, too, in all environments at once."""
        train, evaluation = super()._measure_steps()
        counts = self.envs.num_envs, self.settings.eval_episodes
        own, other = (self._base_seconds(count) for count in counts)
        return train + own, evaluation + other

    def _base_seconds(self, count: int) -> float:
        """Return what the base takes for each of `count` steps, with the plans that are due on the way."""
        stream = BaseStream(self.base, self.base_seed)
        seen = random_batch(self.envs, count, self.config["device"]).observation
        calls = max(4, 2 * self.base.executed)
        return seconds_per_call(lambda: stream.act(seen), calls=calls, warmup=1) / count


class DemonstrationReplay(Replay):
    """A replay of demonstrations, which take as much room as there are."""

    what = "the demonstrations need"
    smaller = "give fewer --episodes"


def load_mixture(
    config: Mapping[str, Any],
    spaces: tuple[gym.Space, gym.Space],
    reward: str,
    share: float,
    base: BasePolicy,
    *,
    seed: int,
    directory: Path | None = None,
) -> Mixture:
    """Read what a run's config names as its demonstrations, and ask the base what it would have done in them.

    Args:
        config: the run's.
        spaces: of its task's observations and actions.
        reward: `task` or `success`.
        share: of every batch.
        base: acts in every episode from its first observation on, whatever was done there.
        seed: of the run's replay; the batches and what the base draws have streams of their own.
        directory: for data that does not fit the memory.

    Raises:
        UserError: a data set is missing, empty, damaged or of another shape; the text names data set and episode.
    """
    datasets, work = chosen_episodes(config["demonstrations"])
    space, action_space = spaces
    steps = sum(datasets[name].steps(index) for name, index in work)
    # Streams of their own: from the replay's seed both halves of every batch would be drawn by the same numbers.
    batches, plans = np.random.SeedSequence(seed).spawn(2)
    replay = DemonstrationReplay(
        with_base_action(space, action_space),
        action_space,
        capacity=max(steps + 2 * len(work), config["env"]["frame_stack"] + 2),  # see `add_episode`
        num_envs=1,
        frame_stack=config["env"]["frame_stack"],
        device=config["device"],
        storage=config["replay_storage"],
        directory=directory,
        seed=batches,
        log=lambda line: print(line.replace("replay", "demonstrations", 1)),
    )
    digest, random = hashlib.sha256(), np.random.default_rng(plans)
    starts = range(0, len(work), SIDE_BY_SIDE)
    for start in tqdm(starts, desc="reading", disable=None, leave=False):
        group = []
        for name, index in work[start : start + SIDE_BY_SIDE]:
            episode = datasets[name].read(index, scenes=False, side_by_side=True)
            which = f"dataset '{name}', episode {index}"
            group.append(demonstrated(episode, space, action_space, reward, which))
        bases = base_actions([shown.observation for shown in group], base, random)
        for shown, base_action in zip(group, bases, strict=True):
            for values in (*shown.observation.values(), shown.action, shown.reward):
                digest.update(np.ascontiguousarray(values).tobytes())
            digest.update(str((len(shown.action), shown.terminated)).encode())
            seen = {**shown.observation, BASE_ACTION: base_action}
            add_episode(replay, seen, shown.action, shown.reward, shown.terminated)
    return Mixture(replay, share, digest.hexdigest())


class Demonstrated(NamedTuple):
    """An episode of T actions, as replays take it."""

    observation: dict[str, np.ndarray]
    """[T + 1, ...], by name; of pictures the newest one, [T + 1, 3, H, W]."""
    action: np.ndarray
    """float32 [T, A]."""
    reward: np.ndarray
    """float32 [T]."""
    terminated: bool
    """Its last action truly ended it."""


def demonstrated(
    episode: Episode, space: gym.Space, action_space: gym.Space, reward: str, name: str
) -> Demonstrated:
    """Return an episode as a task's replays take it.

    Raises:
        UserError: it does not fit the task, has a number that is not finite or an action outside [-1, 1], or does not
            tell of successes that are asked for.
    """
    assert action_space.shape is not None
    actions = checked_actions(name, episode.actions, action_space.shape[0])
    boxes = observation_boxes(space)
    given: Any = episode.observations
    seen = {}
    for key, box in boxes.items():
        if isinstance(given, Mapping) and key not in given:
            raise UserError(
                f"{name} has no '{key}', only {', '.join(sorted(given))}; give demonstrations that show it"
            )
        values = np.asarray(given[key] if isinstance(given, Mapping) else given)
        shape = box.shape
        if is_image(box):  # of stacks, however deep, the newest picture
            values, shape = values[:, -3:], (3, *shape[1:])
        if values.shape != (len(actions) + 1, *shape):
            raise UserError(
                f"{name} has '{key}' of shape {list(values.shape)}, expected {[len(actions) + 1, *shape]}; give "
                "demonstrations of this task, seen at this size"
            )
        check_steps(name, key, values)
        seen[key] = values.astype(box.dtype)
    rewards = np.asarray(episode.rewards, np.float32)
    check_steps(name, "reward", rewards)
    if reward == "success":
        if "success" not in episode.infos:
            raise UserError(
                f"{name} does not tell when the task was solved; leave --reward success out"
            )
        rewards = (np.asarray(episode.infos["success"][1:]) > 0).astype(np.float32)
    return Demonstrated(seen, actions, rewards, bool(episode.terminations[-1]))


def base_actions(
    episodes: Sequence[Mapping[str, np.ndarray]], base: BasePolicy, random: np.random.Generator
) -> list[np.ndarray]:
    """Return what the base does in every observation of episodes [T + 1, ...], float32 [T + 1, A] each.

    The episodes run side by side; the shorter ones stay in their last observation until the longest ends.
    """
    stream = BaseStream(base, int(random.integers(2**31)))
    lengths = [len(next(iter(episode.values()))) for episode in episodes]
    rows: list[np.ndarray] = []
    for t in range(max(lengths)):
        at = [min(t, length - 1) for length in lengths]
        rows.append(
            stream.act(
                {
                    name: np.stack(
                        [episode[name][i] for episode, i in zip(episodes, at, strict=True)]
                    )
                    for name in episodes[0]
                }
            )
        )
    whole = np.stack(rows, axis=1)
    return [actions[:length] for actions, length in zip(whole, lengths, strict=True)]
