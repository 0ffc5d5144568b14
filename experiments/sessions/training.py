"""A training session: everything that a run folder's config describes, built, resumed and closed."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import envs
from agents import make_agent
from agents.core.agent import Agent, OnPolicyAgent, as_observation
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.fields import step_fields
from agents.core.imports import recorded_imports
from agents.core.logging import Logger, Progress
from agents.core.loops import (
    Hooks,
    OffPolicyLoop,
    OffPolicySettings,
    OnPolicyLoop,
)
from agents.core.replay import Replay
from agents.core.rollout import TEACHER_ACTION, Rollout
from agents.core.run_loop import RunLoop
from agents.core.seeding import spawn_seeds
from agents.core.settings import from_dict
from agents.policy import Actor, run_identity, space_to_json
from agents.registry import find
from experiments.evaluate import enlarge
from experiments.evaluating.rollouts import evaluation_scalars, run_episodes
from experiments.running.estimates import (
    Learning,
    check_batch,
    measured_learning,
    random_batch,
    random_rollout,
    seconds_per_call,
    seconds_to_act,
)
from experiments.running.runs import write_json
from experiments.running.settings import control_steps, read_loop
from experiments.sessions.bases import begin_from_base
from experiments.sessions.teachers import ScriptedTeacher, load_teacher
from wrappers.vector import SuccessReward


class Session:
    """Environments, agent, replay, loop, logger and checkpoints of one run.

    Args:
        run: the run folder (config.json stands in it).
        config: its content; keys as `experiments.train.new_config` writes them.
        resume: continue from the newest whole checkpoint.
    """

    def __init__(self, run: Path, config: dict[str, Any], *, resume: bool) -> None:
        self.run, self.config = run, config
        seeds = spawn_seeds(config["train"]["seed"])[1]
        self.settings = read_loop(config)
        self.spec = find(config["agent"])
        self.evaluation_seed = seeds["evaluation"]
        self.imports = recorded_imports(config)
        self.envs: Any = envs.make_vec(**config["vector"], imports=self.imports, **config["env"])
        self.spaces = self.envs.single_observation_space, self.envs.single_action_space
        self._evaluation_envs: Any = None
        try:
            self._build(seeds, resume)
        except BaseException:
            self.envs.close()
            raise

    def _build(self, seeds: Mapping[str, int], resume: bool) -> None:
        config = self.config
        space, action_space = self.spaces
        self.agent = self.make_agent(seeds["agent"])
        compile_agent(self.agent, config)
        self._prepare(seeds)
        if config.get("reward", "task") == "success":  # older runs say nothing
            self.envs = SuccessReward(self.envs)
        self.teacher: Actor | ScriptedTeacher | None = None
        if about := config.get("teacher"):
            self.teacher = (
                ScriptedTeacher(self.envs)
                if "script" in about
                else load_teacher(about, space, action_space, config["device"])
            )
        flag = "--minibatch-size" if self.spec.on_policy else "--batch-size"
        check_batch(self.agent.replay_settings.batch_size, space, config["device"], flag)
        self.replay = make_store(
            config,
            space,
            action_space,
            self.agent,
            storage=config["replay_storage"],
            device=config["device"],
            directory=self.run / "replay-memory",
            seed=seeds["replay"],
        )
        self.checkpoints = CheckpointStore(
            self.run, keep=self.settings.keep_checkpoints, identity=run_identity(config)
        )
        # A run that was killed before its first checkpoint begins again.
        goes_on = resume and self.checkpoints.latest() is not None
        parts = self.checkpoints.load(replay=self.replay) if goes_on else None
        done = parts["progress"]["agent_steps"] if parts else 0
        self.logger = Logger(self.run, resume_from=done if resume else None)
        loop = self.spec.loop or (OnPolicyLoop if self.spec.on_policy else OffPolicyLoop)
        self.loop: RunLoop = loop(
            self.agent,
            self.envs,
            self.replay,
            self.settings,
            logger=self.logger,
            checkpoints=self.checkpoints,
            action_repeat=control_steps(config["env"]),
            seed=seeds["exploration"],
            hooks=Hooks(evaluate=self.evaluate, render_seconds=self._render_seconds),
        )
        if isinstance(self.loop, OnPolicyLoop):
            self.loop.teacher = self.teacher
        self._complete(seeds)
        self._begin(parts)

    def _prepare(self, seeds: Mapping[str, int]) -> None:
        """Do what must be done before the store is made."""

    def _complete(self, seeds: Mapping[str, int]) -> None:
        """Do what must be done before the loop begins or goes on."""

    def _begin(self, parts: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's parts, or begin and complete the run's config."""
        if parts:
            self.loop.resume(parts)
            return
        space, action_space = self.spaces
        spaces = {"observation": space_to_json(space), "action": space_to_json(action_space)}
        if "base" in self.config and self.spec.fine_tunes:
            begin_from_base(self.agent, self.config, spaces)
        self.loop.begin()
        self.config["spaces"] = spaces
        write_json(self.run / "config.json", self.config)
        self.logger.text("config", _as_table(self.config))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A disk that is full says so once: the logger's last lines do not fit either.
        with suppress(UserError) if kind else nullcontext():
            self.close()

    def make_agent(self, seed: int, **changes: Any) -> Agent:
        """Build an agent as the config says, with some fields of its first config changed."""
        return agent_of(self.config, *self.spaces, seed=seed, **changes)

    def train(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Run the loop to its end, or until `stop` says so."""
        self.loop.hooks.stop = stop
        self.loop.run()

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Run the training task greedily from fixed seeds; log a video and what the agent looks at."""
        episodes = self.settings.eval_episodes
        if self._evaluation_envs is None:
            keywords = {**self.config["env"], "seed": self.evaluation_seed}
            workers = min(self.config["vector"]["workers"], episodes)
            self._evaluation_envs = envs.make_vec(
                num_envs=episodes,
                workers=workers,
                timeout=self.config["vector"]["timeout"],
                imports=self.imports,
                **keywords,
            )
        device = self.config["device"]
        actor = Actor(self.agent)
        has_pixels = self.config["env"]["observation"] != "state"
        self.agent.seed_actions(self.evaluation_seed)
        seen = run_episodes(
            actor.act, self._evaluation_envs, episodes, seed=self.evaluation_seed,
            record=has_pixels, begin=actor.begin,
        )  # fmt: skip
        if seen.observations:
            observation = as_observation(seen.observations[len(seen.observations) // 2], device)
            action = torch.as_tensor(self.agent.act(observation, explore=False)[0])
            pictures = self.agent.images(observation, action.to(device))
            self.logger.images({f"images/{k}": v for k, v in pictures.items()}, progress)
            video = enlarge(np.stack(seen.frames[:250]), side=128)
            self.logger.video("eval/video", video, progress)
        return evaluation_scalars(seen, self.config["env"]["distraction"])

    def settle_threads(self) -> None:
        """Choose the learner's CPU threads, once for the whole run: torch's own number, or one if that is faster.

        On two busy cores two threads wait for each other: an update of SGQN took 435-550 ms instead of 130-190.
        """
        threads = self.config["threads"]
        if threads is None:
            threads = most = torch.get_num_threads()
            if most > 1 and self.config["device"] == "cpu":
                update, seconds = self._twin_update(), {}
                for count in (most, 1):
                    torch.set_num_threads(count)
                    seconds[count] = seconds_per_call(update, calls=8, warmup=2)
                threads = min(seconds, key=seconds.__getitem__)
                print(
                    f"threads: {threads}, the faster of {most} and 1; --threads {threads} repeats this run exactly"
                )
            self.config["threads"] = threads
        torch.set_num_threads(threads)

    def _twin_update(self) -> Callable[[], Any]:
        """Return a gradient step of another agent of the same config, so that nothing of the run is touched."""
        size, device = self.agent.replay_settings.batch_size, self.config["device"]
        if not self.spec.on_policy:
            twin, batch = self.make_agent(seed=0), random_batch(self.envs, size, device)
            return lambda: twin.update(batch)
        learner, rollout = self._twin_rollout(-(-size // self.envs.num_envs), epochs=1)
        return lambda: learner.update(rollout.experience())

    def _twin_rollout(self, length: int, **changes: Any) -> tuple[OnPolicyAgent, Rollout]:
        """Return another on-policy agent of the same config with rollouts of this length, and one for it."""
        size = self.agent.replay_settings.batch_size
        if hasattr(self.spec.configs[0], "critic_warmup"):  # a policy learns, too, most of the time
            changes["critic_warmup"] = 0
        twin = self.make_agent(seed=0, rollout_length=length, minibatch_size=size, **changes)
        assert isinstance(twin, OnPolicyAgent)
        frames, device = self.config["env"]["frame_stack"], self.config["device"]
        taught = "teacher" in self.config
        return twin, random_rollout(self.envs, twin, frames, device, is_taught=taught)

    def _measure_learning(self) -> Learning:
        """Measure gradient updates on a twin of the agent."""
        if isinstance(self.settings, OffPolicySettings):
            seconds = seconds_per_call(self._twin_update(), calls=6, warmup=2)
            return Learning(seconds, self.settings.updates_per_step)
        assert isinstance(self.agent, OnPolicyAgent)
        longest = self.agent.rollout_length
        shortest = min(longest, -(-self.agent.replay_settings.batch_size // self.envs.num_envs))
        return measured_learning(self._twin_rollout, shortest=shortest, longest=longest)

    def _measure_steps(self) -> tuple[float, float]:
        """Return the time of an agent step in training, and in an evaluation: the environment's, and to act."""
        probe = self._probe()
        probe.reset(seed=0)
        step = seconds_per_call(lambda: probe.step(probe.action_space.sample()), calls=10, warmup=2)
        probe.close()
        twin, device = self.make_agent(seed=0), self.config["device"]
        train = self.envs.num_envs
        times = ((train, not self.spec.offline), (self.settings.eval_episodes, False))
        act, evaluate = (
            seconds_to_act(twin, self.envs, count, device, explore=explore)
            for count, explore in times
        )
        return step + act, step + evaluate

    def account(self) -> str:
        """Return what the run has taken so far."""
        progress = self.loop.state.progress
        return (
            f"{progress.agent_steps:,} agent steps = {progress.env_frames:,} environment frames, "
            f"{progress.gradient_updates:,} gradient updates, {progress.wall_seconds / 60:.1f} min"
        )

    def updates_per_step(self) -> float:
        """Return the gradient steps for each agent step."""
        if isinstance(self.settings, OffPolicySettings):
            return self.settings.updates_per_step
        config = self.config["configs"][type(self.spec.configs[0]).__name__]
        return config["epochs"] / self.agent.replay_settings.batch_size

    def estimate(self) -> str:
        """Return one line on the time, memory and disk that the rest of the run will take, evaluations included.

        Time is measured on a twin of the agent and fresh environments, so that nothing of the run is touched.
        """
        left = self.settings.steps - self.loop.state.progress.agent_steps
        learning, (step, evaluated) = self._measure_learning(), self._measure_steps()
        seconds = left * (learning.per_step * learning.seconds + step)
        seconds += self._evaluations_left(left) * self._episode_steps() * evaluated
        rows = min(self.replay.ring * self.replay.num_envs, self.settings.steps)
        bytes_per_row = self.replay.nbytes / (self.replay.ring * self.replay.num_envs)
        weights = sum(
            tensor.numel() * tensor.element_size()
            for network in self.agent.networks().values()
            for tensor in network.state_dict().values()
        )
        disk = rows * bytes_per_row + (self.settings.keep_checkpoints * 3 + 1) * weights
        free = shutil.disk_usage(self.run).free
        return (
            f"estimate: {seconds / 60:.0f} min for {left:,} agent steps "
            f"({1000 * learning.seconds:.0f} ms an update, {1000 * step:.1f} ms a step), "
            f"{rows * bytes_per_row / 1e9:.2f} GB of replay memory, "
            f"{disk / 1e9:.2f} GB on disk ({free / 1e9:.0f} GB free)"
        )

    def _probe(self) -> Any:
        """Return an environment of the run's task, for measurements."""
        return envs.make_vec(num_envs=1, workers=0, **self.config["env"])

    def _evaluations_left(self, steps: int) -> int:
        """Return how many episodes of evaluation lie in the next `steps` agent steps."""
        every = self.settings.eval_every
        return steps // every * self.settings.eval_episodes if every else 0

    def _episode_steps(self) -> int:
        """Return the agent steps of an episode that runs to its time limit; 0 where the task does not say."""
        length = self.config["env"]["episode_length"] or 0
        return -(-length // control_steps(self.config["env"]))

    def close(self) -> None:
        """Close environments and logger."""
        self.envs.close()
        if self._evaluation_envs is not None:
            self._evaluation_envs.close()
        self.logger.close()

    def _render_seconds(self) -> float:
        return float(sum(self.envs.call("render_seconds")))


def agent_of(
    config: Mapping[str, Any],
    space: gym.Space,
    action_space: gym.Space,
    *,
    seed: int,
    **changes: Any,
) -> Agent:
    """Build the agent that a run's config describes, with some fields of its first config changed."""
    kinds = [type(default) for default in find(config["agent"]).configs]
    configs = [from_dict(kind, config["configs"][kind.__name__]) for kind in kinds]
    configs[0] = dataclasses.replace(configs[0], **changes)
    return make_agent(
        config["agent"],
        space,
        action_space,
        configs=configs,
        device=config["device"],
        seed=seed,
        num_envs=config["train"]["num_envs"],
    )


def compile_agent(agent: Agent, config: Mapping[str, Any]) -> None:
    """Compile an agent's gradients as a run's config says; `auto` does on GPUs, and warns where it cannot.

    Raises:
        UserError: it cannot, and is told to.
    """
    asked = config.get("compile", "off")  # older runs say nothing
    if asked == "off" or (asked == "auto" and config["device"] == "cpu"):
        return
    try:
        agent.compile(fall_back=asked == "auto")
    except UserError as error:
        if asked == "on":
            raise
        warnings.warn(f"training goes on without compiling: {error}", stacklevel=2)


def make_store(
    config: Mapping[str, Any],
    space: gym.Space,
    action_space: gym.Space,
    agent: Agent,
    *,
    seed: int = 0,
    **where: Any,
) -> Replay:
    """Build what a run's steps go to: a replay, or a rollout.

    Args:
        config: the run's.
        space: of one environment's observations.
        action_space: of one environment's actions.
        agent: who learns from it.
        seed: of the batches.
        **where: device, storage, directory and log of `Replay`.
    """
    shape = {
        "num_envs": config["train"]["num_envs"],
        "frame_stack": config["env"]["frame_stack"],
    }
    if isinstance(agent, OnPolicyAgent):
        extras = dict(agent.extras)
        if config.get("teacher"):
            extras[TEACHER_ACTION] = step_fields(action_space)["action"]
        own: dict[str, Any] = {"extras": extras, "jumps": agent.jumps}
        return Rollout(space, action_space, length=agent.rollout_length, **own, **shape, **where)
    capacity = config["train"]["replay_capacity"]
    return Replay(
        agent.stored_space(space, action_space),
        action_space,
        capacity=capacity,
        seed=seed,
        **shape,
        **where,
    )


def _as_table(config: Mapping[str, Any], prefix: str = "") -> str:
    """Return a config as a markdown table for TensorBoard."""
    rows: list[str] = [] if prefix else ["| setting | value |", "| --- | --- |"]
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows.append(_as_table(value, f"{prefix}{key}."))
        else:
            rows.append(f"| {prefix}{key} | {value} |")
    return "\n".join(rows)
