"""A session that learns from data sets instead of from a task, which it is only evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from agents.core.checkpoints import CheckpointStore
from agents.core.demonstrations import Demonstrations
from agents.core.logging import Logger
from agents.core.offline import OfflineAgent, OfflineLoop
from agents.core.run_loop import Hooks
from agents.policy import run_identity
from experiments.running.estimates import check_batch, seconds_per_call
from experiments.sessions.demonstrations import chosen_episodes
from experiments.sessions.training import Session


class ImitationSession(Session):
    """Data sets, agent, loop, logger and checkpoints of one run; see `Session`."""

    agent: OfflineAgent

    def _build(self, seeds: Mapping[str, int], resume: bool) -> None:
        config = self.config
        space = self.envs.single_observation_space
        agent = self.make_agent(seeds["agent"])
        assert isinstance(agent, OfflineAgent)
        self.agent = agent
        check_batch(agent.replay_settings.batch_size, space, config["device"])
        self.demonstrations = load_demonstrations(
            config,
            space,
            self.envs.single_action_space,
            horizon=agent.horizon,
            stride=agent.executed,
            seed=seeds["replay"],
            directory=self.run / "replay-memory",
        )
        self.checkpoints = CheckpointStore(
            self.run, keep=self.settings.keep_checkpoints, identity=run_identity(config)
        )
        goes_on = resume and self.checkpoints.latest() is not None
        parts = self.checkpoints.load() if goes_on else None
        done = parts["progress"]["agent_steps"] if parts else 0
        self.logger = Logger(self.run, resume_from=done if resume else None)
        self.loop = OfflineLoop(
            agent,
            self.demonstrations,
            self.settings,
            logger=self.logger,
            checkpoints=self.checkpoints,
            hooks=Hooks(evaluate=self.evaluate),
        )
        self._begin(parts)

    def _twin_update(self) -> Callable[[], Any]:
        """Return a gradient step of another agent of the same config, on data that is not drawn for the run."""
        twin = self.make_agent(seed=0)
        assert isinstance(twin, OfflineAgent)
        twin.prepare(self.demonstrations)
        rows = np.random.default_rng(0).integers(
            len(self.demonstrations), size=twin.replay_settings.batch_size
        )
        return lambda: twin.update(self.demonstrations.read(rows))

    def estimate(self) -> str:
        """Return one line on the data, and on the time that the rest of the run will take, evaluations included."""
        left = self.settings.steps - self.loop.state.progress.agent_steps
        update = seconds_per_call(self._twin_update(), calls=6, warmup=2)
        _, step = self._measure_steps()
        seconds = left * update + self._evaluations_left(left) * self._episode_steps() * step
        data = self.demonstrations
        return (
            f"data: {data.episodes} episodes of {len(data):,} actions\n"
            f"estimate: {seconds / 60:.0f} min for {left:,} gradient steps ({1000 * update:.0f} ms each, "
            f"{1000 * step:.1f} ms a step of an evaluation), "
            f"{left * self.agent.replay_settings.batch_size / len(data):.0f} passes over the data"
        )

    def account(self) -> str:
        """Return what the run has taken so far."""
        progress = self.loop.state.progress
        return f"{progress.gradient_updates:,} gradient steps, {progress.wall_seconds / 60:.1f} min"


def load_demonstrations(
    config: Mapping[str, Any],
    observation_space: gym.Space,
    action_space: gym.Space,
    *,
    horizon: int,
    stride: int,
    seed: int = 0,
    directory: Path | None = None,
) -> Demonstrations:
    """Read what a run's config names as its demonstrations.

    Args:
        config: the run's.
        observation_space: of its task.
        action_space: of its task; of chunks [h, A], or of single actions [A].
        horizon: actions in a chunk to learn.
        stride: actions between two pictures of a stack.
        seed: of the batches.
        directory: for data that does not fit the memory.

    Raises:
        UserError: a data set is missing, empty, damaged or of another shape; the text names data set, episode and
            step.
    """
    datasets, work = chosen_episodes(config["demonstrations"])
    rows = sum(datasets[name].steps(index) for name, index in work)
    store = Demonstrations(
        observation_space,
        _single(action_space),
        rows=rows,
        horizon=horizon,
        frame_stack=config["env"]["frame_stack"],
        stride=stride,
        seed=seed,
        device=config["device"],
        storage=config["replay_storage"],
        directory=directory,
    )
    for name, index in tqdm(work, desc="reading", unit="episode", disable=None, leave=False):
        episode = datasets[name].read(index, scenes=False, side_by_side=True)
        store.add(episode.observations, episode.actions, f"dataset '{name}', episode {index}")
    return store


def _single(space: gym.Space) -> gym.Space:
    """Return the space of one action of a chunk."""
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 2:
        return gym.spaces.Box(space.low[0], space.high[0], dtype=np.float32)
    return space
