"""The loop that fine-tunes a generator: iterations, evaluations by the monitor, and a stop where it says so.

Of several processes (`agents.core.ranks`) all run it, step by step together: what one of them is asked, or the first
one's monitor decides, is done by all after the same iteration. A checkpoint holds the random state of each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.logging import Logger
from agents.core.memory import memory_errors_named
from agents.core.run_loop import Hooks, LoopSettings, LoopState, RunLoop
from agents.generative_models.generator import PART
from agents.generative_models.monitor import Monitor
from agents.generative_models.tuner import GeneratorTuner

LESS_MEMORY = (
    "lower --batch-size (images in a pass) first, then --group, --prompts or --denoising-steps; "
    "--checkpoint-activations helps reward gradients; --gradient-checkpointing, --precision bf16 and a smaller "
    "--image-size pipelines; fewer --kl-images, --eval-images and --eval-prompts evaluations"
)
"""What to do where memory does not suffice."""


@dataclass(frozen=True)
class TuningSettings(LoopSettings):
    """How long and how often."""

    steps: int = 100
    """Iterations in all, each of `prompts` times `group` images; with --resume, the new total."""
    log_every: int = 1
    """Iterations between lines of metrics."""
    eval_every: int = 10
    """Iterations between evaluations by the monitor, which is always on; it measures the base and the end, too."""
    checkpoint_every: int = 10
    """Iterations between checkpoints (one is always saved at the end)."""
    max_evaluations: int = 0
    """Samples through a denoiser that training may spend: the run ends where another iteration as dear as the dearest
    so far would go over them, so that its first is never refused; 0 for no end. Methods compare at equal ones."""
    max_rewards: int = 0
    """Images that training's reward may see; the run ends in the same way."""

    def __post_init__(self) -> None:
        """Reject values that no run can have; a run without its monitor among them."""
        super().__post_init__()
        for name in ("max_evaluations", "max_rewards"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.eval_every < 1:
            raise UserError(f"eval_every is {self.eval_every}; give a positive number")


class PromptStream:
    """Prompts in random order, all of them before any comes again.

    Args:
        prompts: at least one.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        if not prompts:
            raise UserError("there are no prompts to train on; give some")
        self.prompts = list(prompts)
        self.random = np.random.default_rng(seed)
        self._left: list[int] = []

    def take(self, count: int) -> list[str]:
        """Return the next prompts."""
        while len(self._left) < count:
            self._left += self.random.permutation(len(self.prompts)).tolist()
        chosen, self._left = self._left[:count], self._left[count:]
        return [self.prompts[place] for place in chosen]

    def get_state(self) -> dict[str, Any]:
        """Return where it is."""
        return {"random": self.random.bit_generator.state, "left": list(self._left)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore `get_state`."""
        self.random.bit_generator.state = state["random"]
        self._left = list(state["left"])


class TuningLoop(RunLoop):
    """Fine-tunes a generator.

    Args:
        tuner: learns.
        prompts: what it draws.
        monitor: measures.
        settings: how long and how often.
        logger: where numbers go.
        checkpoints: where checkpoints go.
        hooks: `evaluate` calls the monitor.

    Attributes:
        stopped: why the monitor ended the run, if it did.
    """

    unit = "iteration"
    best_by = "/gold"
    agent: GeneratorTuner
    settings: TuningSettings

    def __init__(
        self,
        tuner: GeneratorTuner,
        prompts: PromptStream,
        monitor: Monitor,
        settings: TuningSettings,
        *,
        logger: Logger,
        checkpoints: CheckpointStore,
        hooks: Hooks,
    ) -> None:
        super().__init__(tuner, settings, logger=logger, checkpoints=checkpoints, hooks=hooks)
        self.prompts, self.monitor = prompts, monitor
        self.stopped: str | None = None
        self._images = 0
        self._dearest = (0, 0)  # what an iteration has cost at most, as `_spent`
        self.remedy = "lower --learning-rate"
        if "kl" in tuner.config.fields_read():
            self.remedy += ", or raise --kl"

    def run(self) -> LoopState:
        """See `RunLoop.run`; it ends, too, when the monitor says so."""
        if self.stopped:
            self.hooks.line(
                f"the monitor has stopped this run: {self.stopped}; --resume with another value of that flag goes on"
            )
        ranks, asked = self.agent.ranks, self.hooks.stop
        self.hooks.stop = lambda: any(ranks.each(asked() or self.why_over() is not None))
        ranks.check_alike(torch.stack([p.detach().double().sum() for p in self.agent.parameters]))
        return super().run()

    def why_over(self) -> str | None:
        """Return why the run has ended before all of its iterations, if it has."""
        return self.stopped or self._why_spent()

    def _why_spent(self) -> str | None:
        """Return which budget has no room for another iteration as dear as the dearest so far."""
        for flag, spent, dearest, most in zip(
            ("--max-evaluations", "--max-rewards"),
            self._spent(),
            self._dearest,
            (self.settings.max_evaluations, self.settings.max_rewards),
            strict=True,
        ):
            if most and spent + dearest > most:
                return f"{spent:,} are spent of {flag} {most}"
        return None

    def _spent(self) -> tuple[int, int]:
        """Return the denoiser evaluations and the rewards of training."""
        return self.agent.evaluations, self.agent.scored

    def start(self) -> None:
        """Measure the base."""
        self._log_mark = (time.perf_counter(), 0, 0.0)
        self._evaluate()

    def own_parts(self, *, environments: bool) -> dict[str, Any]:
        """See `RunLoop.own_parts`; the generator is a part of its own, as `load_generator` finds it."""
        with self.agent.averaged() as model:
            tree = model.to_tree()
        parts = {
            "prompts": self.prompts.get_state(),
            "monitor": {"history": self.monitor.get_state()},
            "budget": {"dearest": list(self._dearest)},
            PART: tree,
        }
        if self.agent.ranks.size > 1:
            states = self.agent.ranks.gathered(self.agent.generator.get_state()[None])
            parts["ranks"] = {"generators": list(states)}
        return parts

    def set_own_parts(self, parts: Mapping[str, Any]) -> None:
        """See `RunLoop.set_own_parts`; a run that the monitor has ended stays so unless its settings have changed."""
        ranks, states = self.agent.ranks, parts.get("ranks", {}).get("generators", [None])
        if len(states) != ranks.size:
            way = (
                f"by torchrun --nproc-per-node {len(states)}"
                if len(states) > 1
                else "without torchrun"
            )
            raise UserError(
                f"this run is one of {len(states)} process{'es' * (len(states) > 1)}, and here are {ranks.size}; go on "
                f"with it {way}"
            )
        if ranks.size > 1:
            self.agent.generator.set_state(states[ranks.rank])
        self.prompts.set_state(parts["prompts"])
        self.monitor.set_state(parts["monitor"]["history"])
        self.stopped = self.monitor.why_stop()
        # Older checkpoints do not know: nothing is forecast from before them.
        evaluations, rewards = parts.get("budget", {}).get("dearest", (0, 0))
        self._dearest = evaluations, rewards

    def _step(self) -> None:
        agent, progress, spent = self.agent, self.state.progress, self._spent()
        ranks, updates = agent.ranks, agent.gradient_updates
        before = (self.prompts.get_state(), agent.generator.get_state(), agent.extra_state())
        try:
            with ranks.one_fate(), named_memory_errors():
                self.metrics.append(agent.update(self.prompts.take(agent.config.prompts)))
        except UserError as error:
            # A reward that breaks does so before anything is learned: the iteration is taken back whole, and drawn
            # again when the reward is mended.
            if not any(ranks.each(agent.gradient_updates - updates)):
                self.prompts.set_state(before[0])
                agent.generator.set_state(before[1])
                agent.load_extra_state(before[2])
                raise UserError(f"{error} (the run is saved as it was before)") from error
            raise
        evaluations, rewards = (now - then for now, then in zip(self._spent(), spent, strict=True))
        self._dearest = max(self._dearest[0], evaluations), max(self._dearest[1], rewards)
        self._images += rewards
        progress.agent_steps += 1
        if why := self._why_spent():
            self.hooks.line(f"the budget ends the run: {why}; --resume with more goes on")
        progress.gradient_updates = self.agent.gradient_updates

    def _evaluate(self) -> None:
        spent, steps = self.agent.evaluations, self.state.progress.agent_steps
        try:
            with self.agent.ranks.one_fate(), named_memory_errors():
                super()._evaluate()
        except UserError:  # such as a gold reward that breaks: what is learned is kept
            if 0 < steps != self._saved:
                self.save()
            raise
        self.agent.evaluations = spent  # the budget is training's, as that of rewards is
        self.stopped = self.agent.ranks.told(self.monitor.why_stop())
        if self.stopped:
            self.hooks.line(f"the monitor stops the run: {self.stopped}")

    def _due(self, every: int) -> bool:
        """The end is evaluated and saved, too."""
        is_last = self.state.progress.agent_steps >= self.settings.steps or self._why_spent()
        return super()._due(every) or bool(is_last)

    def numbers(self, seconds: float, steps: int) -> dict[str, float]:
        """See `RunLoop.numbers`."""
        values = {
            "time/seconds_per_iteration": seconds / steps,
            "time/images_per_second": self._images / seconds,
            "budget/denoiser_evaluations": float(self.agent.evaluations),
            "budget/reward_calls": float(self.agent.scored),
        }
        self._images = 0
        return values

    def postfix(self, values: Mapping[str, float]) -> str:
        """See `RunLoop.postfix`."""
        return f"reward {values['reward/mean']:.3f}" if "reward/mean" in values else ""

    def line(self, values: Mapping[str, float], minutes_left: float) -> str:
        """See `RunLoop.line`."""
        shown = [self.postfix(values)]
        shown += [f"outside {values['ratio/outside']:.2f}"] if "ratio/outside" in values else []
        return (
            f"iteration {self.state.progress.agent_steps:>6,}  {'  '.join(shown)}  "
            f"{values['time/images_per_second']:6.1f} images/s  {minutes_left:5.1f} min left"
        )

    def evaluation_line(self, values: Mapping[str, float]) -> str:
        """See `RunLoop.evaluation_line`."""
        return "  ".join(f"{name.removeprefix('eval/')} {v:.3g}" for name, v in values.items())


def named_memory_errors() -> AbstractContextManager[None]:
    """Say which settings to lower where memory does not suffice; see `memory_errors_named`."""
    return memory_errors_named(LESS_MEMORY)
