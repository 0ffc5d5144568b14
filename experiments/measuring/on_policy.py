"""Speed of on-policy training: our PPO and its loop against Stable-Baselines3's, and where our time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from torch.utils.flop_counter import FlopCounterMode

import envs
from agents.core.agent import as_observation
from agents.core.logging import Progress
from agents.core.loops import Hooks, LoopSettings, OnPolicyLoop
from agents.core.rollout import Rollout
from agents.on_policy.ppo import PPO, PPOConfig
from envs.environment import gymnasium_id
from experiments.measuring.timing import Table, interleave

STATE = PPOConfig(rollout_length=64)
PIXELS = PPOConfig(rollout_length=16, encoder="nature", feature_dim=512)
"""The networks that their CnnPolicy has, but for what stands behind the projection."""


@dataclass(frozen=True)
class Case:
    """A task on which both train with the same hyperparameters."""

    task: str
    config: PPOConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_envs: int = 8

    def theirs(self) -> gym.Env:
        """Return one environment as their users have it: from Gymnasium, with their monitor."""
        from stable_baselines3.common.monitor import Monitor

        family, _, name = self.task.partition("/")
        if family == "gym":
            return Monitor(gym.make(name))
        return Monitor(gym.make(gymnasium_id(self.task), seed=0, **self.settings))


CASES = (
    Case("gym/CartPole-v1", STATE, {"observation": "state"}),
    Case("gym/HalfCheetah-v5", STATE, {"observation": "state"}),
    Case("toy/reach", PIXELS, {"size": 48}),
)


def on_policy(seconds: float, cases: tuple[Case, ...] = CASES) -> list[Table]:
    """Train both in turns, a rollout and its update at a time, and take our time apart."""
    speed = Table(
        "On-policy training: our PPO and Stable-Baselines3's, same hyperparameters, agent steps/s",
        ["task", "ours", "theirs", "theirs, our environments", "ours / theirs", "operations / theirs"],
        "A turn is a rollout of 8 environments (64 steps each, 16 from pixels) and its ten passes of minibatches of "
        "64. Theirs: their environments' own vector (DummyVecEnv, Monitor), then ours through an adapter. Operations: "
        "of the networks' forward pass on a minibatch.",
    )  # fmt: skip
    parts = Table(
        "Where an agent step's time goes, microseconds",
        ["task", "act", "environment", "store", "update", "rest", "their update", "their rest"],
        "The update's share of every step. Rest is the loop, the log and, for theirs, everything else.",
    )
    for case in cases:
        with ExitStack() as stack:
            ours, theirs, adapted = _Ours(case), _Theirs(case), _Adapted(case)
            for trainer in (ours, theirs, adapted):
                stack.callback(trainer.close)
            calls: dict[str, Callable[[], object]] = {
                "ours": ours.turn, "theirs": theirs.turn, "adapted": adapted.turn,
            }  # fmt: skip
            times = interleave(calls, 3 * seconds)
        count = case.num_envs * case.config.rollout_length
        rates = [count / times[name] for name in calls]
        speed.rows.append([
            case.task, *rates, rates[0] / rates[1], ours.operations() / theirs.operations(),
        ])  # fmt: skip
        parts.rows.append([case.task, *ours.parts(), *theirs.parts()])
    return [speed, parts]


class _Ours:
    """Our own loop, with all that it does but writing files."""

    def __init__(self, case: Case) -> None:
        config, count = case.config, case.num_envs
        self.vector = envs.make_vec(case.task, count, seed=0, **case.settings)
        space, action = self.vector.single_observation_space, self.vector.single_action_space
        self.agent = PPO(space, action, config, num_envs=count)
        self.store = _TimedRollout(
            space, action, length=config.rollout_length, num_envs=count,
            extras=self.agent.extras, log=lambda line: None,
        )  # fmt: skip
        self.steps = count * config.rollout_length
        self.log = _Log()
        settings = LoopSettings(
            steps=10**12, log_every=self.steps, eval_every=0, checkpoint_every=10**12, exact_resume=False
        )  # fmt: skip
        nowhere: Any = _Nowhere()
        log: Any = self.log
        self.loop = OnPolicyLoop(
            self.agent, self.vector, self.store, settings, logger=log, checkpoints=nowhere,
            action_repeat=1, seed=0, hooks=Hooks(line=lambda _: None),
        )  # fmt: skip

    def turn(self) -> None:
        """Train for a rollout and its update."""
        until = self.loop.state.progress.agent_steps + self.steps
        self.loop.hooks.stop = lambda: self.loop.state.progress.agent_steps >= until
        self.store.seconds = 0.0
        with redirect_stdout(sys.stderr):
            self.loop.run()
        self.log.lines[-1]["time/store_ms"] = 1000 * self.store.seconds / self.steps

    def parts(self) -> list[float]:
        """Return microseconds per agent step, medians over the turns after the first."""
        lines = self.log.lines[1:]
        names = ("act", "env", "store", "update")
        measured = np.array([[line[f"time/{name}_ms"] for name in names] for line in lines])
        rest = [1000 / line["time/steps_per_second"] for line in lines] - measured.sum(1)
        return (1000 * np.median(np.column_stack([measured, rest]), axis=0)).tolist()

    def operations(self) -> int:
        """Return the operations of a forward pass on a minibatch."""
        size = self.agent.replay_settings.batch_size
        seen = np.stack([self.vector.single_observation_space.sample() for _ in range(size)])
        with FlopCounterMode(display=False) as counter:
            self.agent.network(as_observation(seen, self.agent.device))
        return counter.get_total_flops()

    def close(self) -> None:
        """Close the environments."""
        self.vector.close()


class _Theirs:
    """Their PPO on the vector environment that their users have."""

    def __init__(self, case: Case) -> None:
        from experiments.sessions.baseline import model_on

        self.config = case.config
        self.environment = self.make(case)
        self.model = model_on(self.environment, case.config, seed=0)
        self.steps = case.num_envs * case.config.rollout_length
        self.update_seconds: list[float] = []
        self.turn_seconds: list[float] = []
        train = self.model.train

        def timed() -> None:
            start = time.perf_counter()
            train()
            self.update_seconds.append(time.perf_counter() - start)

        self.model.train = timed  # type: ignore[method-assign]

    def make(self, case: Case) -> Any:
        """Return the vector environment."""
        from stable_baselines3.common.vec_env import DummyVecEnv

        return DummyVecEnv([case.theirs] * case.num_envs)

    def turn(self) -> None:
        """Train for a rollout and its update."""
        start = time.perf_counter()
        self.model.learn(self.steps, reset_num_timesteps=False)
        self.turn_seconds.append(time.perf_counter() - start)

    def parts(self) -> list[float]:
        """Return microseconds per agent step of the update and of the rest, medians over the turns after the first."""
        update, turn = np.array(self.update_seconds[1:]), np.array(self.turn_seconds[1:])
        return [1e6 * float(np.median(part)) / self.steps for part in (update, turn - update)]

    def operations(self) -> int:
        """Return the operations of a forward pass on a minibatch."""
        size = self.config.minibatch_size
        space = self.environment.observation_space
        seen, _ = self.model.policy.obs_to_tensor(np.stack([space.sample() for _ in range(size)]))
        with FlopCounterMode(display=False) as counter:
            self.model.policy(seen)
        return counter.get_total_flops()

    def close(self) -> None:
        """Close the environments."""
        self.environment.close()


class _Adapted(_Theirs):
    """Their PPO on our vector environment."""

    def make(self, case: Case) -> Any:
        """Return our environments as they take them."""
        from experiments.sessions.baseline import SB3VectorEnv

        return SB3VectorEnv(envs.make_vec(case.task, case.num_envs, seed=0, **case.settings), 0)


class _TimedRollout(Rollout):
    """A rollout that knows how long it took to store steps."""

    seconds = 0.0

    def add(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        """Store one step of every environment."""
        start = time.perf_counter()
        ids = super().add(*arguments, **keywords)
        self.seconds += time.perf_counter() - start
        return ids


class _Log:
    """Keeps the lines that a run would write."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None:
        """Keep a line."""
        self.lines.append(dict(values))

    def flush(self) -> None:
        """Do nothing: nothing is written."""


class _Nowhere:
    """Checkpoints that nobody needs."""

    def save(self, *parts: Any) -> None:
        """Do nothing."""
