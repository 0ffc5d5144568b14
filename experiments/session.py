"""A training session: everything that a run folder's config describes, built, resumed and closed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import envs
from agents import make_agent
from agents.core.agent import Agent, as_observation
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.fields import free_bytes
from agents.core.imports import recorded_imports
from agents.core.logging import Logger, Progress
from agents.core.loops import Hooks, LoopSettings, OffPolicyLoop
from agents.core.replay import Batch, Replay
from agents.core.seeding import spawn_seeds
from agents.core.settings import from_dict
from agents.policy import run_identity, space_to_json
from agents.registry import find
from experiments.evaluate import enlarge
from experiments.rollouts import run_episodes
from experiments.runs import write_json


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
        self.settings = from_dict(
            LoopSettings,
            {k: v for k, v in config["train"].items() if k not in ("num_envs", "seed")},
        )
        self.evaluation_seed = seeds["evaluation"]
        self.imports = recorded_imports(config)
        self.envs = envs.make_vec(**config["vector"], imports=self.imports, **config["env"])
        self._evaluation_envs: Any = None
        try:
            self._build(seeds, resume)
        except BaseException:
            self.envs.close()
            raise

    def _build(self, seeds: Mapping[str, int], resume: bool) -> None:
        config = self.config
        space = self.envs.single_observation_space
        self.replay = Replay(
            space,
            self.envs.single_action_space,
            capacity=self.settings.replay_capacity,
            num_envs=self.envs.num_envs,
            frame_stack=config["env"]["frame_stack"],
            device=config["device"],
            storage=config["replay_storage"],
            directory=self.run / "replay-memory",
            seed=seeds["replay"],
        )
        self.agent = self.make_agent(seeds["agent"])
        check_batch(self.agent.replay_settings.batch_size, space, config["device"])
        self.checkpoints = CheckpointStore(
            self.run, keep=self.settings.keep_checkpoints, identity=run_identity(config)
        )
        # A run that was killed before its first checkpoint begins again.
        goes_on = resume and self.checkpoints.latest() is not None
        parts = self.checkpoints.load(replay=self.replay) if goes_on else None
        done = parts["progress"]["agent_steps"] if parts else 0
        self.logger = Logger(self.run, resume_from=done if resume else None)
        self.loop = OffPolicyLoop(
            self.agent,
            self.envs,
            self.replay,
            self.settings,
            logger=self.logger,
            checkpoints=self.checkpoints,
            action_repeat=config["env"]["action_repeat"],
            seed=seeds["exploration"],
            hooks=Hooks(evaluate=self.evaluate, render_seconds=self._render_seconds),
        )
        if parts:
            self.loop.resume(parts)
        else:
            self.loop.begin()
            config["spaces"] = {
                "observation": space_to_json(space),
                "action": space_to_json(self.envs.single_action_space),
            }
            write_json(self.run / "config.json", config)
            self.logger.text("config", _as_table(config))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A disk that is full says so once: the logger's last lines do not fit either.
        with suppress(UserError) if kind else nullcontext():
            self.close()

    def make_agent(self, seed: int) -> Agent:
        """Build an agent as the config says."""
        spec = find(self.config["agent"])
        configs = [
            from_dict(type(config), self.config["configs"][type(config).__name__])
            for config in spec.configs
        ]
        return make_agent(
            self.config["agent"],
            self.envs.single_observation_space,
            self.envs.single_action_space,
            configs=configs,
            device=self.config["device"],
            seed=seed,
        )

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

        def act(observation: Any) -> np.ndarray:
            return self.agent.act(as_observation(observation, device), explore=False)[0]

        has_pixels = self.config["env"]["observation"] != "state"
        seen = run_episodes(
            act, self._evaluation_envs, episodes, seed=self.evaluation_seed, record=has_pixels
        )
        if seen.observations:
            observation = as_observation(seen.observations[len(seen.observations) // 2], device)
            action = torch.as_tensor(act(seen.observations[len(seen.observations) // 2]))
            pictures = self.agent.images(observation, action.to(device))
            self.logger.images({f"images/{k}": v for k, v in pictures.items()}, progress)
            video = enlarge(np.stack(seen.frames[:250]), side=128)
            self.logger.video("eval/video", video, progress)
        tag = f"eval/{self.config['env']['distraction'] or 'clean'}"
        values = {
            f"{tag}/return_mean": float(np.mean(seen.returns)),
            f"{tag}/return_std": float(np.std(seen.returns)),
        }
        if seen.success:
            values[f"{tag}/success"] = float(np.mean(seen.success))
        return values

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
                    seconds[count] = _seconds_per_call(update, calls=8, warmup=2)
                threads = min(seconds, key=seconds.__getitem__)
                print(
                    f"threads: {threads}, the faster of {most} and 1; --threads {threads} repeats this run exactly"
                )
            self.config["threads"] = threads
        torch.set_num_threads(threads)

    def _twin_update(self) -> Callable[[], Any]:
        """Return an update of another agent of the same config, so that nothing of the run is touched."""
        twin, settings = self.make_agent(seed=0), self.agent.replay_settings
        batch = _random_batch(self.envs, settings.batch_size, self.config["device"])
        return lambda: twin.update(batch)

    def estimate(self) -> str:
        """Return one line on the time, memory and disk that the rest of the run will take, evaluations included.

        Time is measured on a twin of the agent and fresh environments, so that nothing of the run is touched.
        """
        left = self.settings.steps - self.loop.state.progress.agent_steps
        update = _seconds_per_call(self._twin_update(), calls=6, warmup=2)
        probe = envs.make_vec(num_envs=1, workers=0, **self.config["env"])
        probe.reset(seed=0)
        step = _seconds_per_call(
            lambda: probe.step(probe.action_space.sample()), calls=10, warmup=2
        )
        probe.close()
        seconds = left * (self.settings.updates_per_step * update + step)
        seconds += self._evaluations_left(left) * self._episode_steps() * step
        rows = min(self.settings.replay_capacity, self.settings.steps)
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
            f"({1000 * update:.0f} ms an update, {1000 * step:.1f} ms a step), "
            f"{rows * bytes_per_row / 1e9:.2f} GB of replay memory, "
            f"{disk / 1e9:.2f} GB on disk ({free / 1e9:.0f} GB free)"
        )

    def _evaluations_left(self, steps: int) -> int:
        """Return how many episodes of evaluation lie in the next `steps` agent steps."""
        every = self.settings.eval_every
        return steps // every * self.settings.eval_episodes if every else 0

    def _episode_steps(self) -> int:
        """Return the agent steps of an episode that runs to its time limit; 0 where the task does not say."""
        length = self.config["env"]["episode_length"] or 0
        return -(-length // self.config["env"]["action_repeat"])

    def close(self) -> None:
        """Close environments and logger."""
        self.envs.close()
        if self._evaluation_envs is not None:
            self._evaluation_envs.close()
        self.logger.close()

    def _render_seconds(self) -> float:
        return float(sum(self.envs.call("render_seconds")))


def check_batch(batch_size: int, space: Any, device: str) -> None:
    """Refuse a batch whose observations alone, as floating point numbers, would not fit the memory.

    Raises:
        UserError: names the size that was asked for.
    """
    boxes = space.spaces.values() if hasattr(space, "spaces") else (space,)
    nbytes = 2 * batch_size * sum(4 * int(np.prod(box.shape)) for box in boxes)  # and the next ones
    free = free_bytes("device" if device != "cpu" else "ram", torch.device(device), None)
    if nbytes > free:
        raise UserError(
            f"a batch of {batch_size:,} needs {nbytes / 1e9:.1f} GB for its observations alone, "
            f"{free / 1e9:.1f} GB are free; lower --batch-size"
        )


def _random_batch(vector: Any, batch_size: int, device: str) -> Batch:
    space, action = vector.single_observation_space, vector.single_action_space
    samples = [space.sample() for _ in range(batch_size)]
    if isinstance(samples[0], Mapping):
        stacked: Any = {key: np.stack([s[key] for s in samples]) for key in samples[0]}
    else:
        stacked = np.stack(samples)
    observation = {
        key: torch.nan_to_num(value.clamp(-10, 10)) if value.is_floating_point() else value
        for key, value in as_observation(stacked, torch.device(device)).items()
    }
    ones = torch.ones(batch_size, device=device)
    actions = torch.as_tensor(np.stack([action.sample() for _ in range(batch_size)]), device=device)
    ids = torch.zeros(batch_size, dtype=torch.int64)
    return Batch(observation, actions, ones, 0.99 * ones, observation, ids, {})


def _seconds_per_call(call: Callable[[], Any], *, calls: int, warmup: int) -> float:
    for _ in range(warmup):
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _as_table(config: Mapping[str, Any], prefix: str = "") -> str:
    """Return a config as a markdown table for TensorBoard."""
    rows: list[str] = [] if prefix else ["| setting | value |", "| --- | --- |"]
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows.append(_as_table(value, f"{prefix}{key}."))
        else:
            rows.append(f"| {prefix}{key} | {value} |")
    return "\n".join(rows)
