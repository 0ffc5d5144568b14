"""SGQN: saliency-guided Q-networks (Bertoin et al. 2022, https://arxiv.org/abs/2209.09203).

Three parts on top of any critic:
1. Guided backpropagation of Q1 tells which pixels matter; the strongest ones of every frame are the mask M.
2. Consistency: the critic's values with everything outside M blanked must equal the full ones (eq. 3).
3. An attribution predictor, sharing the critic's encoder, finds M in a strongly augmented picture (eq. 4).

Differences from the published code: saliency is computed once per update (the code computes it twice) and on the same
forward pass as the critic's loss; the projection that the predictor reads is the critic's own, as published; procedural
textures stand in for Places365.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.agent import Observation
from agents.core.augmentations import StrongAugmentation
from agents.core.errors import UserError
from agents.core.networks import ReLU, doubled_convolution
from agents.core.pictures import overlay_grid
from agents.core.saliency import frame_saliency, input_gradient, mask_channels, quantile_mask
from agents.off_policy.critic_methods import (
    CriticLoss,
    CriticMethod,
    MethodConfig,
    critic_saliency,
    td_loss,
)
from agents.off_policy.svea import StrongView


@dataclass(frozen=True)
class SGQNConfig(MethodConfig):
    """SGQN; defaults from its paper and code."""

    quantile: float = 0.95
    """Pixels below this quantile of a frame's saliency are blanked (paper, table 3: .95 walker, finger; .98
    cartpole, ball_in_cup, which `--protocol dmc-gb` sets)."""
    consistency_weight: float = 0.5
    """Weight of the masked consistency term (published code)."""
    auxiliary_every: int = 2
    """Critic updates per step of the attribution predictor (published code)."""
    auxiliary_learning_rate: float = 3e-4
    """Adam step size of the attribution predictor, encoder included (published code)."""
    decoder_channels: tuple[int, int] = (128, 64)
    """Channels after the two upsamplings of the predictor (published code)."""
    strong_augmentation: StrongAugmentation = "overlay"
    """What the predictor must see through: overlay or convolution."""
    overlay_folder: str | None = None
    """Folder of overlay images (Places365, one's own); none draws procedural textures."""

    def __post_init__(self) -> None:
        """Reject values that SGQN cannot run with."""
        if not 0 <= self.quantile < 1:
            raise UserError(f"quantile is {self.quantile}; give a number in [0, 1)")
        if self.auxiliary_every < 1 or not self.auxiliary_learning_rate > 0:
            raise UserError(
                f"auxiliary_every is {self.auxiliary_every} and auxiliary_learning_rate "
                f"{self.auxiliary_learning_rate}; give positive numbers"
            )

    def build(
        self, spaces: dict[str, gym.spaces.Box], action_dim: int, critic: Any, seed: int
    ) -> CriticMethod:
        """Make the method for a critic's observation spaces."""
        view = StrongView(self.strong_augmentation, self.overlay_folder, spaces, seed)
        channels, height, width = spaces["pixels"].shape
        decoder = AttributionDecoder(
            critic.trunk.out_features + action_dim,
            channels // 3,
            (height, width),
            self.decoder_channels,
            bf16=critic.encoder.bf16,
        )
        return SGQN(self, view, decoder)


class AttributionDecoder(nn.Module):
    """From (projected features, action) to mask logits [B, k, H, W].

    One logit per frame: the published decoder predicts nine channels against a mask that repeats over RGB, so its
    three channels of a frame learn the same thing.
    """

    def __init__(
        self,
        features: int,
        frames: int,
        size: tuple[int, int],
        channels: tuple[int, int],
        *,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.bf16 = bf16
        self.size = size
        self.grid = (-(-size[0] // 4), -(-size[1] // 4), 32)
        self.project = nn.Linear(features, math.prod(self.grid))
        self.conv1 = nn.Conv2d(self.grid[2], channels[0], 3, padding=1)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=1)
        self.conv3 = nn.Conv2d(channels[1], frames, 3, padding=1)
        self.relu = ReLU()

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Return logits, float32 [B, k, H, W]."""
        x = torch.cat([features, action], dim=1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.project(x).view(-1, *self.grid).permute(0, 3, 1, 2)
            x = self.relu(self.conv1(self.relu(x)))
            x = self.relu(self.conv2(F.interpolate(x, scale_factor=2.0)))
            logits = doubled_convolution(x, self.conv3)
        return logits[..., : self.size[0], : self.size[1]].float().contiguous()


def consistency_loss(full: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor]) -> Tensor:
    """Return the squared difference of values with and without the blanked pixels (eq. 3), gradient on both sides."""
    return F.mse_loss(full[0], masked[0]) + F.mse_loss(full[1], masked[1])


def attribution_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the binary cross-entropy of predicted and computed masks (eq. 4)."""
    return F.binary_cross_entropy_with_logits(logits, mask.view(torch.uint8).to(logits.dtype))


def blank_outside(pixels: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Keep `pixels` [B, 3*k, H, W] where `mask` [B, k, H, W] holds and put the scalar `fill` elsewhere.

    `torch.lerp` is exact for the weights 0 and 1; `torch.where` takes twice as long in bf16 and NHWC, and bytes turn
    to numbers eight times faster than bool.
    """
    kept = torch.empty_like(pixels).copy_(mask_channels(mask.view(torch.uint8).to(pixels.dtype)))
    return torch.lerp(fill.to(pixels.dtype), pixels, kept)


class Attention(NamedTuple):
    """What the predictor learns from."""

    observation: Observation
    """As the critic's loss saw it."""
    mask: Tensor
    """bool [B, k, H, W]."""


class SGQN(CriticMethod):
    """The method; see the module's docstring."""

    optimizer: torch.optim.Optimizer

    def __init__(self, config: SGQNConfig, view: StrongView, decoder: AttributionDecoder) -> None:
        super().__init__()
        self.config = config
        self.view = view
        self.decoder = decoder

    def prepare(self, critic: Any) -> None:
        """Build the predictor's optimizer: decoder, and the critic's encoder and trunk."""
        shared = [*critic.encoder.parameters(), *critic.trunk.parameters()]
        self.optimizer = torch.optim.Adam(
            [*self.decoder.parameters(), *shared],
            lr=self.config.auxiliary_learning_rate,
            fused=True,
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the predictor's optimizer."""
        return {"attribution": self.optimizer}

    def critic_loss(
        self,
        critic: Any,
        observation: Observation,
        action: Tensor,
        target: Tensor,
        generator: torch.Generator,
    ) -> CriticLoss:
        """Return TD loss plus masked consistency."""
        seen = critic.normalize(observation)
        pixels = seen["pixels"].requires_grad_()
        features = critic.encode(seen)
        full = critic(features, action)
        gradient = input_gradient(full[0], pixels, "guided", retain_graph=True)
        mask = quantile_mask(frame_saliency(gradient), self.config.quantile)
        low, high = pixels.detach().permute(0, 2, 3, 1).aminmax()  # in NHWC five times faster
        draw = torch.rand((), generator=generator, device=pixels.device)
        blanked = blank_outside(pixels.detach(), mask, low + (high - low) * draw)
        masked = critic(critic.encode({**seen, "pixels": blanked}), action)
        consistency = consistency_loss(full, masked)
        loss = td_loss(full, target) + self.config.consistency_weight * consistency
        metrics = {"value/q": full[0].detach().mean(), "loss/consistency": consistency.detach()}
        return CriticLoss(loss, features, metrics, Attention(observation, mask))

    def auxiliary_due(self, updates: int) -> bool:
        """See `CriticMethod.auxiliary_due`."""
        return updates % self.config.auxiliary_every == 0

    def auxiliary_loss(
        self, critic: Any, kept: Attention, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return how well encoder and decoder find the mask in a strongly augmented picture."""
        strong = critic.normalize(self.view(kept.observation, generator))
        logits = self.decoder(critic.trunk(critic.encode(strong)), action)
        loss = attribution_loss(logits, kept.mask)
        return loss, {"loss/attribution": loss.detach()}

    def images(
        self, critic: Any, observation: Observation, action: Tensor
    ) -> dict[str, np.ndarray]:
        """Add the mask and the predictor's opinion under an overlay."""
        pictures = super().images(critic, observation, action)
        saliency = critic_saliency(critic, observation, action, "guided")
        mask = quantile_mask(saliency, self.config.quantile).float()
        generator = torch.Generator(action.device).manual_seed(0)
        strong = self.view(observation, generator)
        with torch.no_grad():
            features = critic.trunk(critic.encode(critic.normalize(strong)))
            predicted = torch.sigmoid(self.decoder(features, action))
        pictures["mask"] = overlay_grid(observation["pixels"], mask)
        pictures["predicted_mask"] = overlay_grid(strong["pixels"], predicted)
        return pictures
