"""Demonstrations: episodes of somebody else's actions, from which chunks of H actions are drawn.

A *row* is one observation in which an action was taken. Pictures are kept once, as uint8, and stacked when they are
drawn, over rows that lie `stride` actions apart: an agent whose step executes a chunk of h actions is shown one picture
a chunk (`action_chunk` of the environments), so it must learn from stacks of such pictures. A stack that would reach
back before its episode repeats the first picture, as environments do at a reset.

A chunk that would reach beyond its episode repeats the last action, and a mask says which actions were really taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.core.errors import UserError
from agents.core.fields import (
    Storage,
    allocate,
    choose_storage,
    is_image,
    observation_boxes,
    observation_fields,
    step_fields,
)

TOLERANCE = 1e-6
"""How far an action may lie outside [-1, 1] by rounding."""


@dataclass(frozen=True)
class ChunkBatch:
    """Observations and what was done from there on."""

    observation: dict[str, Tensor]
    """What was seen: uint8 [B, 3*k, H, W] (oldest frame first) or float32 [B, D]."""
    chunk: Tensor
    """float32 [B, H, A], the next H actions; the episode's last one is repeated."""
    mask: Tensor
    """bool [B, H], which of them were taken in the episode."""


class Demonstrations:
    """A store of whole episodes, filled once.

    Args:
        observation_space: of the agent that learns: uint8 pixels [3*k, H, W], a float vector, or a Dict of such.
        action_space: of one action, Box [A] in [-1, 1].
        rows: how many actions will be added in all.
        horizon: H, actions in a chunk.
        frame_stack: k.
        stride: actions between two pictures of a stack.
        seed: of the batches.
        device: where batches are to be.
        storage: where rows are kept; see `fields.choose_storage`.
        directory: for storage on disk.
        log: is told how much memory it takes.

    Attributes:
        episodes: how many were added.

    Raises:
        UserError: no rows, a horizon or stride below 1, actions that are no Box [A], or too little memory.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        rows: int,
        horizon: int,
        frame_stack: int = 1,
        stride: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        storage: Storage = "auto",
        directory: str | Path | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        if rows < 1:
            raise UserError("the demonstrations are empty; collect at least one episode")
        if horizon < 1 or stride < 1:
            raise UserError(f"horizon is {horizon} and stride {stride}; give at least 1")
        if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
            raise UserError(f"chunks are of actions Box [A], not of {action_space}")
        self.horizon, self.frame_stack, self.stride = horizon, frame_stack, stride
        self.device = torch.device(device)
        self.generator = np.random.default_rng(seed)
        self._boxes = observation_boxes(observation_space)
        self._seen = observation_fields(observation_space, frame_stack)
        fields = {**self._seen, "action": step_fields(action_space)["action"]}
        nbytes = rows * sum(field.nbytes for field in fields.values())
        kind, line = choose_storage(
            storage,
            nbytes,
            self.device,
            directory,
            what="the demonstrations need",
            remedy="give fewer --episodes, or --observation state",
        )
        log(f"demonstrations: {line}")
        self._columns = {
            name: allocate(name, rows, field, kind, self.device, directory)
            for name, field in fields.items()
        }
        # Of every row, the first and the last row of its episode.
        self._first, self._last = (np.zeros(rows, np.int64) for _ in range(2))
        self._added, self.episodes = 0, 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._added

    @property
    def digest(self) -> str:
        """What tells these demonstrations from others: a digest of all that was added, in order."""
        return self._hash.hexdigest()

    def add(self, observation: Any, action: Any, name: str | None = None) -> None:
        """Add an episode of T actions.

        Args:
            observation: what was seen before each action, [T, ...] as the observation space says, or by name; a last
                one [T + 1] is left out. Of a stack of pictures, however many it has, the newest is kept.
            action: [T, A] in [-1, 1].
            name: of the episode in messages; its number, where none is given.

        Raises:
            UserError: the episode is empty, of other shapes, has a number that is not finite or an action outside
                [-1, 1]; the text names the episode and the step.
        """
        name = name or f"episode {self.episodes}"
        actions = checked_actions(name, action, self._columns["action"].shape[1])
        count = len(actions)
        if self._added + count > len(self._first):
            raise UserError(f"{name} does not fit: the store was made for {len(self._first)} rows")
        parts = self._parts(name, observation, count)
        rows = slice(self._added, self._added + count)
        parts["action"] = actions
        for key, values in parts.items():
            values = np.ascontiguousarray(values)
            self._hash.update(values.tobytes())
            self._columns[key][rows] = torch.from_numpy(values).to(self._columns[key].device)
        self._hash.update(str(count).encode())
        self._first[rows], self._last[rows] = rows.start, rows.stop - 1
        self._added, self.episodes = rows.stop, self.episodes + 1

    def _parts(self, name: str, observation: Any, count: int) -> dict[str, np.ndarray]:
        """Return what is kept of an episode's observations, [count, ...] each, checked."""
        if not isinstance(observation, Mapping):
            array = np.asarray(observation)
            observation = {"pixels" if array.ndim == 4 else "state": array}
        parts = {}
        for key, field in self._seen.items():
            if key not in observation:
                raise UserError(
                    f"{name} has no '{key}', only {', '.join(sorted(observation))}; collect demonstrations that show "
                    "it, or choose another --observation"
                )
            values = np.asarray(observation[key])
            if is_image(self._boxes[key]) and values.ndim == 4:  # the newest picture of each stack
                values = values[:, -field.shape[0] :]
            if values.shape[1:] != field.shape or len(values) not in (count, count + 1):
                raise UserError(
                    f"{name} has '{key}' of shape {values.shape}, expected [{count} or {count + 1}, "
                    f"{', '.join(map(str, field.shape))}]; give demonstrations of this task, seen at this size"
                )
            if is_image(self._boxes[key]) != (values.dtype == np.uint8):
                raise UserError(f"{name} has '{key}' of {values.dtype}; pictures are uint8")
            values = (
                values[:count] if is_image(self._boxes[key]) else values[:count].astype(np.float32)
            )
            check_steps(name, key, values)
            parts[key] = values
        return parts

    def sample(self, batch_size: int) -> ChunkBatch:
        """Return a batch of rows, drawn uniformly with replacement."""
        return self.read(self.generator.integers(self._added, size=batch_size))

    def read(self, index: np.ndarray) -> ChunkBatch:
        """Return rows by number, int64 [B]."""
        first, last = self._first[index, None], self._last[index, None]
        wanted = index[:, None] + np.arange(self.horizon)
        mask = wanted <= last
        chunk = self._gather("action", np.minimum(wanted, last))
        back = index[:, None] - self.stride * np.arange(self.frame_stack)[::-1]
        observation = {}
        for name in self._seen:
            if is_image(self._boxes[name]):
                observation[name] = self._gather(name, np.maximum(back, first)).flatten(1, 2)
            else:
                observation[name] = self._gather(name, index)
        return ChunkBatch(observation, chunk, torch.from_numpy(mask).to(self.device))

    def batches(self, batch_size: int) -> Iterable[ChunkBatch]:
        """Yield every row once, in order, for statistics of all the data."""
        for start in range(0, self._added, batch_size):
            yield self.read(np.arange(start, min(start + batch_size, self._added)))

    def column(self, name: str) -> Tensor:
        """Return all rows of `action` or of a part of the observation (pictures unstacked), where they are kept."""
        return self._columns[name][: self._added]

    def _gather(self, name: str, index: np.ndarray) -> Tensor:
        """Return rows [*index.shape, ...] on the batches' device."""
        column = self._columns[name]
        flat = torch.from_numpy(np.ascontiguousarray(index.reshape(-1))).to(column.device)
        rows = column.index_select(0, flat).to(self.device, non_blocking=True)
        return rows.view(*index.shape, *column.shape[1:])

    @property
    def longest(self) -> int:
        """Actions of the longest episode."""
        return int((self._last - self._first)[: self._added].max(initial=-1)) + 1

    def get_state(self) -> dict[str, Any]:
        """Return the generator's state and the digest; the rows are the data set's."""
        return {"generator": self.generator.bit_generator.state, "digest": self.digest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on drawing from `get_state`'s state.

        Raises:
            UserError: it was saved with other demonstrations.
        """
        if state["digest"] != self.digest:
            raise UserError(
                "the demonstrations are not those that the run began with: a data set was replaced or cut; put it "
                "back, or begin a new run"
            )
        self.generator.bit_generator.state = state["generator"]


def checked_actions(name: str, action: Any, numbers: int) -> np.ndarray:
    """Return an episode's actions as they are learned from, float32 [T, A] in [-1, 1].

    Args:
        name: of the episode in messages.
        action: [T, A].
        numbers: A.

    Raises:
        UserError: there are none, or they are of another shape, not finite or outside [-1, 1].
    """
    actions = np.asarray(action, np.float32)
    if actions.ndim != 2 or actions.shape[1] != numbers:
        raise UserError(
            f"{name} has actions of shape {actions.shape}, expected [T, {numbers}]; give demonstrations of this task, "
            "with one action a step"
        )
    if not len(actions):
        raise UserError(f"{name} is empty: no action was taken; leave it out")
    check_steps(name, "action", actions)
    if (beyond := np.abs(actions) > 1 + TOLERANCE).any():
        step = int(np.argwhere(beyond)[0, 0])
        raise UserError(
            f"{name}, step {step}: an action is {actions[beyond][0]:g}, outside [-1, 1]; collect demonstrations with "
            "this task's own action space"
        )
    return actions.clip(-1, 1)


def check_steps(name: str, part: str, values: np.ndarray) -> None:
    """Refuse a part of an episode, [T, ...], that is not finite.

    Raises:
        UserError: names the first step that is not.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        step = int(np.argwhere(~np.isfinite(values))[0, 0])
        bad = values[step][~np.isfinite(values[step])].flat[0]
        raise UserError(
            f"{name}, step {step}: '{part}' is {bad}; leave the episode out, or collect it anew"
        )
