"""What the training loops that act share: step, store, count episodes, and keep the environments' states.

How an action is chosen and when an agent learns is each loop's own, see `agents.core.loops`; logging, evaluation and
checkpoints are every loop's, see `agents.core.run_loop`.
"""

from __future__ import annotations

import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from agents.core.agent import Agent
from agents.core.checkpoints import CheckpointStore, save_tree
from agents.core.errors import DivergedError, NotFiniteError, UserError
from agents.core.logging import Logger
from agents.core.replay import Replay
from agents.core.run_loop import Hooks, LoopSettings, LoopState, RunLoop
from agents.core.tree_rows import on_device

__all__ = ["Choice", "Hooks", "LoopSettings", "LoopState", "TrainingLoop"]


@dataclass(frozen=True)
class Choice:
    """What every environment is to do next."""

    action: np.ndarray
    """[N, ...], as the store keeps it."""
    sent: np.ndarray
    """The same as the environments take it."""
    extras: Mapping[str, Any] | None = None
    """What the store keeps beside it."""


def successes(info: Mapping[str, Any], ended: np.ndarray) -> np.ndarray | None:
    """Return in which environments a step solved the task, bool [N], or None where it does not tell.

    Args:
        info: of a vector environment's step; with same-step autoreset an episode's last one lies in `final_info`.
        ended: bool [N], whose episode ended with it.
    """
    final = info.get("final_info", {})
    if "success" not in info and "success" not in final:
        return None
    now, last = info.get("success", 0.0), final.get("success", 0.0)
    return np.where(ended, last, now) > 0


class TrainingLoop(RunLoop):
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

    agent: Agent
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
        super().__init__(agent, settings, logger=logger, checkpoints=checkpoints, hooks=hooks)
        self.envs, self.replay = envs, replay
        self.store = replay
        self.action_repeat = action_repeat
        self.random = np.random.default_rng(seed)
        self.seed = seed
        self.observation: Any = None
        self.agent_state: Any = None  # what `act` is given next
        self._returns: list[float] = []
        self._lengths: list[float] = []
        self._successes: list[float] = []
        self._solved = np.zeros(envs.num_envs, bool)  # at some moment of the episode that goes on
        self._seconds = {"environment": 0.0, "update": 0.0, "act": 0.0}

    @property
    def stride(self) -> int:
        """See `RunLoop.stride`."""
        return self.envs.num_envs

    def set_own_parts(self, parts: Mapping[str, Any]) -> None:
        """See `RunLoop.set_own_parts`."""
        self.random.bit_generator.state = parts["random"]
        if self.settings.exact_resume and "environments" in parts:
            self.envs.set_state(parts["environments"])  # type: ignore[attr-defined]
            self.observation = parts["observation"]
            self.set_memories(parts.get("memories", {}))
        else:  # other episodes than the earlier parts of the run began with
            steps = self.state.progress.agent_steps
            self._reset(int(np.random.SeedSequence((self.seed, steps)).generate_state(1)[0]))

    def own_parts(self, *, environments: bool) -> dict[str, Any]:
        """See `RunLoop.own_parts`."""
        parts: dict[str, Any] = {"random": self.random.bit_generator.state}
        if environments and self.settings.exact_resume:
            parts["environments"] = self.envs.get_state()  # type: ignore[attr-defined]
            parts["observation"] = self.observation
            parts |= self.further_parts()
            if memories := self.get_memories():
                parts["memories"] = memories
        return parts

    def get_memories(self) -> dict[str, Any]:
        """Return by name what those who act remember of the episodes that are going on; nothing where they do not."""
        return {} if self.agent_state is None else {"agent": self.agent_state}

    def set_memories(self, memories: Mapping[str, Any]) -> None:
        """Restore what `get_memories` returned; nothing where all episodes begin."""
        self.agent_state = on_device(memories.get("agent"), self.device)

    def begin_episodes(self, begins: np.ndarray) -> None:
        """Forget the episodes before, where bool [N] says that new ones begin."""
        self.agent_state = self.agent.reset_state(self.agent_state, begins)

    def unlogged(self) -> dict[str, Any]:
        """See `RunLoop.unlogged`."""
        return {
            "returns": self._returns,
            "lengths": self._lengths,
            "successes": self._successes,
            "solved": self._solved.tolist(),
        }

    def set_unlogged(self, unlogged: Mapping[str, Any]) -> None:
        """See `RunLoop.set_unlogged`."""
        self._returns, self._lengths = unlogged["returns"], unlogged["lengths"]
        if "solved" in unlogged:  # older checkpoints do not say
            self._successes, self._solved = unlogged["successes"], np.array(unlogged["solved"])

    def start(self) -> None:
        """Begin the first episodes, and make sure that checkpoints can be written later.

        Raises:
            UserError: the environments' states cannot be read, which checkpoints need.
        """
        self._reset(self.seed)
        if self.settings.exact_resume:
            self._check_state()

    def _reset(self, seed: int) -> None:
        self.observation, _ = self.envs.reset(seed=seed)
        self._solved[:] = False
        self.set_memories({})
        with self._names_the_step():
            self.replay.start(self.observation)

    @contextmanager
    def _names_the_step(self) -> Iterator[None]:
        """Say at which step an environment gave what is not finite."""
        try:
            yield
        except NotFiniteError as error:
            remedy = "mend the task"
            if self.has_checkpoint:
                remedy += ", or begin new episodes from there: --resume with --no-exact-resume"
            raise DivergedError(
                f"{error} at agent step {self.state.progress.agent_steps}", remedy
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

    @abstractmethod
    def choose(self) -> Choice:
        """Choose what every environment does next."""

    def beside(self, choice: Choice, info: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return what the store keeps beside a step, now that the environments' infos about it are there."""
        return choice.extras

    def further_parts(self) -> dict[str, Any]:
        """Return what checkpoints keep beside the environments' states, by name."""
        return {}

    def learn_meanwhile(self) -> None:
        """Learn while the environments step."""

    def learn_afterwards(self) -> None:
        """Learn when their step is stored."""

    def _step(self) -> None:
        """Take one step in every environment, and the updates that are due."""
        progress = self.state.progress
        clock = time.perf_counter()
        choice = self.choose()
        if not np.isfinite(choice.action).all():
            self._check_finite()  # the loss or weight that spoiled it, where one did
            name, size = self._largest_weight()
            raise DivergedError(
                f"the agent's action is not finite at agent step {progress.agent_steps}, with weights up to {size:.0e} "
                f"in {name}",
                self.remedy,
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
        begins = ended if dropped is None else ended | dropped
        self.begin_episodes(begins)
        progress.agent_steps += self.envs.num_envs
        progress.env_frames += self.envs.num_envs * self.action_repeat
        told = successes(info, ended)
        if told is not None:
            self._solved |= told
        if "episode" in info:
            progress.env_frames -= self._left_out(info)
            ended = np.flatnonzero(info["_episode"])
            self._returns += [float(info["episode"]["r"][i]) for i in ended]
            self._lengths += [float(info["episode"]["l"][i]) for i in ended]
            if told is not None:
                self._successes += [float(self._solved[i]) for i in ended]
            self.state.episodes += len(ended)
        self._solved &= ~begins
        clock = time.perf_counter()
        self.learn_afterwards()
        self._seconds["update"] += time.perf_counter() - clock

    def _largest_weight(self) -> tuple[str, float]:
        """Return the name and the size of the agent's largest weight: an overflow begins there."""
        return max(
            (
                (f"{name}.{key}", float(tensor.abs().max()))
                for name, network in self.agent.networks().items()
                for key, tensor in network.state_dict().items()
                if tensor.numel()
            ),
            key=lambda found: found[1],
        )

    def _left_out(self, info: Mapping[str, Any]) -> int:
        """Return the control steps that ends of episodes kept from being taken, where the environments say so."""
        final = info.get("final_info", {})
        if "control_steps" not in final:
            return 0
        taken = final["control_steps"][final["_control_steps"]]
        return int(np.sum(self.action_repeat - taken))

    def numbers(self, seconds: float, steps: int) -> dict[str, float]:
        """See `RunLoop.numbers`."""
        values = {
            "time/steps_per_second": steps / seconds,
            "time/fps": steps * self.action_repeat / seconds,
            "time/env_ms": 1000 * self._seconds["environment"] / steps,
            "time/render_ms": 1000 * (self._rendered() - self._log_mark[2]) / steps,
            "time/update_ms": 1000 * self._seconds["update"] / steps,
            "time/act_ms": 1000 * self._seconds["act"] / steps,
            "replay/transitions": float(len(self.replay)),
        }
        if self._returns:
            values["train/episode_return"] = float(np.mean(self._returns))
            values["train/episode_length"] = float(np.mean(self._lengths))
        if self._successes:
            values["train/success"] = float(np.mean(self._successes))
        if failures := getattr(self.envs, "worker_failures", 0):
            values["environments/worker_failures"] = float(failures)
        if self.state.dropped:
            values["environments/dropped_transitions"] = float(self.state.dropped)
        self._returns, self._lengths, self._successes = [], [], []
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return values

    def postfix(self, values: Mapping[str, float]) -> str:
        """See `RunLoop.postfix`."""
        episode = values.get("train/episode_return")
        return "" if episode is None else f"return {episode:.1f}"

    def line(self, values: Mapping[str, float], minutes_left: float) -> str:
        """See `RunLoop.line`."""
        progress = self.state.progress
        episode = values.get("train/episode_return")
        shown = "      -" if episode is None else f"{episode:7.1f}"
        return (
            f"step {progress.agent_steps:>8,}  updates {progress.gradient_updates:>8,}  "
            f"return {shown}  {values['time/fps']:6.0f} frames/s  {minutes_left:5.1f} min left"
        )
