"""The training loops: how actions are chosen, and when an agent learns.

Off-policy, the updates of a step run between `step_async` and `step_wait`: with worker processes the simulators render
while the learner learns. On-policy, everything waits for the update: what acts must be what learned. The order of every
random draw is the same with and without workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from agents.core.agent import OnPolicyAgent, as_observation
from agents.core.errors import UserError
from agents.core.mixing import Mixture
from agents.core.replay import Batch
from agents.core.rollout import TEACHER_ACTION, Rollout
from agents.core.training import Choice, Hooks, LoopSettings, LoopState, TrainingLoop
from agents.core.tree_rows import on_device

__all__ = [
    "Hooks",
    "LoopSettings",
    "LoopState",
    "OffPolicyLoop",
    "OffPolicySettings",
    "OnPolicyLoop",
    "Teacher",
    "TrainingLoop",
]


@dataclass(frozen=True)
class OffPolicySettings(LoopSettings):
    """How long and how often, with a replay."""

    random_steps: int = 1000
    """Agent steps of uniform random actions before learning starts (DMControl-GB)."""
    updates_per_step: float = 1.0
    """Gradient updates per agent step (DMControl-GB 1, DrQ-v2 .5)."""
    replay_capacity: int = 500_000
    """Observations that the replay holds, over all environments."""

    def __post_init__(self) -> None:
        """Reject values that no loop can run with."""
        super().__post_init__()
        for name in ("random_steps", "updates_per_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")


class OffPolicyLoop(TrainingLoop):
    """Learns from a replay, while the environments step.

    Attributes:
        mixture: puts demonstrations into every batch; to be set before the loop begins or resumes.
    """

    settings: OffPolicySettings
    mixture: Mixture | None = None

    def choose(self) -> Choice:
        """Act at random at first, then as the agent explores."""
        progress = self.state.progress
        self.agent.set_progress(progress.agent_steps)
        if progress.agent_steps < self.settings.random_steps:
            action = self.random_actions()
        else:
            observation = as_observation(self.observation, self.device)
            action, self.agent_state, _ = self.agent.act(
                observation, self.agent_state, explore=True
            )
        return Choice(action, sent=action)

    def random_actions(self) -> np.ndarray:
        """Return what is done before learning starts: uniform actions, [N, ...]."""
        shape = self.envs.action_space.shape
        assert shape is not None
        return self.random.uniform(-1, 1, shape).astype(np.float32)

    def learn_meanwhile(self) -> None:
        """Take the updates that are due."""
        settings = self.agent.replay_settings
        while self.state.update_debt >= 1 and len(self.replay) > settings.n_step:
            self.metrics.append(self.agent.update(self.batch()))
            self.state.update_debt -= 1
            self.state.progress.gradient_updates += 1

    def batch(self) -> Batch:
        """Draw what the agent learns from next."""
        settings = self.agent.replay_settings
        steps: dict[str, Any] = {"n_step": settings.n_step, "discount": settings.discount}
        if self.mixture is None:
            return self.replay.sample(settings.batch_size, **steps)
        return self.mixture.sample(self.replay, settings.batch_size, **steps)

    def own_parts(self, *, environments: bool) -> dict[str, Any]:
        """See `RunLoop.own_parts`."""
        parts = super().own_parts(environments=environments)
        return parts if self.mixture is None else parts | {"mixture": self.mixture.get_state()}

    def set_own_parts(self, parts: Mapping[str, Any]) -> None:
        """See `RunLoop.set_own_parts`."""
        super().set_own_parts(parts)
        if self.mixture is not None:
            self.mixture.set_state(parts["mixture"])

    def learn_afterwards(self) -> None:
        """Owe the updates of this step, to be taken during the next."""
        if self.state.progress.agent_steps >= self.settings.random_steps:
            self.state.update_debt += self.settings.updates_per_step * self.envs.num_envs


class Teacher(Protocol):
    """Who says what it would do, as `agents.policy.Actor` does."""

    state: Any

    def act(self, observation: Any) -> np.ndarray:
        """Return actions for a batch of observations as the environments gave them."""
        ...

    def begin(self, begins: np.ndarray | None = None) -> None:
        """Forget the episodes before, where bool [N] says that new ones begin; all for None."""
        ...


class OnPolicyLoop(TrainingLoop):
    """Learns from whole rollouts, one after the other.

    Attributes:
        teacher: its actions are stored beside the agent's; to be set before the loop begins or resumes.
    """

    remedy = "lower --learning-rate or --epochs"
    agent: OnPolicyAgent
    replay: Rollout
    teacher: Teacher | None = None

    def choose(self) -> Choice:
        """Act as the agent explores; what leaves the range of the actions is cut off on the way only."""
        self.agent.set_progress(self.state.progress.agent_steps)
        observation = as_observation(self.observation, self.device)
        action, self.agent_state, extras = self.agent.act(
            observation, self.agent_state, explore=True
        )
        advice: dict[str, Any] = {}
        if self.teacher is not None:
            advice[TEACHER_ACTION] = self.teacher.act(self.observation)
            action, self.agent_state = self.agent.follow(
                action, self.agent_state, advice[TEACHER_ACTION], extras
            )
        space = self.envs.action_space
        is_bounded = isinstance(space, gym.spaces.Box)
        sent = np.clip(action, space.low, space.high) if is_bounded else action  # type: ignore[attr-defined]
        kept = {name: value.cpu() for name, value in extras.items()} | advice
        return Choice(action, sent, kept)

    def get_memories(self) -> dict[str, Any]:
        """Return what agent and teacher remember."""
        if self.teacher is None or self.teacher.state is None:
            return super().get_memories()
        return super().get_memories() | {"teacher": self.teacher.state}

    def set_memories(self, memories: Mapping[str, Any]) -> None:
        """Restore what agent and teacher remember."""
        super().set_memories(memories)
        if self.teacher is not None:
            self.teacher.state = on_device(memories.get("teacher"), self.device)

    def begin_episodes(self, begins: np.ndarray) -> None:
        """Let agent and teacher forget."""
        super().begin_episodes(begins)
        if self.teacher is not None:
            self.teacher.begin(begins)

    def learn_afterwards(self) -> None:
        """Learn when the rollout is full, and begin the next."""
        if not self.replay.is_full:
            return
        self.metrics.append(self.agent.update(self.replay.experience()))
        self.state.progress.gradient_updates = self.agent.gradient_updates
        self.replay.clear()
