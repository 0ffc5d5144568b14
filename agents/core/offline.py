"""Learning from data that is there already: gradient steps instead of environment steps."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agents.core.agent import Agent
from agents.core.checkpoints import CheckpointStore
from agents.core.demonstrations import Demonstrations
from agents.core.logging import Logger
from agents.core.run_loop import Hooks, LoopSettings, RunLoop


class OfflineAgent(Agent):
    """An agent that learns from demonstrations; `update` takes a `demonstrations.ChunkBatch`.

    Attributes:
        horizon: H, actions that it predicts.
        executed: h, actions of a chunk that an environment takes before it is seen again.
    """

    horizon: int
    executed: int

    @abstractmethod
    def prepare(self, demonstrations: Demonstrations) -> None:
        """Take what the agent must know of the data as a whole, such as ranges; once, before the first update."""


@dataclass(frozen=True)
class OfflineSettings(LoopSettings):
    """How long and how often, without environments that are learned from."""

    steps: int = 20_000
    """Gradient steps in all; with --resume, the new total."""
    log_every: int = 500
    """Gradient steps between lines of metrics; metrics stay on the device between."""
    eval_every: int = 5_000
    """Gradient steps between evaluations on the task; 0 for none."""
    eval_episodes: int = 10
    """Episodes per such evaluation."""
    checkpoint_every: int = 5_000
    """Gradient steps between checkpoints (one is always saved at the end)."""


class OfflineLoop(RunLoop):
    """Learns from demonstrations alone.

    Its steps are gradient steps, and `Progress.agent_steps` counts them too: logs, checkpoints and reports of all runs
    go by that number. No frame is counted.

    Args:
        agent: learns.
        demonstrations: what from.
        settings: how long and how often.
        logger: where numbers go.
        checkpoints: where checkpoints go; the demonstrations stay in their data set.
        hooks: evaluation, timing and stopping.
    """

    unit = "gradient step"
    remedy = "lower --learning-rate"
    agent: OfflineAgent

    def __init__(
        self,
        agent: OfflineAgent,
        demonstrations: Demonstrations,
        settings: LoopSettings,
        *,
        logger: Logger,
        checkpoints: CheckpointStore,
        hooks: Hooks | None = None,
    ) -> None:
        super().__init__(agent, settings, logger=logger, checkpoints=checkpoints, hooks=hooks)
        self.demonstrations = demonstrations
        self._seconds = {"sample": 0.0, "update": 0.0}

    def start(self) -> None:
        """Let the agent look at all the data."""
        self.agent.prepare(self.demonstrations)

    def own_parts(self, *, environments: bool) -> dict[str, Any]:
        """See `RunLoop.own_parts`."""
        return {"demonstrations": self.demonstrations.get_state()}

    def set_own_parts(self, parts: Mapping[str, Any]) -> None:
        """See `RunLoop.set_own_parts`."""
        self.demonstrations.set_state(parts["demonstrations"])

    def _step(self) -> None:
        progress = self.state.progress
        self.agent.set_progress(progress.agent_steps)
        clock = time.perf_counter()
        batch = self.demonstrations.sample(self.agent.replay_settings.batch_size)
        sampled = time.perf_counter()
        self.metrics.append(self.agent.update(batch))
        self._seconds["sample"] += sampled - clock
        self._seconds["update"] += time.perf_counter() - sampled
        progress.gradient_updates += 1
        progress.agent_steps += 1

    def numbers(self, seconds: float, steps: int) -> dict[str, float]:
        """See `RunLoop.numbers`."""
        values = {
            "time/steps_per_second": steps / seconds,
            "time/sample_ms": 1000 * self._seconds["sample"] / steps,
            "time/update_ms": 1000 * self._seconds["update"] / steps,
            "data/epochs": self.state.progress.gradient_updates
            * self.agent.replay_settings.batch_size
            / len(self.demonstrations),
        }
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return values

    def postfix(self, values: Mapping[str, float]) -> str:
        """See `RunLoop.postfix`."""
        return "  ".join(f"{k.removeprefix('loss/')} {v:.4f}" for k, v in _losses(values).items())

    def line(self, values: Mapping[str, float], minutes_left: float) -> str:
        """See `RunLoop.line`."""
        return (
            f"step {self.state.progress.agent_steps:>8,}  {self.postfix(values)}  "
            f"{values['time/steps_per_second']:6.1f} steps/s  {minutes_left:5.1f} min left"
        )


def _losses(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith("loss/")}
