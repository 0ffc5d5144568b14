"""The CriticMethod interface: on which views of an observation a critic is trained, and what is trained beside it.

`PlainMethod` is temporal-difference learning alone; `svea.SVEA` and `sgqn.SGQN` are the others. A method attaches to
any critic (SAC's or DDPG's): it sees an encoder, a trunk and Q functions, and never the actor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.agent import Observation
from agents.core.pictures import overlay_grid
from agents.core.saliency import SaliencyRule, frame_saliency, input_gradient


@dataclass
class CriticLoss:
    """What `CriticMethod.critic_loss` returns.

    Attributes:
        loss: 0-d, to be minimised.
        features: [B, F], the encoder's output for the observation without strong augmentation.
        metrics: 0-d detached tensors.
        kept: what `auxiliary_loss` needs of this pass.
    """

    loss: Tensor
    features: Tensor
    metrics: dict[str, Tensor]
    kept: Any = None


@dataclass(frozen=True)
class MethodConfig:
    """Plain temporal-difference learning: nothing to set."""

    def build(
        self, spaces: dict[str, gym.spaces.Box], action_dim: int, critic: Any, seed: int
    ) -> CriticMethod:
        """Make the method for a critic's observation spaces."""
        return PlainMethod()


def td_loss(values: Iterable[Tensor], target: Tensor) -> Tensor:
    """Return the summed mean squared errors of all critics; `values` are [B] each, of two or of an ensemble [E, B]."""
    return reduce(torch.add, [F.mse_loss(value, target) for value in values])


class CriticMethod(nn.Module):
    """Base of all methods."""

    def critic_loss(
        self,
        critic: Any,
        observation: Observation,
        action: Tensor,
        target: Tensor,
        generator: torch.Generator,
    ) -> CriticLoss:
        """Return the critic's loss on a weakly augmented observation (pixels in [0, 255])."""
        raise NotImplementedError

    def auxiliary_due(self, updates: int) -> bool:
        """Whether the method has a gradient step of its own, and it is due after `updates` updates."""
        return False

    def auxiliary_loss(
        self, critic: Any, kept: Any, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the method's own step, 0-d, and metrics.

        Args:
            critic: the parts of it that the method's optimizers hold learn, too.
            kept: of the critic's loss on the same batch.
            action: [B, A].
            generator: of random numbers.
        """
        raise NotImplementedError

    def prepare(self, critic: Any) -> None:
        """Build optimisers, once everything is on its device."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the method's optimisers by name."""
        return {}

    def images(
        self, critic: Any, observation: Observation, action: Tensor
    ) -> dict[str, np.ndarray]:
        """Return pictures for the log, uint8 [H, W, 3] by name."""
        saliency = critic_saliency(critic, observation, action, "guided")
        return {"saliency": overlay_grid(observation["pixels"], saliency)}


class PlainMethod(CriticMethod):
    """Temporal-difference learning on the observation as it comes."""

    def critic_loss(
        self,
        critic: Any,
        observation: Observation,
        action: Tensor,
        target: Tensor,
        generator: torch.Generator,
    ) -> CriticLoss:
        """Return the plain TD loss."""
        features = critic.encode(critic.normalize(observation))
        values = critic(features, action)
        return CriticLoss(td_loss(values, target), features, {"value/q": values[0].detach().mean()})


def critic_saliency(
    critic: Any, observation: Observation, action: Tensor, rule: SaliencyRule
) -> Tensor:
    """Return where Q1 looks, [B, k, H, W]: the largest input gradient over RGB, per stacked frame."""
    with torch.enable_grad():
        seen = critic.normalize(observation)
        seen["pixels"] = seen["pixels"].detach().requires_grad_()
        value = critic(critic.encode(seen), action)[0]
        return frame_saliency(input_gradient(value, seen["pixels"], rule))
