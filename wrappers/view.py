"""The View protocol: what a wrapper may ask of a simulator's picture.

A view is one camera at one size onto one simulator, or several side by side (`wrappers.side_by_side`).
Distractions are written against it and never see a simulator, so the same colours and videos work in MuJoCo
suites and in the NumPy-drawn toy family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

Part = Literal["sky", "floor", "walls"]
"""Parts of a scene that a video may replace; the rest is robot, objects, targets, and perhaps a table."""

Palette = Literal["scene", "materials", "objects"]
"""Which colors of a scene are meant: the slots that DMC-GB repaints, every material (the tint of what has a
texture), or the objects and the table, robot and background excluded."""

PALETTES: tuple[Palette, ...] = get_args(Palette)


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


@dataclass(frozen=True)
class CameraPlace:
    """Where a camera stands, as seen from the point that it looks at.

    Attributes:
        inclination: radians between its axis of turning and the camera: 0 is straight above, pi/2 level.
        is_overhead: it looks straight down: then the axis of turning is not the vertical, which would be a pole
            of the sphere that the camera moves on, but the camera's own upward direction.
    """

    inclination: float
    is_overhead: bool = False

    @property
    def reach(self) -> tuple[float, float]:
        """The inclinations that it may be moved to: down to level, or as low as it stands; any where it is overhead."""
        if self.is_overhead:
            return -math.inf, math.inf
        return 0.0, max(math.pi / 2, self.inclination)


@dataclass(frozen=True)
class CameraShift:
    """A displacement of the camera on the sphere around the point that it looks at, which it keeps looking at.

    Attributes:
        horizontal: radians about the vertical, counterclockwise as seen from above.
        vertical: radians away from straight above: positive lowers the camera.
        roll: radians about the line of sight, counterclockwise for the camera.
        distance: times the camera's own distance.
    """

    horizontal: float = 0.0
    vertical: float = 0.0
    roll: float = 0.0
    distance: float = 1.0


@dataclass(frozen=True)
class Lighting:
    """A change of all lights of a scene.

    Attributes:
        tilt: radians by which lamps are moved on the sphere around the point that they shine at; a lamp at the
            camera stays there.
        direction: radians, the azimuth that they are tilted towards.
        diffuse: float64 [3] >= 0, times the color of the lamps.
        headlight: times `diffuse`, what the lamp at the camera is multiplied with.
        ambient: float64 [3] >= 0, times the light that comes from everywhere.
    """

    tilt: float
    direction: float
    diffuse: np.ndarray
    headlight: float
    ambient: np.ndarray


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
        """Return where the picture shows neither sky, floor, walls nor what else a task says is none, bool [H, W]."""
        ...

    def colors(self, palette: Palette = "scene") -> dict[str, np.ndarray]:
        """Return the palette's colors by slot, float64 [3] in [0, 1], as the simulator ships them.

        Slots of the scene are `grid1`, `grid2` (the floor's two checker colors), `floor` and `walls` (of one
        color, or the tint of a texture), `self` (the robot), `sky` and any further ones that a simulator
        names; a scene without such a part lacks the slot. Slots of the other palettes are named after materials
        and bodies.
        """
        ...

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette = "scene") -> None:
        """Repaint the given slots until the next call; the palette's other slots return to their own."""
        ...

    def surfaces(self) -> tuple[str, ...]:
        """Return the slots that can show another texture: `floor`, `walls`, `table` and objects."""
        ...

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        """Cover the given slots until the next call; the others return to their own textures.

        Args:
            textures: uint8 [S, S, 3] by slot, periodic; shown as often as the slot repeats its own.
        """
        ...

    def camera(self) -> CameraPlace | None:
        """Return where the undisplaced camera stands, None where the picture has none that can move."""
        ...

    def set_camera(self, shift: CameraShift | None) -> None:
        """Displace the camera until the next call; None puts it back."""
        ...

    def set_lights(self, lighting: Lighting | None) -> None:
        """Change the lights until the next call; None, and a picture without lights, leaves them."""
        ...

    def close(self) -> None:
        """Free what the view holds; the simulator itself stays open."""
        ...


def undress(view: View) -> None:
    """Take back every change of the view's appearance."""
    for palette in PALETTES:
        view.set_colors({}, palette)
    view.set_textures({})
    view.set_camera(None)
    view.set_lights(None)
