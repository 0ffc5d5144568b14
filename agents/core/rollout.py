"""What N parallel environments did in T steps of one policy, for on-policy learning.

A rollout is a replay that is emptied: frames are kept once as uint8, stacks are made when a minibatch is drawn, the
true last observation of an episode is a row of its own, and checkpoints in mid-rollout are exact. An action may be a
chunk (an action space of shape [chunk, A]); what was sampled on the way to an action, such as the steps of a denoising
chain, is an extra field with an inner axis of its own ([K, ...]).

Arrays are [T, N], time first, on the learner's device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.core.errors import UserError
from agents.core.fields import Field, Storage
from agents.core.replay import Replay, part_of

MOST_AT_ONCE = 512
"""Observations that a critic is asked about together, for the sake of memory."""

Evaluate = Callable[[dict[str, Tensor]], Tensor]
"""From a batch of observations [M, ...] to their values [M]."""

TEACHER_ACTION = "teacher_action"
"""The extra field with what a teacher would have done, like `action`."""


@dataclass(frozen=True)
class Experience:
    """The steps of a rollout, [T, N] each."""

    action: Tensor
    """float32 [T, N, ...], or int64 [T, N]."""
    reward: Tensor
    """float32."""
    terminated: Tensor
    """bool: the episode truly ended with this step."""
    truncated: Tensor
    """bool: it was cut off after this step, by a time limit or because its worker died in the next one."""
    kept: Tensor
    """bool: False where the step is to be left out, as nobody knows what came of it."""
    extras: dict[str, Tensor]
    """The declared extra fields, [T, N, ...]."""
    rollout: Rollout
    """Where the observations are; valid until it is cleared."""

    def observation(self, index: Tensor) -> dict[str, Tensor]:
        """Return what was seen before steps, [M, ...], stacks whole.

        Args:
            index: int64 [M] on the CPU, numbers of steps in the flattened [T, N].

        Returns:
            `pixels` and / or `state`. Where steps have an extra field `memory` (what the agent remembered before each),
            the index is cut into stretches, the neighbors that follow one another in one environment's episode:
            `lengths`, int64 [S] on the CPU, are their steps, and `memory` [S, ...] is that of the first of each.
        """
        seen = self.rollout.observe(index, ahead=0)
        if "memory" not in self.extras:
            return seen
        first = torch.ones(len(index), dtype=torch.bool)
        follows = index[1:] == index[:-1] + self.action.shape[1]
        first[1:] = ~follows | self._begins[index[1:]]
        starts = first.nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([len(index)]))
        return seen | {"memory": self._read("memory", index[starts]), "lengths": lengths}

    def next_observation(self, index: Tensor) -> dict[str, Tensor]:
        """Return what was seen after steps, at an episode's end its own last observation.

        Where steps have an extra field `next_memory`, that is the `memory` with which each is seen.
        """
        seen = self.rollout.observe(index, ahead=1)
        if "next_memory" not in self.extras:
            return seen
        memory = self._read("next_memory", index)
        return seen | {"memory": memory, "lengths": torch.ones(len(index), dtype=torch.int64)}

    @cached_property
    def _begins(self) -> Tensor:
        """Whether an episode begins with a step, bool [T * N] on the CPU; the first steps are not told apart."""
        begins = torch.zeros_like(self.kept, device="cpu")
        begins[1:] = (self.terminated | self.truncated | ~self.kept)[:-1].cpu()
        return begins.flatten()

    @cached_property
    def _kept_steps(self) -> np.ndarray:
        """Numbers of the kept steps, in order; read once, as a GPU is waited for."""
        return self.kept.flatten().nonzero()[:, 0].cpu().numpy()

    def _read(self, name: str, index: Tensor) -> Tensor:
        values = self.extras[name].flatten(0, 1)
        return values[index.to(values.device, non_blocking=True)]

    def kept_states(self) -> Tensor:
        """Return the states that were seen before the kept steps, float32 [M, D]; no picture is read for it."""
        return self.rollout.observe(torch.from_numpy(self._kept_steps), ahead=0, names=["state"])[
            "state"
        ]

    def next_values(self, value: Tensor, evaluate: Evaluate) -> Tensor:
        """Return the values of what followed every step, [T, N]; 0 after terminations.

        The next step's value where the episode goes on; only the others are evaluated, `MOST_AT_ONCE` together.

        Args:
            value: [T, N], of what was seen before every step.
            evaluate: the critic.
        """
        following = torch.zeros_like(value)
        following[:-1] = value[1:]
        following[self.terminated] = 0
        cut = self.truncated.clone()
        cut[-1] |= ~self.terminated[-1]
        cut &= self.kept
        index = cut.flatten().nonzero()[:, 0].cpu()
        if len(index):  # nothing would still be one part
            for part in index.split(MOST_AT_ONCE):
                values = evaluate(self.next_observation(part)).to(following)
                following.view(-1)[part.to(following.device)] = values
        return following

    def minibatches(self, size: int, generator: np.random.Generator) -> Iterator[Tensor]:
        """Yield shuffled step numbers, int64 [M] on the CPU with M about `size`: every kept step once."""
        shuffled = generator.permutation(self._kept_steps)
        for part in np.array_split(shuffled, _part_count(len(shuffled), size)):
            yield torch.from_numpy(part)

    def sequences(self, size: int, length: int, generator: np.random.Generator) -> Iterator[Tensor]:
        """Yield step numbers as `minibatches` does, of whole chunks of consecutive steps in shuffled order.

        Args:
            size: steps in a minibatch, about; one chunk at least.
            length: steps of a chunk; the last ones of a rollout may be shorter.
            generator: who shuffles.
        """
        kept = self.kept.cpu().numpy()
        steps, envs = kept.shape
        number = np.arange(kept.size).reshape(kept.shape)
        stretches = [
            (slice(t, t + length), env) for env in range(envs) for t in range(0, steps, length)
        ]
        chunks = [chunk for place in stretches if len(chunk := number[place][kept[place]])]
        count = min(len(chunks), max(1, round(kept.sum() / size)))
        for part in np.array_split(generator.permutation(len(chunks)), count):
            yield torch.from_numpy(np.concatenate([chunks[i] for i in part]))


def part_sizes(steps: int, size: int) -> set[int]:
    """Return the sizes of the parts into which `Experience.minibatches` cuts so many kept steps."""
    count = _part_count(steps, size)
    return {steps // count, -(-steps // count)}


def _part_count(steps: int, size: int) -> int:
    return max(1, round(steps / size))


class Rollout(Replay):
    """A store for the steps between two updates of a policy.

    Args:
        observation_space: see `Replay`.
        action_space: see `Replay`; of shape [chunk, A] for chunks.
        length: T, steps of every environment.
        num_envs: N.
        frame_stack: frames in a stack.
        extras: further fields of every step, such as `log_prob` and `value`.
        device: where minibatches are needed.
        storage: see `Replay`.
        log: gets one line that says what the store takes, before it takes it.
        jumps: how often `jump` is called in a rollout, at most.

    Raises:
        UserError: the length is not positive, or as `Replay`.
    """

    smaller = "lower --rollout-length, --num-envs or --size"

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        length: int,
        num_envs: int,
        frame_stack: int = 3,
        extras: Mapping[str, Field] | None = None,
        device: str | torch.device = "cpu",
        storage: Storage = "auto",
        directory: str | Path | None = None,
        log: Callable[[str], None] = print,
        jumps: int = 0,
    ) -> None:
        if length < 1:
            raise UserError(f"the rollout's length is {length}; give at least 1 step")
        self.length = length
        super().__init__(
            observation_space,
            action_space,
            # Two rows for every step, should each end an episode, and the stacks of the first step and of jumps.
            capacity=num_envs * (2 * length + frame_stack * (1 + jumps) + 1),
            num_envs=num_envs,
            frame_stack=frame_stack,
            extras=extras,
            device=device,
            storage=storage,
            directory=directory,
            log=log,
        )
        self.clear()

    @property
    def steps(self) -> int:
        """Steps of every environment since the last `clear`."""
        return len(self._ids)

    @property
    def is_full(self) -> bool:
        """Whether T steps are there."""
        return len(self._ids) == self.length

    def clear(self) -> None:
        """Begin the next rollout; episodes go on."""
        self._ids: list[np.ndarray] = []  # int64 [N] of every step, -1 where dropped
        self._cut: list[np.ndarray] = []  # bool [N]
        self._flat: np.ndarray | None = None  # all of the ids, once they are asked for

    def start(self, observation: Any) -> None:
        """Begin a new episode in every environment; in mid-rollout, those that were going on are cut off."""
        if self._cut:
            self._cut[-1] |= self._ids[-1] >= 0
        super().start(observation)

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
        """Store one step of every environment; see `Replay.add`.

        Raises:
            RuntimeError: the rollout is full.
        """
        if self.is_full:
            raise RuntimeError(f"the rollout holds its {self.length} steps: clear it first")
        ids = super().add(
            action, reward, terminated, truncated, observation, final_observation, dropped, extras
        )
        lost = ids < 0
        if self._cut:
            # What the lost step would have led to is unknown: the one before ends with what it led to.
            self._cut[-1] |= lost & (self._ids[-1] >= 0)
        self._ids.append(ids)
        self._flat = None
        self._cut.append(np.asarray(truncated, bool) & ~np.asarray(terminated, bool) & ~lost)
        return ids

    def jump(self, observation: Any) -> None:
        """Go on from another state than the last step led to, in every environment.

        That step ends what was before it like a time limit: from what it led to, learners bootstrap.

        Args:
            observation: [N, ...] of that state, in the middle of an episode too: its whole stack is kept.
        """
        if self._cut:
            self._cut[-1] |= self._ids[-1] >= 0
        envs = np.arange(self.num_envs)
        frames = self.frame_stack if self._stacked else 1
        for age in range(frames):
            seen = {}
            for name, field in self._observations.items():
                values = np.asarray(part_of(observation, name))
                if name in self._stacked:
                    channels = field.shape[0]
                    values = values[:, age * channels : (age + 1) * channels]
                seen[name] = values
            self._append(
                envs, self._newest_frames(seen, envs), np.full(self.num_envs, age, np.uint8)
            )

    def experience(self) -> Experience:
        """Return the steps since the last `clear`.

        Raises:
            ValueError: there is none.
        """
        if not self._ids:
            raise ValueError("the rollout is empty: add steps before learning from them")
        ids = np.stack(self._ids)
        kept = torch.from_numpy(ids >= 0).to(self.device)
        found = np.maximum(ids, 0)  # lost steps show some row, and are blanked
        counter, env = np.divmod(found, self.num_envs)
        slots = self._slots(counter, env)

        def read(name: str) -> Tensor:
            values = self._gather(name, slots)
            values[~kept] = 0
            return values

        terminated = read("terminated")
        cut = torch.from_numpy(np.stack(self._cut)).to(self.device)
        return Experience(
            action=read("action"),
            reward=read("reward"),
            terminated=terminated,
            truncated=cut & ~terminated,
            kept=kept,
            extras={name: read(name) for name in self._extras},
            rollout=self,
        )

    def observe(
        self, index: Tensor, ahead: int, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the observations `ahead` rows after the ones in which steps were taken, [M, ...].

        Args:
            index: int64 [M] on the CPU, numbers of steps in the flattened [T, N].
            ahead: 0, or 1 for what they led to.
            names: the parts that are wanted; None for all.
        """
        if self._flat is None:
            self._flat = np.concatenate(self._ids)
        ids = self._flat[index.numpy()]
        if (ids < 0).any():
            raise ValueError("a step that was dropped has no observations: leave it out by `kept`")
        counter, env = np.divmod(ids, self.num_envs)
        return self._observe(env, counter + ahead, names)

    def get_state(self) -> dict[str, Any]:
        """Return the replay's state and which of its rows are this rollout's."""
        shape = (0, self.num_envs)
        ids = np.stack(self._ids) if self._ids else np.zeros(shape, np.int64)
        cut = np.stack(self._cut) if self._cut else np.zeros(shape, bool)
        return super().get_state() | {"rollout": {"ids": ids, "cut": cut}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore `get_state`; see `Replay.set_state`."""
        super().set_state(state)
        self._ids = list(np.array(state["rollout"]["ids"]))
        self._cut = list(np.array(state["rollout"]["cut"]))
        self._flat = None

    def _layout(self) -> dict[str, Any]:
        return super()._layout() | {"length": self.length}
