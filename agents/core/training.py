"""What all training loops share: step, store, log, evaluate, save, resume exactly.

How an action is chosen and when an agent learns is each loop's own, see `agents.core.loops`.
"""

from __future__ import annotations

import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from tqdm import tqdm

from agents.core.agent import Agent
from agents.core.checkpoints import CheckpointStore, save_tree
from agents.core.errors import DivergedError, NotFiniteError, UserError
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


@dataclass(frozen=True)
class Choice:
    """What every environment is to do next."""

    action: np.ndarray
    """[N, ...], as the store keeps it."""
    sent: np.ndarray
    """The same as the environments take it."""
    extras: Mapping[str, Any] | None = None
    """What the store keeps beside it."""


@dataclass
class Hooks:
    """What a script adds to the loop.

    Attributes:
        evaluate: returns scalars by tag; the one that ends in `/return_mean` picks the best checkpoint.
        render_seconds: total time that the environments spent rendering.
        stop: asked after every step; True saves and returns.
        line: prints one line for a person (progress bars permitting).
    """

    evaluate: Callable[[Progress], Mapping[str, float]] | None = None
    render_seconds: Callable[[], float] | None = None
    stop: Callable[[], bool] = lambda: False
    line: Callable[[str], None] = tqdm.write


class TrainingLoop(ABC):
    """Trains an agent on a vector environment.

    Attributes:
        without_state: what to do where environments' states cannot be read.

    Args:
        agent: acts and learns.
        envs: same-step autoreset, with `get_state` / `set_state`.
        replay: the store that steps go to, of the same spaces and number of environments.
        settings: how long and how often.
        logger: where numbers go.
        checkpoints: where checkpoints go.
        action_repeat: control steps per agent step, to count frames; `final_info["control_steps"]` corrects the
            last one of an episode.
        seed: of the first reset and of the random actions.
        hooks: evaluation, timing and stopping.
    """

    without_state = (
        "add --no-exact-resume: they then hold everything else, and --resume begins new episodes"
    )

    def __init__(
        self,
        agent: Agent,
        envs: VectorEnv,
        replay: Replay,
        settings: LoopSettings,
        *,
        logger: Logger,
        checkpoints: CheckpointStore,
        action_repeat: int,
        seed: int,
        hooks: Hooks | None = None,
    ) -> None:
        self.agent, self.envs, self.replay = agent, envs, replay
        self.settings, self.logger, self.checkpoints = settings, logger, checkpoints
        self.action_repeat = action_repeat
        self.hooks = hooks or Hooks()
        self.device = next(iter(agent.networks().values())).parameters().__next__().device
        self.state = LoopState()
        self.random = np.random.default_rng(seed)
        self.seed = seed
        self.observation: Any = None
        self.agent_state: Any = None  # what `act` is given next
        self._saved = -1  # agent steps of the newest checkpoint
        self.metrics: list[dict[str, Tensor]] = []
        self._returns: list[float] = []
        self._lengths: list[float] = []
        self._seconds = {"environment": 0.0, "update": 0.0, "act": 0.0}

    def resume(self, parts: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's parts, after the checkpoint store has restored the replay."""
        self.agent.load_state_dict(parts["agent"])
        self.state = LoopState.from_tree(parts["loop"], parts["progress"])
        self.random.bit_generator.state = parts["random"]
        if "unlogged" in parts:  # what the next line of metrics averages over; once it was not kept
            unlogged = parts["unlogged"]
            self._returns, self._lengths = unlogged["returns"], unlogged["lengths"]
            self.metrics = [
                {name: value}
                for name, values in unlogged["metrics"].items()
                for value in values.to(self.device)
            ]
        self._saved = steps = self.state.progress.agent_steps
        if self.settings.exact_resume and "environments" in parts:
            self.envs.set_state(parts["environments"])  # type: ignore[attr-defined]
            self.observation = parts["observation"]
            self.set_memories(parts.get("memories", {}))
        else:  # other episodes than the earlier parts of the run began with
            self._reset(int(np.random.SeedSequence((self.seed, steps)).generate_state(1)[0]))

    def begin(self) -> None:
        """Begin the first episodes, and make sure that checkpoints can be written later.

        Raises:
            UserError: the environments' states cannot be read, which checkpoints need.
        """
        self._reset(self.seed)
        if self.settings.exact_resume:
            self._check_state()

    def _reset(self, seed: int) -> None:
        self.observation, _ = self.envs.reset(seed=seed)
        self.set_memories({})
        with self._names_the_step():
            self.replay.start(self.observation)

    @contextmanager
    def _names_the_step(self) -> Iterator[None]:
        """Say at which step an environment gave what is not finite."""
        try:
            yield
        except NotFiniteError as error:
            raise DivergedError(
                f"{error} at agent step {self.state.progress.agent_steps}; training stops, the last checkpoint is "
                "kept (mend the task, or begin new episodes from there: --resume with --no-exact-resume)"
            ) from error

    def _check_state(self) -> None:
        """Save and restore the environments' states once: without them the first checkpoint would fail, hours later.

        Any error is caught: what third parties raise is theirs to choose.
        """
        try:
            state = self.envs.get_state()  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory() as folder:
                save_tree(folder, "environments", state)
            self.envs.set_state(state)  # type: ignore[attr-defined]
        except Exception as error:
            said = " ".join(str(error).split())
            why = said if hasattr(error, "exit_code") else f"{type(error).__name__}: {said}"
            raise UserError(
                f"checkpoints cannot keep the state of this task ({why}); {self.without_state}"
            ) from error

    def run(self) -> LoopState:
        """Train until `settings.steps` (or until asked to stop), save, and return the state."""
        progress, settings = self.state.progress, self.settings
        if self.observation is None:
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
            "random": self.random.bit_generator.state,
            "unlogged": {
                "metrics": self._stacked_metrics(),
                "returns": self._returns,
                "lengths": self._lengths,
            },
        }
        if environments and self.settings.exact_resume:
            parts["environments"] = self.envs.get_state()  # type: ignore[attr-defined]
            parts["observation"] = self.observation
            parts |= self.further_parts()
            if memories := self.get_memories():
                parts["memories"] = memories
        self.checkpoints.save(self.state.progress.agent_steps, parts, self.replay)
        self._saved = self.state.progress.agent_steps

    def get_memories(self) -> dict[str, Tensor]:
        """Return by name what those who act remember of the episodes that are going on; nothing where they do not."""
        return {} if self.agent_state is None else {"agent": self.agent_state}

    def set_memories(self, memories: Mapping[str, Tensor]) -> None:
        """Restore what `get_memories` returned; nothing where all episodes begin."""
        state = memories.get("agent")
        self.agent_state = None if state is None else state.to(self.device)

    def begin_episodes(self, begins: np.ndarray) -> None:
        """Forget the episodes before, where bool [N] says that new ones begin."""
        self.agent_state = self.agent.reset_state(self.agent_state, begins)

    @abstractmethod
    def choose(self) -> Choice:
        """Choose what every environment does next."""

    def beside(self, choice: Choice, info: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return what the store keeps beside a step, now that the environments' infos about it are there."""
        return choice.extras

    def further_parts(self) -> dict[str, Any]:
        """Return what checkpoints keep beside the environments' states, by name."""
        return {}

    def learn_meanwhile(self) -> None:  # noqa: B027 - nothing to do by default
        """Learn while the environments step."""

    def learn_afterwards(self) -> None:  # noqa: B027 - nothing to do by default
        """Learn when their step is stored."""

    def _step(self) -> None:
        """Take one step in every environment, and the updates that are due."""
        progress = self.state.progress
        clock = time.perf_counter()
        choice = self.choose()
        if not np.isfinite(choice.action).all():
            raise DivergedError(
                f"the agent's action is not finite at agent step {progress.agent_steps}; training stops, the last "
                "checkpoint is kept (lower a learning rate, or use --precision fp32)"
            )
        self._seconds["act"] += time.perf_counter() - clock
        clock = time.perf_counter()
        self.envs.step_async(choice.sent)  # type: ignore[attr-defined]
        sent = time.perf_counter()
        self.learn_meanwhile()
        learned = time.perf_counter()
        observation, reward, terminated, truncated, info = self.envs.step_wait()  # type: ignore[attr-defined]
        self._seconds["update"] += learned - sent
        self._seconds["environment"] += time.perf_counter() - learned + sent - clock
        dropped = info.get("dropped")
        with self._names_the_step():
            self.replay.add(
                choice.action, reward, terminated, truncated, observation, info.get("final_obs"),
                dropped, self.beside(choice, info),
            )  # fmt: skip
        self.state.dropped += 0 if dropped is None else int(np.sum(dropped))
        self.observation = observation
        ended = np.asarray(terminated | truncated)
        self.begin_episodes(ended if dropped is None else ended | dropped)
        progress.agent_steps += self.envs.num_envs
        progress.env_frames += self.envs.num_envs * self.action_repeat
        if "episode" in info:
            progress.env_frames -= self._left_out(info)
            ended = np.flatnonzero(info["_episode"])
            self._returns += [float(info["episode"]["r"][i]) for i in ended]
            self._lengths += [float(info["episode"]["l"][i]) for i in ended]
            self.state.episodes += len(ended)
        clock = time.perf_counter()
        self.learn_afterwards()
        self._seconds["update"] += time.perf_counter() - clock

    def _left_out(self, info: Mapping[str, Any]) -> int:
        """Return the control steps that ends of episodes kept from being taken, where the environments say so."""
        final = info.get("final_info", {})
        if "control_steps" not in final:
            return 0
        taken = final["control_steps"][final["_control_steps"]]
        return int(np.sum(self.action_repeat - taken))

    def _due(self, every: int) -> bool:
        """Whether this step passed a multiple of `every`."""
        steps = self.state.progress.agent_steps
        return steps // every > (steps - self.envs.num_envs) // every

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
        """Refuse to save an agent that has diverged."""
        steps = self.state.progress.agent_steps
        for name, values in self._stacked_metrics().items():
            if not (finite := torch.isfinite(values)).all():
                bad = values[~finite][0]
                raise DivergedError(
                    f"{name} is {bad} at agent step {steps}; the last checkpoint is kept"
                )
        for name, network in self.agent.networks().items():
            for key, tensor in network.state_dict().items():
                if not torch.isfinite(tensor).all():
                    raise DivergedError(f"{name}.{key} is not finite; the last checkpoint is kept")

    def _log(self, bar: tqdm) -> None:
        progress = self.state.progress
        values = self._read_metrics()
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at agent step {progress.agent_steps}; training stops, the last "
                    "checkpoint is kept (lower a learning rate, or use --precision fp32)"
                )
        clock, rendered = time.perf_counter(), self._rendered()
        seconds = max(clock - self._log_mark[0], 1e-9)
        steps = max(progress.agent_steps - self._log_mark[1], 1)
        values |= {
            "time/steps_per_second": steps / seconds,
            "time/fps": steps * self.action_repeat / seconds,
            "time/env_ms": 1000 * self._seconds["environment"] / steps,
            "time/render_ms": 1000 * (rendered - self._log_mark[2]) / steps,
            "time/update_ms": 1000 * self._seconds["update"] / steps,
            "time/act_ms": 1000 * self._seconds["act"] / steps,
            "replay/transitions": float(len(self.replay)),
        }
        if self._returns:
            values["train/episode_return"] = float(np.mean(self._returns))
            values["train/episode_length"] = float(np.mean(self._lengths))
            bar.set_postfix_str(f"return {values['train/episode_return']:.1f}")
        if failures := getattr(self.envs, "worker_failures", 0):
            values["environments/worker_failures"] = float(failures)
        if self.state.dropped:
            values["environments/dropped_transitions"] = float(self.state.dropped)
        self.logger.scalars(values, progress)
        self.logger.flush()
        if bar.disable:
            self._print_line(values)
        self._returns, self._lengths = [], []
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._log_mark = (clock, progress.agent_steps, rendered)

    def _print_line(self, values: Mapping[str, float]) -> None:
        progress = self.state.progress
        left = (self.settings.steps - progress.agent_steps) / values["time/steps_per_second"]
        episode = values.get("train/episode_return")
        shown = "      -" if episode is None else f"{episode:7.1f}"
        self.hooks.line(
            f"step {progress.agent_steps:>8,}  updates {progress.gradient_updates:>8,}  "
            f"return {shown}  {values['time/fps']:6.0f} frames/s  {left / 60:5.1f} min left"
        )

    def _evaluate(self) -> None:
        if self.hooks.evaluate is None:
            return
        progress, clock = self.state.progress, time.perf_counter()
        values = self.hooks.evaluate(progress)
        self.logger.scalars(values, progress)
        score = max((v for k, v in values.items() if k.endswith("/return_mean")), default=-math.inf)
        if score > self.state.best_return:
            self._check_finite()
            self.state.best_return = score
            weights = {
                "agent": self.agent.state_dict(weights_only=True),
                "progress": vars(progress).copy(),
            }
            self.checkpoints.save_best(progress.agent_steps, weights)
        self.hooks.line(
            f"step {progress.agent_steps:>8,}  evaluation: "
            + "  ".join(f"{k.removeprefix('eval/')} {v:.1f}" for k, v in values.items())
        )
        # Training speed is reported without the time that evaluation took.
        mark, steps, rendered = self._log_mark
        self._log_mark = (mark + time.perf_counter() - clock, steps, rendered)

    def _rendered(self) -> float:
        return self.hooks.render_seconds() if self.hooks.render_seconds else 0.0
