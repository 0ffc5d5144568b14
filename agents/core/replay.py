"""Experience of N parallel environments: every frame kept once, everything else made at sampling.

A *row* is one observation. Each environment owns a ring of rows; an episode of L steps takes L + 1
rows, because the last observation, from which time limits bootstrap, is a row as well. A row is
*taken* when an action was taken in it, so runs of taken rows are all there is to know about the end
of an n-step window: the last row of an episode, the newest row of a ring and a row whose transition
was dropped are simply not taken. The stack of a row reaches back over its own frame and the
`frame_stack - 1` before it, and repeats the episode's first frame.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.core.errors import UserError
from agents.core.fields import (
    Field,
    Storage,
    choose_storage,
    is_image,
    observation_boxes,
    observation_fields,
    step_fields,
)
from agents.core.rows import OLDEST_AGE, Rows, check_finite


@dataclass(frozen=True)
class Batch:
    """Transitions over up to n steps, uniformly drawn."""

    observation: dict[str, Tensor]
    """What was seen: uint8 [B, 3*k, H, W] (oldest frame first) or float32 [B, D]."""
    action: Tensor
    """float32 [B, A], or int64 [B] for discrete actions."""
    reward: Tensor
    """float32 [B], the sum of `discount**i * reward_i` over the window."""
    discount: Tensor
    """float32 [B], `discount**window`, and 0 where the window ended in a true termination."""
    next_observation: dict[str, Tensor]
    """What was seen at the end of the window."""
    ids: Tensor
    """int64 [B] on the CPU, for `Replay.write`."""
    extras: dict[str, Tensor]
    """The declared extra fields of the window's first row."""


@dataclass(frozen=True)
class SequenceBatch:
    """Stretches of consecutive rows of one environment, from one episode into the next.

    `action[:, t]` is taken in `observation[:, t]`; `reward[:, t]` and `terminated[:, t]` are what
    came of it. Where `taken` is False (the last observation of an episode, the newest row) no
    action was taken, and action, reward and extras are 0.
    """

    observation: dict[str, Tensor]
    action: Tensor
    reward: Tensor
    terminated: Tensor
    taken: Tensor
    """bool [B, L]."""
    is_first: Tensor
    """bool [B, L]: the row is the first of its episode, so recurrent states start anew in it."""
    ids: Tensor
    """int64 [B, L] on the CPU."""
    extras: dict[str, Tensor]


class Replay(Rows):
    """A ring of rows for each of N environments, on the learner's device, in RAM or in a file.

    Args:
        observation_space: one environment's: a Box, or a Dict of Boxes. A uint8 Box with three axes
            is a stack of `frame_stack` frames along the channels, of which the newest is kept.
        action_space: one environment's Box or Discrete space.
        capacity: rows over all environments (an episode takes one more than it has steps).
        num_envs: N.
        frame_stack: frames in a stack, k.
        extras: further fields of every row, by name.
        device: where batches are needed.
        storage: `device`, `ram`, `mmap` (files in `directory`), or `auto`: the first that fits.
        directory: where `mmap` keeps its files; they belong to the process, not to checkpoints.
        seed: of the generator that draws batches.
        log: gets one line that says what the replay takes, before it takes it.

    Raises:
        UserError: when the storage has too little room, or spaces that cannot be stored are given.
    """

    what: ClassVar[str] = "the replay needs"
    """What is to be stored, with its verb, in messages."""
    smaller: ClassVar[str] = "lower --replay-capacity or --size"
    """What to do where there is too little room."""

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        capacity: int,
        num_envs: int,
        frame_stack: int = 3,
        extras: Mapping[str, Field] | None = None,
        device: str | torch.device = "cpu",
        storage: Storage = "auto",
        directory: str | Path | None = None,
        seed: int | np.random.SeedSequence = 0,
        log: Callable[[str], None] = print,
    ) -> None:
        ring = -(-capacity // num_envs)
        if ring < frame_stack + 2:
            raise UserError(
                f"replay capacity {capacity} gives {ring} rows to each of {num_envs} "
                f"environments; raise it to at least {(frame_stack + 2) * num_envs}"
            )
        self.frame_stack = frame_stack
        boxes = observation_boxes(observation_space)
        self._stacked = tuple(name for name, box in boxes.items() if is_image(box))
        self._observations = observation_fields(observation_space, frame_stack)
        self._extras = dict(extras or {})
        self._generator = np.random.default_rng(seed)
        self.nbytes = self.estimate_bytes(
            observation_space,
            action_space,
            capacity=capacity,
            num_envs=num_envs,
            frame_stack=frame_stack,
            extras=extras,
        )
        device = torch.empty(0, device=device).device  # with its index, as tensors have it
        storage, line = choose_storage(
            storage, self.nbytes, device, directory, what=self.what, remedy=self.smaller
        )
        log(f"replay: {num_envs * ring:,} rows, {line}")
        super().__init__(
            _row_fields(observation_space, action_space, frame_stack, self._extras),
            num_envs,
            ring,
            device=device,
            storage=storage,
            directory=directory,
            frozen=(*self._stacked, "terminated"),
        )

    @staticmethod
    def estimate_bytes(
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        capacity: int,
        num_envs: int,
        frame_stack: int = 3,
        extras: Mapping[str, Field] | None = None,
    ) -> int:
        """Return the bytes that a full replay takes, all bookkeeping included."""
        fields = _row_fields(observation_space, action_space, frame_stack, extras or {})
        bookkeeping = 2  # taken, age
        per_row = sum(field.nbytes for field in fields.values()) + bookkeeping
        return -(-capacity // num_envs) * num_envs * per_row

    # ---------------------------------------------------------------------------- experience in

    def start(self, observation: Any) -> None:
        """Begin a new episode in every environment, from the observations of a reset [N, ...]."""
        rows = self._newest_frames(observation, np.arange(self.num_envs))
        self._check_first(observation, np.arange(self.num_envs))
        self._append(np.arange(self.num_envs), rows, np.zeros(self.num_envs, np.uint8))

    def add(
        self,
        action: Any,
        reward: Any,
        terminated: Any,
        truncated: Any,
        observation: Any,
        final_observation: Any = None,
        dropped: Any = None,
        extras: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Store one step of every environment.

        Args:
            action: [N, ...], taken in the newest observations.
            reward: float [N].
            terminated: bool [N], the episode truly ended.
            truncated: bool [N], the episode was cut by a time limit.
            observation: [N, ...], after a same-step autoreset.
            final_observation: the ended episodes' true last observations, batch-shaped, or
                Gymnasium's object array of them; other rows are not read.
            dropped: bool [N], the transition is to be thrown away and `observation` begins an
                episode (a worker died).
            extras: every declared extra field, [N, ...].

        Returns:
            int64 [N], the ids of the stored transitions, -1 where dropped.

        Raises:
            NotFiniteError: when something is not finite; nothing is stored then.
            ValueError: when a final observation is missing.
        """
        if not self._count.all():
            raise RuntimeError("Replay.add before Replay.start: give the first observations first")
        drop = np.zeros(self.num_envs, bool) if dropped is None else np.asarray(dropped, bool)
        kept = np.flatnonzero(~drop)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        values = {"action": action, "reward": reward, "terminated": terminated, **(extras or {})}
        if missing := set(self._extras) - set(values):
            raise ValueError(f"extras of the replay are missing in this step: {sorted(missing)}")
        step = {
            name: self._as_column(name, values[name])
            for name in self._fields
            if name not in self._observations
        }
        if len(kept) < self.num_envs:
            step = {name: column[torch.from_numpy(kept)] for name, column in step.items()}
        check_finite(step, kept)
        ended = np.flatnonzero((terminated | truncated) & ~drop)
        fresh = np.flatnonzero(terminated | truncated | drop)
        rows = self._newest_frames(observation, np.arange(self.num_envs))
        self._check_first(observation, fresh)
        final_rows = self._final_rows(final_observation, ended)

        head = self._count - 1
        slots = self._slots(head)
        self._put(slots[kept], step)
        self._taken[slots[kept]] = True
        self._length += len(kept)
        age = np.minimum(self._age[slots], OLDEST_AGE - 1) + 1
        if len(ended):
            self._append(ended, final_rows, age[ended])
        age[fresh] = 0
        self._append(np.arange(self.num_envs), rows, age)
        return np.where(drop, -1, head * self.num_envs + np.arange(self.num_envs))

    def _newest_frames(
        self, observation: Any, rows_of: np.ndarray, envs: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Return what is kept of some rows of an observation [M, ...], which are those of `envs`."""
        rows = {}
        for name, field in self._observations.items():
            values = np.asarray(part_of(observation, name))
            if name in self._stacked:
                values = values[:, -field.shape[0] :]
            rows[name] = self._as_column(name, values[rows_of])
        check_finite(rows, rows_of if envs is None else envs)
        return rows

    def _final_rows(self, final: Any, ended: np.ndarray) -> dict[str, Tensor]:
        if not len(ended):
            return {}
        if final is None:
            raise ValueError(
                f"environments {ended.tolist()} ended an episode without a final_observation; step "
                "the vector environment in same-step autoreset mode and pass infos['final_obs']"
            )
        if isinstance(final, np.ndarray) and final.dtype == object:
            parts = {
                name: np.stack([np.asarray(part_of(final[env], name)) for env in ended])
                for name in self._observations
            }
            return self._newest_frames(parts, np.arange(len(ended)), ended)
        return self._newest_frames(final, ended)

    def _check_first(self, observation: Any, envs: np.ndarray) -> None:
        """Refuse stacks that this store could not give back: a first one repeats one frame."""
        for name in self._stacked if len(envs) else ():
            stack = np.asarray(part_of(observation, name))[envs]
            frames = stack.reshape(len(envs), self.frame_stack, -1)
            if (frames != frames[:, -1:]).any():
                raise ValueError(
                    f"'{name}': the first observation of an episode must be one frame repeated "
                    f"{self.frame_stack} times, as stacks are rebuilt so; reset the environment"
                )

    # --------------------------------------------------------------------------- experience out

    def sample(self, batch_size: int, *, n_step: int = 1, discount: float = 0.99) -> Batch:
        """Draw transitions uniformly, over windows of up to `n_step` steps.

        A window ends early at the end of its episode, before a dropped transition and at the newest
        observation; it then bootstraps from the observation there (but not after a termination).
        """
        env, counter = self._draw(batch_size, length=1, taken=True)
        steps = np.arange(n_step)
        slots = self._slots(counter[:, None] + steps, env[:, None])  # [B, n]
        inside = np.logical_and.accumulate(self._taken[slots], axis=1)
        window = inside.sum(1)
        last = slots[np.arange(batch_size), window - 1]

        first_column = slots[:, 0]
        powers = torch.from_numpy((discount**steps * inside).astype(np.float32))
        reward = self._gather("reward", slots) * powers.to(self.device)
        bootstrap = torch.from_numpy((discount**window).astype(np.float32)).to(
            self.device, non_blocking=True
        )
        return Batch(
            observation=self._observe(env, counter),
            action=self._gather("action", first_column),
            reward=reward.sum(1),
            discount=bootstrap * ~self._gather("terminated", last),
            next_observation=self._observe(env, counter + window),
            ids=torch.from_numpy(counter * self.num_envs + env),
            extras={name: self._gather(name, first_column) for name in self._extras},
        )

    def sample_sequences(self, batch_size: int, length: int) -> SequenceBatch:
        """Draw stretches of `length` rows uniformly; none crosses a ring's write head.

        Episode boundaries inside are flagged by `is_first` (and the row before by `taken`).
        """
        env, start = self._draw(batch_size, length, taken=False)
        counter = start[:, None] + np.arange(length)
        env = env[:, None] + np.zeros_like(counter)
        slots = self._slots(counter, env)
        return SequenceBatch(
            observation=self._observe(env, counter),
            action=self._gather("action", slots),
            reward=self._gather("reward", slots),
            terminated=self._gather("terminated", slots),
            taken=torch.from_numpy(self._taken[slots]).to(self.device),
            is_first=torch.from_numpy(self._age[slots] == 0).to(self.device),
            ids=torch.from_numpy(counter * self.num_envs + env),
            extras={name: self._gather(name, slots) for name in self._extras},
        )

    def _draw(self, size: int, length: int, taken: bool) -> tuple[np.ndarray, np.ndarray]:
        """Draw (environment, counter) of rows by rejection, uniformly over the valid ones.

        `length` rows from a valid one on are stored and its stack is whole; `taken`: so is it.
        """
        starts = max(int(np.minimum(self._count, self.ring).max()) - length + 1, 0)
        found = np.zeros((2, 0), np.int64)
        while found.shape[1] < size:
            missing = size - found.shape[1]
            draw = self._generator.integers(
                self.num_envs * max(starts, 1), size=missing + missing // 8 + 16
            )
            valid = self._valid(draw, starts, length, taken)
            if (
                not valid.size
                and not self._valid(np.arange(self.num_envs * starts), starts, length, taken).size
            ):
                what = "transition" if taken else f"stretch of {length} rows"
                raise ValueError(
                    f"the replay holds no whole {what} ({len(self)} transitions stored): store "
                    "more before sampling"
                )
            found = np.concatenate([found, valid[:, :missing]], axis=1)
        return found[0], found[1]

    def _valid(self, start: np.ndarray, starts: int, length: int, taken: bool) -> np.ndarray:
        """Return (environment, counter) [2, M] of those `start` numbers that are valid."""
        env, back = np.divmod(start, max(starts, 1))
        counter = self._count[env] - length - back
        slots = self._slots(counter, env)
        stack = np.minimum(self._age[slots], self.frame_stack - 1) if self._stacked else 0
        valid = counter - stack >= np.maximum(self._count[env] - self.ring, 0)
        if taken:
            valid &= self._taken[slots]
        return np.stack([env, counter])[:, valid]

    def _observe(
        self, env: np.ndarray, counter: np.ndarray, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the observations of rows, with whole stacks, shaped like `counter` in front; some parts, or all."""
        slots = self._slots(counter, env)
        wanted = [name for name in self._observations if names is None or name in names]
        if any(name in self._stacked for name in wanted):
            back = np.minimum(np.arange(self.frame_stack - 1, -1, -1), self._age[slots][..., None])
            stacks = self._slots(counter[..., None] - back, env[..., None])
        observation = {}
        for name in wanted:
            if name in self._stacked:
                observation[name] = self._gather(name, stacks).flatten(slots.ndim, slots.ndim + 1)
            else:
                observation[name] = self._gather(name, slots)
        return observation

    # ----------------------------------------------------------------------------- checkpoints

    def get_state(self) -> dict[str, Any]:
        """Return counters, the generator and the open rows; see `Rows`."""
        return super().get_state() | {"generator": self.generator_state}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore `get_state`; the closed rows must then be given to `import_rows`."""
        super().set_state(state)
        self.generator_state = state["generator"]

    @property
    def generator_state(self) -> Any:
        """What decides which transitions are drawn next."""
        return self._generator.bit_generator.state

    @generator_state.setter
    def generator_state(self, state: Any) -> None:
        self._generator.bit_generator.state = state

    def _layout(self) -> dict[str, Any]:
        return super()._layout() | {"frame_stack": self.frame_stack}


def _row_fields(
    observation_space: gym.Space,
    action_space: gym.Space,
    frame_stack: int,
    extras: Mapping[str, Field],
) -> dict[str, Field]:
    observations = observation_fields(observation_space, frame_stack)
    steps = step_fields(action_space)
    names = [*observations, *steps, *extras]
    if taken := {name for name in names if names.count(name) > 1}:
        raise UserError(f"these names of replay fields are in use already: {sorted(taken)}")
    return {**observations, **steps, **extras}


def part_of(observation: Any, name: str) -> Any:
    """Return a part of an observation batch by its name; a lone array is its only part."""
    return observation[name] if isinstance(observation, Mapping) else observation
