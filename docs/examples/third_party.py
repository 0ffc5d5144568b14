"""A task and an agent of one's own, without a fork.

With this file's folder on PYTHONPATH:

    python -m experiments.train --import third_party --env example/follow --agent drq-averaged

Resuming and evaluating such a run import the module again, as its config.json says. Where workers
step the environments, keep tasks in a module of their own: they need not import PyTorch then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import agents
import envs
from agents.core.replay import Batch
from agents.off_policy.critic_methods import MethodConfig
from agents.off_policy.sac import SAC, SACConfig
from envs.toy import Body, ToyTask

TURN = 0.1
"""Radians that the target moves on its circle in a step."""


class Follow(ToyTask):
    """A point follows a target that circles: 1 on it, 0 from 1 away.

    State: x and y of the point, x and y of the target. The base class draws the bodies, counts the
    steps and keeps the state; an adapter of a simulator brings `view`, `get_state` and `set_state`.
    """

    default_episode_length = 50
    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def _begin(self) -> np.ndarray:
        angle = self.np_random.uniform(0, 2 * math.pi)
        return np.array((0, 0, 0.7 * math.cos(angle), 0.7 * math.sin(angle)))

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, Any]]:
        point = np.clip(self._scene[:2] + 0.2 * np.clip(action, -1, 1), -1, 1)
        x, y = self._scene[2:]
        cosine, sine = math.cos(TURN), math.sin(TURN)
        self._scene = np.array((*point, cosine * x - sine * y, sine * x + cosine * y))
        return max(0.0, 1 - math.dist(point, self._scene[2:])), False, {}

    def bodies(self) -> list[Body]:
        """Return the target and the point in front of it."""
        x, y, target_x, target_y = self._scene.tolist()
        return [
            Body("box", target_x, target_y, 0.5, 0.5, is_target=True),
            Body("disc", x, y, 0.36, 0.36),
        ]


@dataclass(frozen=True)
class AveragedConfig(SACConfig):
    """DrQ with an averaged target; every field is a flag of the training command."""

    target_copies: int = 2
    """Augmented next observations whose values the target averages (DrQ's K; Kostrikov et al. 2021: 2)."""


class AveragedDrQ(SAC):
    """SAC whose target is the mean over differently shifted next pictures (https://arxiv.org/abs/2004.13649)."""

    config: AveragedConfig

    def target_value(self, batch: Batch) -> Tensor:
        """Return the mean of `target_copies` targets, each with shifts and actions of its own, [B]."""
        draw = super().target_value
        return torch.stack([draw(batch) for _ in range(self.config.target_copies)]).mean(0)


def build(
    observation_space: gym.Space, action_space: gym.Space, config: AveragedConfig, **keywords: Any
) -> AveragedDrQ:
    """Build the agent; `keywords` are device and seed."""
    return AveragedDrQ(observation_space, action_space, config, method=MethodConfig(), **keywords)


envs.register("example/follow", Follow, background=frozenset({"sky", "floor"}))
agents.register(
    "drq-averaged", agents.AgentSpec(build, (AveragedConfig(),), "DrQ, its target averaged")
)
