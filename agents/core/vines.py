"""Vines: several rollouts from one state, by putting the simulators back (TRPO, arXiv:1502.05477, section 5.2).

A rollout has stretches of ordinary steps. At a random step of each stretch every environment's state is remembered, and
from there each goes on several times, for a fixed number of steps, before the stretch goes on where it was left. The
first vine follows its stretch without a break; before every other one, and before the stretch goes on, the store is
told of the jump, and what was before ends like at a time limit. Where a vine's episode ends early, what remains of its
steps belongs to new episodes, which are learned from like any others.

All steps are steps: they count in `agent_steps` and `env_frames`, and the policy is the same throughout. States hold
the environments' own random generators, so that vines from a state differ by what the policy does alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.core.agent import OnPolicyAgent
from agents.core.errors import UserError
from agents.core.fields import Field
from agents.core.loops import OnPolicyLoop
from agents.core.rollout import Experience
from agents.core.training import Choice

EXTRAS = {"vine": Field((), torch.int64), "behavior": Field((), torch.int64)}
"""What the store keeps of every step: the vine's number from 1, or 0 in a stretch; and what the task's
`info["behavior"]` said of it, a number from 0, or -1."""


@dataclass(frozen=True)
class VinePlan:
    """Where the steps of a rollout go."""

    branches: int
    """States of every environment from which vines go, in a rollout."""
    vines: int
    """Rollouts from each of them."""
    length: int
    """Steps of a vine."""

    @property
    def jumps(self) -> int:
        """How often in a rollout the environments are put back, at most."""
        return self.branches * self.vines + 1

    def labels(self, rollout_length: int, random: np.random.Generator) -> np.ndarray:
        """Draw where the vines are: int64 [T], see `EXTRAS`.

        Raises:
            UserError: the rollout is too short.
        """
        taken = self.branches * self.vines * self.length
        if rollout_length < taken + self.branches:
            raise UserError(
                f"rollout_length is {rollout_length}, and {self.branches} branches of {self.vines} vines of "
                f"{self.length} steps take {taken}; give at least {taken + self.branches}, or fewer or shorter vines"
            )
        parts: list[np.ndarray] = []
        for branch, stretch in enumerate(
            np.array_split(np.zeros(rollout_length - taken, np.int64), self.branches)
        ):
            at = random.integers(len(stretch))
            numbers = 1 + branch * self.vines + np.arange(self.vines)
            parts += [stretch[:at], np.repeat(numbers, self.length), stretch[at:]]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Vines:
    """The vines of a rollout, [V, N]; environment `n` of vine `v` is rollout number `v * N + n`."""

    first: np.ndarray
    """int64 [V], the step that each begins with."""
    last: np.ndarray
    """int64 [V, N], the step that each one's own episode ends with, or the vine's last."""
    whole: np.ndarray
    """bool [V, N]: no worker was lost meanwhile."""
    start: np.ndarray
    """int64 [V, N], the number of the state that it began in."""

    @classmethod
    def of(cls, experience: Experience, plan: VinePlan) -> Vines:
        """Find the vines of a rollout; there are none in one that another loop collected."""
        labels = experience.extras["vine"].amax(1).cpu().numpy()  # lost steps have none
        kept = experience.kept.cpu().numpy()
        ended = (experience.terminated | experience.truncated).cpu().numpy()
        count = kept.shape[1]
        rows = []
        for number in range(1, 1 + plan.branches * plan.vines):
            steps = np.flatnonzero(labels == number)
            if len(steps) == plan.length:
                ends = ended[steps]
                ends[-1] = True
                start = (number - 1) // plan.vines * count + np.arange(count)
                rows.append((steps[0], steps[0] + ends.argmax(0), kept[steps].all(0), start))
        if not rows:
            empty = np.zeros((0, count), np.int64)
            return cls(np.zeros(0, np.int64), empty, empty.astype(bool), empty)
        first, last, whole, start = (np.stack(part) for part in zip(*rows, strict=True))
        return cls(first, last, whole, start)

    def last_index(self) -> Tensor:
        """Return the numbers of the last steps in the flattened [T, N], int64 [V * N] on the CPU."""
        count = self.last.shape[1]
        return torch.from_numpy((self.last * count + np.arange(count)).reshape(-1))


class VineAgent(OnPolicyAgent):
    """What `VineLoop` asks beside.

    Attributes:
        vines: where the steps of its rollouts go.
        needs_behavior: it learns from what the task says of behaviors.
    """

    vines: VinePlan
    needs_behavior: bool


class VineLoop(OnPolicyLoop):
    """Learns from rollouts that branch, see the module; the environments' states must be readable."""

    agent: VineAgent
    without_state = "this agent goes back to earlier states, so choose another agent or task"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.agent.vines.labels(self.replay.length, np.random.default_rng(0))  # refuse misfits now
        self._forget()

    def _forget(self) -> None:
        self._labels: np.ndarray | None = None  # of this rollout; None before its first step
        self._label = 0  # of the step before
        self._anchor: dict[str, Any] | None = None  # where the vines begin

    def begin(self) -> None:
        """Begin the first episodes, and make sure that vines can go back to them."""
        super().begin()
        if not self.settings.exact_resume:
            self._check_state()

    def choose(self) -> Choice:
        """Go where the next step belongs, and act as the agent explores."""
        if self._labels is None:
            self._labels = self.agent.vines.labels(self.replay.length, self.random)
        label = int(self._labels[self.replay.steps])
        if label != self._label:
            if self._anchor is not None:
                self.envs.set_state(self._anchor["environments"])  # type: ignore[attr-defined]
                self.observation = self._anchor["observation"]
                self.set_memories(self._anchor["memories"])
                self.replay.jump(self.observation)
            if label == 0:
                self._anchor = None
            elif self._anchor is None:
                state = self.envs.get_state()  # type: ignore[attr-defined]
                self._anchor = {
                    "environments": state,
                    "observation": self.observation,
                    "memories": self.get_memories(),
                }
            self._label = label
        choice = super().choose()
        vine = np.full(self.envs.num_envs, label)
        return Choice(choice.action, choice.sent, {**(choice.extras or {}), "vine": vine})

    def beside(self, choice: Choice, info: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keep what the task said of behaviors too."""
        final = info.get("final_info", {})
        if "episode" in info and self.agent.needs_behavior and "behavior" not in final:
            raise UserError(
                'this task does not say by info["behavior"] how an episode went; tell behaviors apart in another way, '
                "such as --behavior ended"
            )
        behavior = np.full(self.envs.num_envs, -1, np.int64)
        for part in (info, final):  # of an episode that ended, the other is about the next one
            if "behavior" in part:
                told = part["_behavior"]
                behavior[told] = np.asarray(part["behavior"])[told].astype(np.int64)
        return {**(choice.extras or {}), "behavior": behavior}

    def learn_afterwards(self) -> None:
        """Learn when the rollout is full, and begin the next."""
        super().learn_afterwards()
        if self.replay.steps == 0:
            self._labels = None

    def further_parts(self) -> dict[str, Any]:
        """Return where in its vines a rollout is."""
        vines = {"labels": self._labels, "label": self._label, "anchor": self._anchor}
        return {"vines": vines}

    def resume(self, parts: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's parts; without the environments' states, with a new rollout."""
        super().resume(parts)
        self._forget()
        if self.settings.exact_resume and "vines" in parts:
            vines = parts["vines"]
            self._labels, self._label, self._anchor = (
                vines[name] for name in ("labels", "label", "anchor")
            )
        else:
            self.replay.clear()
