"""`--teacher`: whose actions a run learns from beside its rewards, and that it stays the same one on resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from agents import AGENTS, Policy
from agents.baselines import BASELINE, load_sb3
from agents.core.agent import Agent
from agents.core.errors import UserError
from agents.off_policy.residual import ResFiT
from agents.policy import Actor, read_config, space_to_json
from agents.registry import find
from envs.experts import scripted_expert
from experiments.evaluating.baseline_policy import is_zip
from experiments.running.imports import import_for_run

FLAGS = (
    "teacher_coefficient", "teacher_decay", "guidance", "guidance_decay", "guided_decisions",
)  # fmt: skip
"""Fields of the configs of agents that can be taught."""
SCRIPT = "expert"
"""The teacher's name where it is the task's own script."""


def new_teacher(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what config.json holds of the teacher that the flags name; nothing without one.

    Raises:
        UserError: the agent cannot be taught, the flags say how by nobody, or the task has no script.
    """
    teacher = given.get("teacher")
    if teacher is None:
        for name in FLAGS:
            if name in given:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} is {given[name]}, but there is no teacher; add --teacher"
                )
        return {}
    if not _can_be_taught(given["agent"]):
        able = ", ".join(name for name in sorted(AGENTS) if _can_be_taught(name))
        raise UserError(
            f"--teacher is for agents that learn from one ({able}), not {given['agent']}"
        )
    if str(teacher) == SCRIPT:
        scripted_expert(given["env"])  # tells of a task without one
        return {"teacher": {"script": given["env"]}}
    return {"teacher": {"path": str(Path(teacher).resolve())}}


class ScriptedTeacher:
    """The task's own script, which acts on what the simulator knows, whatever the student sees.

    Args:
        envs: the run's vector environment.
    """

    state: None = None
    """It remembers nothing."""

    def __init__(self, envs: Any) -> None:
        self.envs = envs

    def begin(self, begins: np.ndarray | None = None) -> None:
        """Do nothing; see `Actor.begin`."""

    def act(self, observation: Any) -> np.ndarray:
        """Return what the script would do in the environments as they are now; see `Actor.act`."""
        return np.stack(self.envs.call("scripted_action"))


def _can_be_taught(agent: str) -> bool:
    return any(hasattr(config, FLAGS[0]) for config in find(agent).configs)


def load_teacher(
    about: dict[str, Any], space: gym.Space, action_space: gym.Space, device: str
) -> Actor:
    """Return a run's teacher, which acts greedily.

    Args:
        about: what config.json holds of it; which checkpoint it is and a digest of its weights are added when new.
        space: of one environment's observations.
        action_space: of one environment's actions.
        device: where it acts.

    Raises:
        UserError: it is not there or cannot be loaded, sees or does something else, or is no longer what it was.
    """
    path = Path(about["path"])
    if not path.exists():
        raise UserError(
            f"the teacher '{path}' does not exist; give --teacher a run folder that training wrote, or a zip of "
            "Stable-Baselines3"
            + (", where the one of this run is now" if "digest" in about else "")
        )
    try:
        if is_zip(path):
            # It knows no task: that its layers fit this one's spaces is all that can be asked.
            teacher = Actor(load_sb3(path, space, action_space, device=device))
        else:
            teacher = _load_run(about, path, space, action_space, device)
    except UserError as error:
        raise UserError(f"the teacher cannot be loaded: {error}") from error
    digest = weights_digest(teacher.agent)
    if about.get("digest", digest) != digest:
        raise UserError(
            f"the teacher '{path}' is not the one that this run began with: its weights differ; give --teacher the "
            "place of that one"
        )
    about["digest"] = digest
    return teacher


def _load_run(
    about: dict[str, Any], path: Path, space: gym.Space, action_space: gym.Space, device: str
) -> Policy:
    """Return a run's policy, and remember which checkpoint it is of."""
    config = read_config(path)
    import_for_run(config, folder=path, source="the teacher's config")
    for what, of_task in (("observation", space), ("action", action_space)):
        ours, theirs = space_to_json(of_task), config["spaces"][what]
        if ours != theirs:
            raise UserError(
                f"'{path}' has the {what} space {theirs}, this task {ours}; train with the teacher's settings of the "
                "task (--observation, --size, --frame-stack, ...), or take another teacher"
            )
    policy = Policy.load(path, checkpoint=about.get("checkpoint", "latest"), device=device)
    if "checkpoint" not in about and not config["agent"].startswith(BASELINE):
        about["checkpoint"] = policy.checkpoint  # a baseline's run keeps its last policy only
    return policy


def weights_digest(agent: Agent) -> str:
    """Return SHA-256 over the names, kinds and values of all weights by which an agent acts."""
    networks, below, depth = dict(agent.networks()), agent, 0
    while isinstance(below, ResFiT) and below.base is not None:
        below, depth = below.base.agent, depth + 1
        networks |= {f"{'base.' * depth}{name}": net for name, net in below.networks().items()}
    return networks_digest(networks)


def networks_digest(networks: Mapping[str, nn.Module]) -> str:
    """Return SHA-256 over the names, kinds and values of the weights of networks."""
    digest = hashlib.sha256()
    for name, network in sorted(networks.items()):
        for key, value in sorted(network.state_dict().items()):
            digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
