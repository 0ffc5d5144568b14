"""What every training loop shares, whatever its steps are: log, evaluate, save, resume, stop at what is not finite."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from agents.core.agent import Learner
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import DivergedError, UserError
from agents.core.logging import Logger, Progress
from agents.core.replay import Replay


@dataclass(frozen=True)
class LoopSettings:
    """How long and how often."""

    steps: int = 500_000
    """Agent steps in all, over all environments; with --resume, the new total."""
    log_every: int = 500
    """Agent steps between lines of metrics; metrics stay on the device between."""
    eval_every: int = 10_000
    """Agent steps between evaluations on the training task; 0 for none."""
    eval_episodes: int = 5
    """Episodes per such evaluation."""
    checkpoint_every: int = 10_000
    """Agent steps between checkpoints (one is always saved at the end)."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides the best."""
    exact_resume: bool = True
    """Keep the environments' states in checkpoints; without, a resumed run begins new episodes (for tasks whose state
    cannot be read)."""

    def __post_init__(self) -> None:
        """Reject values that no loop can run with."""
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "eval_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if not self.eval_every >= 0:
            raise UserError(f"eval_every is {self.eval_every}; give 0 or more")


@dataclass
class LoopState:
    """What the loop itself must remember between checkpoints."""

    progress: Progress = field(default_factory=Progress)
    update_debt: float = 0.0
    best_return: float = -math.inf
    episodes: int = 0
    dropped: int = 0  # transitions that were thrown away with a worker that died or hung

    def to_tree(self) -> dict[str, Any]:
        """Return the state as a tree."""
        return {name: value for name, value in vars(self).items() if name != "progress"}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], progress: Mapping[str, Any]) -> LoopState:
        """Rebuild a state."""
        return cls(progress=Progress(**progress), **tree)


@dataclass
class Hooks:
    """What a script adds to the loop.

    Attributes:
        evaluate: returns scalars by tag; the one that ends in the loop's `best_by` picks the best checkpoint.
        render_seconds: total time that the environments spent rendering.
        stop: asked after every step; True saves and returns.
        line: prints one line for a person (progress bars permitting).
    """

    evaluate: Callable[[Progress], Mapping[str, float]] | None = None
    render_seconds: Callable[[], float] | None = None
    stop: Callable[[], bool] = lambda: False
    line: Callable[[str], None] = tqdm.write


class RunLoop(ABC):
    """Takes steps until there are enough of them, and keeps a run folder of it.

    Args:
        agent: learns.
        settings: how long and how often.
        logger: where numbers go.
        checkpoints: where checkpoints go.
        hooks: evaluation, timing and stopping.

    Attributes:
        unit: what a step is called in messages.
        remedy: what helps when numbers are not finite.
        best_by: how the tag of an evaluation's number ends that picks the best checkpoint.
        store: experience that is saved with every checkpoint; None where there is none.
    """

    unit: ClassVar[str] = "agent step"
    remedy: str = "lower a learning rate, or use --precision fp32"
    best_by: ClassVar[str] = "/return_mean"
    store: Replay | None = None

    def __init__(
        self,
        agent: Learner,
        settings: LoopSettings,
        *,
        logger: Logger,
        checkpoints: CheckpointStore,
        hooks: Hooks | None = None,
    ) -> None:
        self.agent, self.settings = agent, settings
        self.logger, self.checkpoints = logger, checkpoints
        self.hooks = hooks or Hooks()
        self.device = next(iter(agent.networks().values())).parameters().__next__().device
        self.state = LoopState()
        self.metrics: list[dict[str, Tensor]] = []
        self._saved = -1  # steps of the newest checkpoint
        self._begun = False

    # ------------------------------------------------------------------------- what a loop fills in

    @property
    def stride(self) -> int:
        """Steps that one `_step` counts."""
        return 1

    @abstractmethod
    def start(self) -> None:
        """Prepare the first step of a new run."""

    @abstractmethod
    def _step(self) -> None:
        """Take one step, count it, and learn what is due."""

    @abstractmethod
    def own_parts(self, *, environments: bool) -> dict[str, Any]:
        """Return what a checkpoint holds beside agent and counters; environments' states only if asked for."""

    @abstractmethod
    def set_own_parts(self, parts: Mapping[str, Any]) -> None:
        """Restore `own_parts` from a checkpoint's parts."""

    def unlogged(self) -> dict[str, Any]:
        """Return what the next line of metrics averages over, beside the metrics."""
        return {}

    def set_unlogged(self, unlogged: Mapping[str, Any]) -> None:  # noqa: B027 - nothing by default
        """Restore `unlogged`."""

    @abstractmethod
    def numbers(self, seconds: float, steps: int) -> dict[str, float]:
        """Return what a line of metrics tells beside the agent's, of the steps since the last one, and forget it."""

    @abstractmethod
    def line(self, values: Mapping[str, float], minutes_left: float) -> str:
        """Return what a person reads of a line of metrics."""

    def postfix(self, values: Mapping[str, float]) -> str:
        """Return what stands behind the progress bar."""
        return ""

    def evaluation_line(self, values: Mapping[str, float]) -> str:
        """Return what a person reads of an evaluation."""
        return "  ".join(f"{k.removeprefix('eval/')} {v:.1f}" for k, v in values.items())

    # ----------------------------------------------------------------------------- what is the same

    def begin(self) -> None:
        """Begin a new run: see `start`."""
        self.start()
        self._begun = True

    def resume(self, parts: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's parts, after the checkpoint store has restored the experience."""
        self.agent.load_state_dict(parts["agent"])
        self.state = LoopState.from_tree(parts["loop"], parts["progress"])
        if "unlogged" in parts:  # what the next line of metrics averages over; once it was not kept
            unlogged = parts["unlogged"]
            self.metrics = [
                {name: value}
                for name, values in unlogged["metrics"].items()
                for value in values.to(self.device)
            ]
            self.set_unlogged(unlogged)
        self._saved = self.state.progress.agent_steps
        self.set_own_parts(parts)
        self._begun = True

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint that --resume goes on from."""
        return self._saved >= 0

    def run(self) -> LoopState:
        """Train until `settings.steps` (or until asked to stop), save, and return the state.

        Raises:
            DivergedError: a number is not finite; the text also says what is kept.
        """
        try:
            return self._run()
        except DivergedError as error:
            kept = (
                ", the last checkpoint is kept"
                if self.has_checkpoint
                else " before its first checkpoint"
            )
            raise DivergedError(f"{error.what}; training stops{kept}", error.remedy) from error

    def _run(self) -> LoopState:
        progress, settings = self.state.progress, self.settings
        if not self._begun:
            self.begin()
        self._log_mark = (time.perf_counter(), progress.agent_steps, self._rendered())
        self._started = time.perf_counter() - progress.wall_seconds
        bar = tqdm(
            total=settings.steps,
            initial=progress.agent_steps,
            unit="step",
            disable=None,
            smoothing=0.05,
        )
        while progress.agent_steps < settings.steps and not self.hooks.stop():
            try:
                self._step()
            except UserError:
                # Such as a video that cannot be read: the environments are in the middle of a step.
                if self._saved != progress.agent_steps:
                    self.save(environments=False)
                raise
            progress.wall_seconds = time.perf_counter() - self._started
            bar.update(progress.agent_steps - bar.n)
            # The last line comes before the last checkpoint: what is in it must not be counted again after a resume
            # with more steps. A run that is asked to stop writes none: its next line is whole when it goes on.
            if self._due(settings.log_every) or progress.agent_steps >= settings.steps:
                self._log(bar)
            if settings.eval_every and self._due(settings.eval_every):
                self._evaluate()
            if self._due(settings.checkpoint_every):
                self.save()
        if self._saved != progress.agent_steps:
            self.save()
        bar.close()
        return self.state

    def save(self, *, environments: bool = True) -> None:
        """Write a checkpoint; a state that is not finite is never written.

        Args:
            environments: keep their states too, if the settings say so; without, a resumed run begins new episodes.
        """
        self._check_finite()
        self.logger.flush()
        parts = {
            "agent": self.agent.state_dict(),
            "progress": vars(self.state.progress).copy(),
            "loop": self.state.to_tree(),
            "unlogged": {"metrics": self._stacked_metrics(), **self.unlogged()},
            **self.own_parts(environments=environments),
        }
        self.checkpoints.save(self.state.progress.agent_steps, parts, self.store)
        self._saved = self.state.progress.agent_steps

    def _due(self, every: int) -> bool:
        """Whether this step passed a multiple of `every`."""
        steps = self.state.progress.agent_steps
        return steps // every > (steps - self.stride) // every

    def _read_metrics(self) -> dict[str, float]:
        """Average the metrics since the last call: the one place where they leave the device."""
        means = {name: values.mean() for name, values in self._stacked_metrics().items()}
        values = torch.stack(list(means.values())).tolist() if means else []
        self.metrics.clear()
        return dict(zip(means, values, strict=True))

    def _stacked_metrics(self) -> dict[str, Tensor]:
        """Return every metric's values since the last logged line, float32 [updates that gave it]."""
        names = {name for metrics in self.metrics for name in metrics}
        return {
            name: torch.stack([m[name].float() for m in self.metrics if name in m])
            for name in sorted(names)
        }

    def _check_finite(self) -> None:
        """Refuse an agent that has diverged, and name the first metric since the last line that shows it."""
        stacked = self._stacked_metrics().items()
        if bad := [name for name, values in stacked if not torch.isfinite(values).all()]:
            name, value = next(
                (name, float(metrics[name]))
                for metrics in self.metrics
                for name in metrics
                if name in bad and not torch.isfinite(metrics[name])
            )
            steps = self.state.progress.agent_steps
            raise DivergedError(f"{name} is {value} at {self.unit} {steps}", self.remedy)
        for name, network in self.agent.networks().items():
            for key, tensor in network.state_dict().items():
                if not torch.isfinite(tensor).all():
                    raise DivergedError(f"{name}.{key} is not finite", self.remedy)

    def _log(self, bar: tqdm) -> None:
        progress = self.state.progress
        values = self._read_metrics()
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at {self.unit} {progress.agent_steps}", self.remedy
                )
        clock, rendered = time.perf_counter(), self._rendered()
        seconds = max(clock - self._log_mark[0], 1e-9)
        steps = max(progress.agent_steps - self._log_mark[1], 1)
        values |= self.numbers(seconds, steps)
        if postfix := self.postfix(values):
            bar.set_postfix_str(postfix)
        self.logger.scalars(values, progress)
        self.logger.flush()
        if bar.disable:
            left = (self.settings.steps - progress.agent_steps) * seconds / steps
            self.hooks.line(self.line(values, left / 60))
        self._log_mark = (clock, progress.agent_steps, rendered)

    def _evaluate(self) -> None:
        if self.hooks.evaluate is None:
            return
        progress, clock = self.state.progress, time.perf_counter()
        values = self.hooks.evaluate(progress)
        self.logger.scalars(values, progress)
        score = max((v for k, v in values.items() if k.endswith(self.best_by)), default=-math.inf)
        if score > self.state.best_return:
            self._check_finite()
            self.state.best_return = score
            weights = {
                "agent": self.agent.state_dict(weights_only=True),
                "progress": vars(progress).copy(),
            }
            self.checkpoints.save_best(progress.agent_steps, weights)
        self.hooks.line(
            f"step {progress.agent_steps:>8,}  evaluation: {self.evaluation_line(values)}"
        )
        # Training speed is reported without the time that evaluation took.
        mark, steps, rendered = self._log_mark
        self._log_mark = (mark + time.perf_counter() - clock, steps, rendered)

    def _rendered(self) -> float:
        return self.hooks.render_seconds() if self.hooks.render_seconds else 0.0
