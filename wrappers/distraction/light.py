"""Other light: where the lamps of a scene stand, what color they have, and how bright they are.

Drawn once per episode. All lamps are tilted together around what they shine at; the lamp that
MuJoCo puts at the camera stays there and is dimmed, so that shading tells where the others are.
Light is only ever taken away: in dm_control's scenes it adds up to more than full white, and
what is brighter still would show no difference. RL-ViGen (Yuan et al., 2023) changes position and
color of lights likewise; the ranges are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from wrappers.distraction.base import Aspect, SceneChange, Split, draw_seed
from wrappers.view import Lighting, View


@dataclass(frozen=True)
class LightRange:
    """From what the light of an episode is drawn, uniformly."""

    tilt: float
    """Largest tilt of the lamps, in radians."""
    brightness: tuple[float, float]
    """Of the lamps, as part of their own."""
    tint: float
    """By how much a channel may be darker than the brightness says, as part of it."""
    others: float
    """Least part, beside the brightness, of the lamp at the camera and of the ambient light."""


EASY = LightRange(tilt=math.radians(30), brightness=(0.5, 0.9), tint=0.25, others=0.7)
HARD = LightRange(tilt=math.radians(60), brightness=(0.3, 0.9), tint=0.5, others=0.4)


class RandomLight(SceneChange):
    """Lights the scene otherwise in each episode.

    Args:
        ranges: from what to draw.
        split: whose lights to draw.
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("lights",))

    def __init__(self, ranges: LightRange, split: Split = "train") -> None:
        self.ranges = ranges
        self.split: Split = split
        self._seed = 0

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw the episode's light."""
        self._seed = draw_seed(rng, self.split)
        view.set_lights(draw_lighting(self.ranges, self._seed))

    def get_state(self) -> dict[str, Any]:
        """Return the seed of the episode's light."""
        return {"seed": self._seed}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Light the scene as `state` says."""
        self._seed = state["seed"]
        view.set_lights(draw_lighting(self.ranges, self._seed))


def draw_lighting(ranges: LightRange, seed: int) -> Lighting:
    """Return the light number `seed`."""
    rng = np.random.default_rng(seed)
    brightness = rng.uniform(*ranges.brightness)
    diffuse = brightness * rng.uniform(1 - ranges.tint, 1, 3)
    return Lighting(
        tilt=rng.uniform(0, ranges.tilt),
        direction=rng.uniform(0, 2 * math.pi),
        diffuse=diffuse,
        headlight=rng.uniform(ranges.others, 1),
        ambient=rng.uniform(ranges.others, 1) * diffuse,
    )
