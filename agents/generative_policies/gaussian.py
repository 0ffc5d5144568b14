"""A Gaussian over chunks of actions: the usual behavior cloning, which cannot keep two ways of doing a thing apart.

The spread has a smooth floor (`above_floor`), as the variances of PETS have (Chua et al. 2018,
https://arxiv.org/abs/1805.12114, appendix A): at a clamp's floor the gradient is 0, and a spread that once was there
would never grow again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor, nn

from agents.core.agent import Observation
from agents.core.chain_steps import Generators, standard_normal
from agents.core.demonstrations import Demonstrations
from agents.core.denoising import mean_of_counted
from agents.core.errors import UserError
from agents.core.networks import mlp
from agents.generative_policies.conditions import ConditionConfig, ConditionEncoder
from agents.generative_policies.parts import read_chunks


@dataclass(frozen=True)
class GaussianConfig(ConditionConfig):
    """What a Gaussian policy is made of."""

    horizon: int = 16
    """H, actions that are predicted at once; at least those of the task's chunk."""
    width: int = 512
    """Hidden units of each layer (DPPO's Gaussian baselines: 512)."""
    blocks: int = 2
    """Hidden layers."""
    smallest_std: float = 0.05
    """Floor of the spread, which would go to 0 where a demonstrator is always the same."""

    def __post_init__(self) -> None:
        """Reject values that no policy can be built with."""
        for name in ("horizon", "width", "blocks", "feature_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if not 0 < self.smallest_std < math.inf:
            raise UserError(f"smallest_std is {self.smallest_std}; give a positive number")


def above_floor(free: Tensor, floor: float) -> Tensor:
    """Return spreads above a floor, of free parameters: floor + exp(free).

    It is PETS' softplus of logarithms, exp(log(floor) + softplus(free - log(floor))), written out.
    """
    return floor + free.exp()


def free_of(std: float, floor: float) -> float:
    """Return the parameter of which `above_floor` makes a spread.

    Raises:
        ValueError: the spread is not above the floor.
    """
    if not std > floor:
        raise ValueError(
            f"no parameter gives a spread of {std}: it is not above its floor, {floor}"
        )
    return math.log(std - floor)


class GaussianPolicy(nn.Module):
    """N(mean(observation), std^2) over chunks [B, H, A], with one spread for every action of a chunk.

    Args:
        spaces: of the observation's parts; see `fields.observation_boxes`.
        action_space: the environment's, see `parts.read_chunks`.
        config: what it is made of.

    Raises:
        UserError: a chunk is shorter than what the environment executes.
    """

    def __init__(
        self,
        spaces: Mapping[str, gym.spaces.Box],
        action_space: gym.Space,
        config: GaussianConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.chunks = read_chunks(action_space, config.horizon)
        self.shape = (config.horizon, self.chunks.action)
        self.condition = ConditionEncoder(spaces, config)
        size = math.prod(self.shape)
        self.mean = mlp([self.condition.out_features, *[config.width] * config.blocks, size])
        self.log_std = nn.Parameter(torch.full(self.shape, -1.0))

    def prepare(self, demonstrations: Demonstrations) -> None:
        """Take the ranges of states from data."""
        self.condition.fit(demonstrations)

    def forward(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return the mean [B, H, A] and the spread [H, A]."""
        mean = self.mean(self.condition(observation)).unflatten(1, self.shape)
        return mean, above_floor(self.log_std, self.config.smallest_std)

    def loss(
        self,
        observation: Observation,
        chunk: Tensor,
        generator: torch.Generator,
        *,
        mask: Tensor | None = None,
        draws: int = 1,
    ) -> Tensor:
        """Return -log N(chunk) per action and dimension, [B]: the mean over what the mask [B, H] counts.

        Nothing is drawn; `generator` and `draws` are what losses of other policies need.
        """
        mean, std = self(observation)
        error = 0.5 * ((chunk - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
        return mean_of_counted(error, None if mask is None else mask.unsqueeze(-1))

    def likely(self, observation: Observation) -> Tensor:
        """Return the mean [B, H, A], which is differentiable and not cut off."""
        return self(observation)[0]

    def sample(
        self,
        observation: Observation,
        generator: Generators | None = None,
        *,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Return chunks [B, H, A] in [-1, 1]: drawn with a generator, the mean without."""
        mean, std = self(observation)
        if generator is not None:
            mean = mean + std * standard_normal(mean.shape, generator, device=mean.device)
        return mean.clamp(-1, 1)
