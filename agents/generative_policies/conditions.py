"""From an observation to the vector that a policy is conditioned on: pictures, state, language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor, nn

from agents.core.agent import Observation
from agents.core.augmentations import random_shift
from agents.core.demonstrations import Demonstrations
from agents.core.encoders import EncoderName, PixelEncoder
from agents.core.fields import is_image
from agents.core.networks import Trunk
from agents.core.normalizers import RangeNormalizer

LIMIT = 5.0
"""A normalized state's largest entry: beyond, it has left what demonstrations showed, and how far says little."""


@dataclass(frozen=True)
class ConditionConfig:
    """How observations become a vector."""

    encoder: EncoderName = "drqv2"
    """Convolutions over pixels, of every part of an observation its own; see `agents.core.encoders.ENCODERS`."""
    feature_dim: int = 64
    """Length of the projection behind each encoder (Diffusion Policy's spatial softmax has 64), and of a language
    embedding's."""


class ConditionEncoder(nn.Module):
    """Every part of an observation, one behind the other in the order of their names.

    Pictures (uint8 [3*k, H, W]) go through an encoder and a projection of their own: views that are parts of the
    observation each through one (as Diffusion Policy's), views side by side in one picture, as `--camera A B` gives
    them, through one that shares its convolutions and whose projection tells their places apart. `state` is brought to
    [-1, 1] by the range that the data had; any other vector, such as the embedding of an instruction, goes through a
    linear layer and a LayerNorm.

    Args:
        spaces: of the parts, by name; see `fields.observation_boxes`.
        config: encoder and sizes.

    Attributes:
        out_features: C.
    """

    def __init__(self, spaces: Mapping[str, gym.spaces.Box], config: ConditionConfig) -> None:
        super().__init__()
        self.encoders, self.projections = nn.ModuleDict(), nn.ModuleDict()
        self.ranges = nn.ModuleDict()
        self.names = sorted(spaces)  # a space read from JSON may have another order
        self.out_features = 0
        for name in self.names:
            space = spaces[name]
            features = space.shape[0]
            if is_image(space):
                encoder = PixelEncoder(features, space.shape[1:], config.encoder)  # type: ignore[arg-type]
                self.encoders[name] = encoder
                self.projections[name] = Trunk(encoder.out_features, 0, config.feature_dim)
                features = config.feature_dim
            elif name == "state":
                self.ranges[name] = RangeNormalizer(features)
            else:
                self.projections[name] = nn.Sequential(
                    nn.Linear(features, config.feature_dim), nn.LayerNorm(config.feature_dim)
                )
                features = config.feature_dim
            self.out_features += features

    def fit(self, demonstrations: Demonstrations) -> None:
        """Take the ranges of states from data."""
        for name, normalizer in self.ranges.items():
            assert isinstance(normalizer, RangeNormalizer)
            normalizer.fit(demonstrations.column(name))

    def shift(self, observation: Observation, generator: torch.Generator, pad: int) -> Observation:
        """Return an observation whose views are each shifted at random by up to `pad` pixels at 84 x 84."""
        if not pad:
            return observation
        shifted = dict(observation)
        for name in self.encoders:
            pixels = observation[name]
            own = max(1, round(pad * pixels.shape[-2] / 84))
            shifted[name] = random_shift(pixels, generator, own)
        return shifted

    def forward(self, observation: Observation) -> Tensor:
        """Return the condition, float32 [B, C].

        Args:
            observation: the parts by name, pictures uint8 or float in [0, 255].
        """
        parts = []
        for name in self.names:
            part = observation[name]
            if name in self.encoders:
                encoder = self.encoders[name]
                assert isinstance(encoder, PixelEncoder)
                part = encoder(encoder.normalize(part))
            elif name in self.ranges:
                normalizer = self.ranges[name]
                assert isinstance(normalizer, RangeNormalizer)
                part = normalizer.normalize(part.float()).clamp(-LIMIT, LIMIT)
            if name in self.projections:
                part = self.projections[name](part)
            parts.append(part)
        return torch.cat(parts, dim=1)
