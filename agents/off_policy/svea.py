"""SVEA: stable value estimation under strong augmentation (Hansen et al. 2021, https://arxiv.org/abs/2107.00644).

The critic learns one target, computed without strong augmentation, from the observation and from a strongly augmented
copy: L = alpha * L(s) + beta * L(aug(s)) (eq. 8). The actor sees no strong augmentation.

Differences from the published code: the overlay is the default (the published code hard-codes the random convolution,
though the paper's best video results are the overlay's), and procedural textures stand in for Places365.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.core.agent import Observation
from agents.core.augmentations import StrongAugmentation, overlay, random_convolution
from agents.core.errors import UserError
from agents.core.overlays import OverlayImages
from agents.core.pictures import newest_frames
from agents.off_policy.critic_methods import (
    CriticLoss,
    CriticMethod,
    MethodConfig,
    td_loss,
)


@dataclass(frozen=True)
class SVEAConfig(MethodConfig):
    """SVEA; defaults from its paper."""

    strong_augmentation: StrongAugmentation = "overlay"
    """overlay (an image at half opacity) or convolution (one random 3x3 filter per sample)."""
    overlay_folder: str | None = None
    """Folder of overlay images (Places365, one's own); none draws procedural textures."""
    svea_alpha: float = 0.5
    """Weight of the clean loss (SVEA, table 5)."""
    svea_beta: float = 0.5
    """Weight of the augmented loss (SVEA, table 5)."""

    def build(
        self, spaces: dict[str, gym.spaces.Box], action_dim: int, critic: Any, seed: int
    ) -> CriticMethod:
        """Make the method for a critic's observation spaces."""
        return SVEA(self, StrongView(self.strong_augmentation, self.overlay_folder, spaces, seed))


class StrongView:
    """The strong augmentation of an observation's pixels.

    Args:
        kind: overlay or convolution.
        folder: images for the overlay.
        spaces: the critic's observation spaces.
        seed: of the procedural textures.

    Raises:
        UserError: there are no pixels to augment; at the first call, that the folder has no images.
    """

    def __init__(
        self,
        kind: StrongAugmentation,
        folder: str | None,
        spaces: dict[str, gym.spaces.Box],
        seed: int,
    ) -> None:
        if "pixels" not in spaces:
            raise UserError("this method augments pixels; use --observation pixels or both")
        self.kind = kind
        self._bank = partial(
            OverlayImages, folder, size=round(spaces["pixels"].shape[-2] * 1.25), seed=seed
        )
        self._images: OverlayImages | None = None

    def __call__(self, observation: Observation, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the observation with strongly augmented pixels, float32 in [0, 255]."""
        pixels = observation["pixels"]
        if self.kind == "convolution":
            strong = random_convolution(pixels, generator)
        else:
            if self._images is None:  # not before: a policy that only acts needs no images
                self._images = self._bank()
            strong = overlay(pixels, generator, self._images)
        return {**observation, "pixels": strong}


def svea_loss(
    clean: tuple[Tensor, Tensor],
    strong: tuple[Tensor, Tensor],
    target: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """Return alpha * L(clean) + beta * L(strong) against one target (eq. 8)."""
    return alpha * td_loss(clean, target) + beta * td_loss(strong, target)


class SVEA(CriticMethod):
    """The method; see the module's docstring."""

    def __init__(self, config: SVEAConfig, view: StrongView) -> None:
        super().__init__()
        self.config = config
        self.view = view

    def critic_loss(
        self,
        critic: Any,
        observation: Observation,
        action: Tensor,
        target: Tensor,
        generator: torch.Generator,
    ) -> CriticLoss:
        """Encode both views as one batch and regress both on the clean target."""
        strong = self.view(observation, generator)
        both = {key: torch.cat([observation[key], strong[key]]) for key in observation}
        features = critic.encode(critic.normalize(both))
        q1, q2 = critic(features, torch.cat([action, action]))
        (clean1, strong1), (clean2, strong2) = q1.chunk(2), q2.chunk(2)
        loss = svea_loss(
            (clean1, clean2),
            (strong1, strong2),
            target,
            self.config.svea_alpha,
            self.config.svea_beta,
        )
        gap = (clean1 - strong1).detach().abs().mean()
        metrics = {"value/q": clean1.detach().mean(), "value/augmentation_gap": gap}
        return CriticLoss(loss, features[: len(action)], metrics)

    def images(
        self, critic: Any, observation: Observation, action: Tensor
    ) -> dict[str, np.ndarray]:
        """Add the strong view to the saliency."""
        pictures = super().images(critic, observation, action)
        # A generator of its own: drawing a picture must not move the training's random stream.
        generator = torch.Generator(action.device).manual_seed(0)
        pictures["augmentation"] = newest_frames(self.view(observation, generator)["pixels"])
        return pictures
