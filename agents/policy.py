"""A trained policy as a function: `Policy.load(run).act(observation)`; no environment, loop or logger needed.

A policy with a memory is told where episodes begin: `policy.begin()` before the first observation of each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agents.baseline_files import training_counts
from agents.baselines import BASELINE, MODEL, NORMALIZATION, PROGRESS, SB3Agent, load_sb3
from agents.core.agent import Agent, as_observation
from agents.core.base_policy import BasePolicy
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.fields import camera_names, join_cameras
from agents.core.imports import import_modules, recorded_imports
from agents.core.settings import from_dict
from agents.core.tree_rows import count_rows
from agents.core.trees import check_schema
from agents.off_policy.residual import ResFiT
from agents.registry import AGENTS, AgentSpec, find, make_agent

SCHEMA = 1
"""Version of config.json's layout."""

BASE = "base"
"""Folder of a run that holds the policy on top of which its agent acts: a small run folder itself."""

REQUIRED = {"agent", "env", "vector", "train", "configs", "device"}
"""What every run's config.json holds."""


class Actor:
    """An agent that acts greedily, and remembers what has to be remembered of the episodes that are going on.

    Attributes:
        agent: the agent behind it.
        device: where it acts.
        state: what the agent is given with the next observations; see `Agent.act`.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.device = next(next(iter(agent.networks().values())).parameters()).device
        self.state: Any = None

    def begin(self, begins: np.ndarray | None = None) -> None:
        """Forget the episodes before.

        Args:
            begins: bool [N], whose next observation is the first of an episode; None for everybody's.
        """
        self.state = None if begins is None else self.agent.reset_state(self.state, begins)

    def act(self, observation: Any, *, explore: bool = False) -> np.ndarray:
        """Return the actions for a batch of observations as the environments gave them.

        Args:
            observation: the batch.
            explore: draw actions as in training; otherwise the greedy ones.

        Raises:
            UserError: there are more or fewer than those that are remembered.
        """
        batch = as_observation(observation, self.device)
        count = len(next(iter(batch.values())))
        remembered = count_rows(self.state)
        if remembered not in (None, count):
            raise UserError(
                f"{count} observations are given to a policy that remembers {remembered} episodes; "
                "call its begin() before the first observation of new ones"
            )
        action, self.state, _ = self.agent.act(batch, self.state, explore=explore)
        return action


class Policy(Actor):
    """An agent that only acts.

    Attributes:
        agent: the agent behind it.
        config: the run's config.json.
        cameras: those that it sees side by side, in order; none where it was trained with a single one.
        checkpoint: name of the checkpoint that was loaded.
        progress: agent steps, environment frames and gradient updates behind that checkpoint.
        device: where it acts.
        state: what it remembers of the episodes that are going on; see `begin`.
    """

    def __init__(
        self, agent: Agent, config: dict[str, Any], checkpoint: str, progress: dict[str, int]
    ) -> None:
        super().__init__(agent)
        self.config = config
        self.cameras = camera_names(config.get("env", {}))
        self.checkpoint = checkpoint
        self.progress = progress

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str = "latest",
        device: str | torch.device = "cpu",
        imports: bool = False,
        acting: Mapping[str, Any] | None = None,
    ) -> Policy:
        """Load a run folder's policy.

        Args:
            run: the folder that training wrote.
            checkpoint: `latest`, `best`, or a checkpoint folder's name.
            device: where to act.
            imports: import the third parties' modules that the run was trained with, as its config.json names them;
                otherwise no code is run because a folder says so, and an agent of theirs must be registered already.
            acting: fields of its configs with other values, of those that `AgentSpec.acting` names: fewer denoising
                steps, say.

        Raises:
            UserError: no run or checkpoint there, or it does not fit its config: another agent,
                task or observation, or other sizes.
        """
        config = read_config(run)
        if imports:
            import_modules(recorded_imports(config))
        if config["agent"].startswith(BASELINE):
            return cls._of_baseline(Path(run), config, checkpoint, device)
        store = CheckpointStore(Path(run), identity=run_identity(config))
        parts = store.load(None if checkpoint == "latest" else checkpoint)
        spec = _agent_spec(config)
        trained = [from_dict(type(c), config["configs"][type(c).__name__]) for c in spec.configs]
        configs = [_changed(own, spec, acting or {}) for own in trained]
        agent = make_agent(
            config["agent"],
            space_from_json(config["spaces"]["observation"]),
            space_from_json(config["spaces"]["action"]),
            configs=configs,
            device=device,
            num_envs=config["train"].get("num_envs", 1),
        )
        if acting:
            agent.trained_as(*trained)
        agent.load_state_dict({"networks": parts["agent"]["networks"]})
        if isinstance(agent, ResFiT):
            agent.take_base(load_base(run, device=device, imports=imports))
        counts = ("agent_steps", "env_frames", "gradient_updates")
        progress = {name: parts["progress"][name] for name in counts}
        if checkpoint == "latest":  # whichever is whole
            checkpoint = f"step-{progress['agent_steps']:09d}"
        return cls(agent, config, checkpoint, progress)

    @classmethod
    def of_sb3(cls, path: str | Path, agent: SB3Agent, task: dict[str, Any]) -> Policy:
        """Return the policy of a Stable-Baselines3 zip that `load_sb3` has loaded.

        A zip knows no frames: they are counted as if no end of an episode had cut a repeat short.

        Args:
            path: the zip.
            agent: what was loaded.
            task: the settings of its environment, as a run's config.json has them under `env`.
        """
        counts = training_counts(path)
        frames = counts["agent_steps"] * task["action_repeat"] * task["action_chunk"]
        name = f"step-{counts['agent_steps']:09d}"
        return cls(agent, {"env": task}, name, counts | {"env_frames": frames})

    @classmethod
    def _of_baseline(
        cls, run: Path, config: dict[str, Any], checkpoint: str, device: str | torch.device
    ) -> Policy:
        """Load what `experiments.baseline` trained."""
        if checkpoint != "latest":
            raise UserError(
                f"a {config['agent']} run keeps its last policy only; leave out checkpoint '{checkpoint}'"
            )
        statistics = run / NORMALIZATION
        agent = load_sb3(
            run / MODEL,
            space_from_json(config["spaces"]["observation"]),
            space_from_json(config["spaces"]["action"]),
            normalization=statistics if statistics.is_file() else None,
            device=device,
        )
        policy = cls.of_sb3(run / MODEL, agent, config["env"])
        policy.config = config
        if (run / PROGRESS).is_file():  # older runs have none
            policy.progress["env_frames"] = json.loads((run / PROGRESS).read_text())["env_frames"]
        return policy

    def act(self, observation: Any, *, explore: bool = False) -> np.ndarray:
        """Return the greedy action for one observation, or actions for a batch of them.

        One with a memory takes them for the next ones of the same episodes; see `begin`.

        Args:
            observation: as the environment gave it: uint8 [3*k, H, W], float [D] or a Dict; or a batch. Several
                cameras are parts of their own, or side by side.
            explore: draw the action as in training, by the agent's own generator; it may leave the space's range.
        """
        observation = join_cameras(observation, self.cameras)
        parts = observation if isinstance(observation, Mapping) else {"": observation}
        arrays = {key: np.asarray(value) for key, value in parts.items()}
        single = all(
            array.ndim == (3 if array.dtype == np.uint8 else 1) for array in arrays.values()
        )
        if single:
            arrays = {key: array[None] for key, array in arrays.items()}
        action = super().act(arrays[""] if "" in arrays else arrays, explore=explore)
        return action[0] if single else action

    def saliency(self, observation: Any, action: np.ndarray) -> np.ndarray | None:
        """Return where the agent looks in the newest frame of a batch of observations, whatever it remembers.

        Args:
            observation: a batch of observations as the environment gave them.
            action: float32 [B, A], what `act` chose for them.

        Returns:
            float32 [B, H, W], not negative, of several cameras side by side; None where the agent sees no pixels or
            cannot tell.
        """
        batch = as_observation(join_cameras(observation, self.cameras), self.device)
        seen = self.agent.saliency(batch, torch.as_tensor(action, device=self.device))
        return None if seen is None else seen[:, -1].cpu().numpy()


def load_base(
    run: str | Path, *, device: str | torch.device = "cpu", imports: bool = False
) -> BasePolicy:
    """Load the policy on top of which a run's agent acts, from the run folder.

    Args:
        run: the folder.
        device: where to act.
        imports: see `Policy.load`.

    Raises:
        UserError: it is not there, or acts by choices.
    """
    folder = Path(run) / BASE
    if not folder.is_dir():
        raise UserError(
            f"'{folder}' is missing, the policy on top of which the run's agent acts; copy the run folder as a whole"
        )
    policy = Policy.load(folder, device=device, imports=imports)
    return BasePolicy(
        policy.agent,
        space_from_json(policy.config["spaces"]["observation"]),
        space_from_json(policy.config["spaces"]["action"]),
        frame_stack=policy.config["env"]["frame_stack"],
    )


def _changed(config: Any, spec: AgentSpec, acting: Mapping[str, Any]) -> Any:
    """Return a config dataclass with other values of fields that only say how an agent acts."""
    for name in acting:
        if name not in spec.acting:
            raise UserError.unknown("setting of acting", name, spec.acting)
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in acting.items() if k in names})


def _agent_spec(config: Mapping[str, Any]) -> AgentSpec:
    """Return how the run's agent is built; where a third party's module is missing, say which."""
    modules = recorded_imports(config)
    if config["agent"] not in AGENTS and modules:
        raise UserError(
            f"nobody has registered the run's agent '{config['agent']}'; import {' and '.join(modules)} first, "
            "or let Policy.load do so with imports=True if you trust the run"
        )
    return find(config["agent"])


def read_config(run: str | Path) -> dict[str, Any]:
    """Return a run folder's config.json.

    Raises:
        UserError: the folder is no run, or one of another version.
    """
    file = Path(run) / "config.json"
    if not file.is_file():
        raise UserError(
            f"'{run}' is no run folder (it has no config.json); give one that training wrote"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({error}); restore it or train anew") from error
    if not isinstance(config, dict) or not config.keys() >= REQUIRED:
        raise UserError(f"'{file}' is no run's config; give a folder that training wrote")
    check_schema(file, config.get("schema", SCHEMA), SCHEMA)
    return config


def run_identity(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run's checkpoints are of: agent, task and kind of observation."""
    task = config["env"]
    return {"agent": config["agent"], "env": task["id"], "observation": task["observation"]}


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Describe a Box, Discrete or Dict space in JSON; bounds are kept only where they are uniform."""
    if isinstance(space, gym.spaces.Dict):
        return {"dict": {key: space_to_json(part) for key, part in space.spaces.items()}}
    if isinstance(space, gym.spaces.Discrete):
        return {"discrete": int(space.n)}
    if isinstance(space, gym.spaces.Box):
        low, high = float(space.low.min()), float(space.high.max())
        bounds = [low if np.isfinite(low) else None, high if np.isfinite(high) else None]
        return {"box": list(space.shape), "dtype": str(space.dtype), "bounds": bounds}
    raise UserError(f"space {space} is not supported")


def space_from_json(description: Mapping[str, Any]) -> gym.Space:
    """Rebuild what `space_to_json` described."""
    if "dict" in description:
        return gym.spaces.Dict({k: space_from_json(v) for k, v in description["dict"].items()})
    if "discrete" in description:
        return gym.spaces.Discrete(description["discrete"])
    low, high = description["bounds"]
    return gym.spaces.Box(
        -np.inf if low is None else low,
        np.inf if high is None else high,
        tuple(description["box"]),
        np.dtype(description["dtype"]).type,
    )
