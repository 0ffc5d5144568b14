"""The View protocol: what a wrapper may ask of a simulator's picture.

A view is one camera at one size onto one simulator. Distractions are written against it and never see a
simulator, so the same colours and videos work in MuJoCo suites and in the NumPy-drawn toy family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Part = Literal["sky", "floor", "walls"]
"""Parts of a scene that are background. Everything else (robot, table, objects, targets) is foreground."""


@dataclass(frozen=True)
class Layers:
    """One render taken apart, for compositing something else behind the foreground.

    Attributes:
        rgb: uint8 [H, W, 3], the picture without the hidden parts: where they fill a pixel only in part, the
            color of what stands before them.
        coverage: float32 [H, W] in [0, 1], how much of each pixel the hidden parts would fill: 1 is pure
            background, 0 pure foreground; only multisampled silhouettes lie between. What is put behind shows as
            rgb * (1 - coverage) + behind * coverage.
    """

    rgb: np.ndarray
    coverage: np.ndarray


class View(Protocol):
    """A simulator's picture. All methods act on the simulator's current state.

    Attributes:
        height: pixels.
        width: pixels.
    """

    height: int
    width: int

    @property
    def parts(self) -> frozenset[Part]:
        """The background parts that this scene has, seen from this camera or not."""
        ...

    def render(self) -> np.ndarray:
        """Return the picture, uint8 [H, W, 3], a fresh array."""
        ...

    def render_layers(self, hidden: frozenset[Part]) -> Layers:
        """Render once without the `hidden` parts and tell where they would have been."""
        ...

    def foreground(self) -> np.ndarray:
        """Return where the picture shows neither sky, floor nor walls, bool [H, W]."""
        ...

    def colors(self) -> dict[str, np.ndarray]:
        """Return the scene's colors by slot, float64 [3] in [0, 1], as the simulator ships them.

        Slots are `grid1`, `grid2` (the floor's two checker colors), `floor` and `walls` (of one color,
        or the tint of a texture), `self` (the robot), `sky` and any further ones that a simulator
        names; a scene without such a part lacks the slot.
        """
        ...

    def set_colors(self, colors: Mapping[str, np.ndarray]) -> None:
        """Repaint the given slots until the next call; slots that are not given return to their own."""
        ...

    def close(self) -> None:
        """Free what the view holds; the simulator itself stays open."""
        ...
