"""The networks of on-policy agents: a policy and a value over one encoder of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import gymnasium as gym
import torch
from torch import Tensor, nn

from agents.core.agent import Observation
from agents.core.distributions import Categorical, Gaussian
from agents.core.encoders import EncoderName, PixelEncoder
from agents.core.networks import Trunk
from agents.core.normalizers import RunningMoments
from agents.on_policy.memory import Memory


class ActorValue(nn.Module):
    """Policy and value: behind a shared encoder and projection of pixels, apart from there on.

    Args:
        spaces: `pixels` uint8 [3*k, H, W] and / or `state` [D].
        action_space: Box or Discrete.
        hidden: widths of the hidden layers of each.
        encoder: convolutions over pixels; see `agents.core.encoders.ENCODERS`.
        feature_dim: length of the projection behind the encoder.
        initial_log_std: of a continuous policy; one for each part of the action, whatever is seen.
        normalize_observation: bring states to mean 0 and spread 1.
        critic: from the length of the features to what gives values [B, 1] of them; None is layers like the actor's.
        memory_size: units of a recurrent memory, which policy and value see beside what is there now; 0 for none.
    """

    def __init__(
        self,
        spaces: dict[str, gym.spaces.Box],
        action_space: gym.Space,
        *,
        hidden: Sequence[int],
        encoder: EncoderName,
        feature_dim: int,
        initial_log_std: float,
        normalize_observation: bool,
        critic: Callable[[int], nn.Module] | None = None,
        memory_size: int = 0,
    ) -> None:
        super().__init__()
        self.encoder: PixelEncoder | None = None
        self.moments: RunningMoments | None = None
        if "pixels" in spaces:
            channels, *size = spaces["pixels"].shape
            self.encoder = PixelEncoder(channels, (size[0], size[1]), encoder)
        states = spaces["state"].shape[0] if "state" in spaces else 0
        if states and normalize_observation:
            self.moments = RunningMoments((states,))
        pixels = self.encoder.out_features if self.encoder else 0
        self.trunk = Trunk(pixels, states, feature_dim)
        is_discrete = isinstance(action_space, gym.spaces.Discrete)
        parts = int(action_space.n) if is_discrete else math.prod(action_space.shape or ())  # type: ignore[attr-defined]
        self.memory = Memory(self.trunk.out_features, memory_size) if memory_size else None
        sizes = [self.trunk.out_features + memory_size, *hidden]
        # Gains as in Stable-Baselines3: a policy that begins near its middle tries everything.
        self.actor = tanh_mlp([*sizes, parts], last_gain=0.01)
        self.critic: nn.Module = (
            critic(sizes[0]) if critic else tanh_mlp([*sizes, 1], last_gain=1.0)
        )
        self.log_std = None
        if not is_discrete:
            self.log_std = nn.Parameter(torch.full((parts,), initial_log_std))

    def normalize(self, observation: Observation) -> dict[str, Tensor]:
        """Bring pixels and states to the networks' range."""
        seen = dict(observation)
        if self.encoder is not None:
            seen["pixels"] = self.encoder.normalize(observation["pixels"])
        if self.moments is not None:
            seen["state"] = self.moments.normalize(observation["state"])
        return seen

    def forward(self, observation: Observation) -> tuple[Gaussian | Categorical, Tensor]:
        """Return the policy's distribution and the values [B].

        With a memory, an observation also holds `memory` and `lengths` as `Memory` takes them; without these entries,
        every step is an episode's first.
        """
        return self.judge(self.normalize(observation))

    def judge(self, normalized: Observation) -> tuple[Gaussian | Categorical, Tensor]:
        """Return what `forward` does, of a normalized observation."""
        return self.decide(self.perceive(normalized)[0])

    def perceive(self, normalized: Observation) -> tuple[Tensor, Tensor | None]:
        """Return what policy and value see of a normalized observation, and the memory after each step, if any."""
        parts = []
        if self.encoder is not None:
            parts.append(self.encoder(normalized["pixels"]))
        if "state" in normalized:
            parts.append(normalized["state"])
        projected = self.trunk(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        if self.memory is None:
            return projected, None
        memory = self.memory(projected, normalized.get("memory"), normalized.get("lengths"))
        return torch.cat([projected, memory], dim=1), memory

    def decide(self, features: Tensor) -> tuple[Gaussian | Categorical, Tensor]:
        """Return what `forward` does, of what `perceive` gives."""
        return self.distribution(features), self.critic(features)[:, 0]

    def distribution(self, features: Tensor) -> Gaussian | Categorical:
        """Return the policy's distribution, of what `perceive` gives."""
        head = self.actor(features)
        return Categorical(head) if self.log_std is None else Gaussian(head, self.log_std)


def tanh_mlp(sizes: list[int], last_gain: float) -> nn.Sequential:
    """Return linear layers with tanh between, orthogonal with gain sqrt 2, the last with its own."""
    layers: list[nn.Module] = []
    for place, (inside, outside) in enumerate(pairwise(sizes)):
        is_last = place == len(sizes) - 2
        layer = nn.Linear(inside, outside)
        nn.init.orthogonal_(layer.weight, last_gain if is_last else math.sqrt(2))
        nn.init.zeros_(layer.bias)
        layers += [layer] if is_last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)
