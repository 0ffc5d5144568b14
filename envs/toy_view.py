"""The picture of the toy tasks, drawn with NumPy: sky, checkered floor, and bodies in front."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import numpy as np

from wrappers.errors import UserError
from wrappers.view import CameraPlace, CameraShift, Layers, Lighting, Palette, Part

HORIZON = -0.1
"""Height of the line between sky and floor. Scenes span [-1, 1] in both directions, y points up."""

# The defaults of dm_control's suite, so that color distractions mean the same here.
COLORS = {
    "grid1": np.array([0.1, 0.2, 0.3]),
    "grid2": np.array([0.2, 0.3, 0.4]),
    "self": np.array([0.7, 0.5, 0.3]),
    "sky": np.array([0.4, 0.6, 0.8]),
}
TARGET = np.array([0.9, 0.2, 0.2])
"""Color of what is to be reached: no color of the scene, so that the picture always tells the task."""

PALETTE: dict[Palette, dict[str, np.ndarray]] = {
    "scene": COLORS,
    "materials": {"grid": np.ones(3), "self": COLORS["self"], "target": TARGET},
    "objects": {"target": TARGET},
}
SHIFT = 0.5
"""Scene units by which the window moves for a camera that is displaced by a radian."""

AMBIENT = 0.4
"""Part of the light that comes from everywhere; the rest is a lamp straight above."""


CAMERAS: Mapping[str, float] = MappingProxyType({"front": 0.0, "left": -1.0, "right": 1.0})
"""What each is aimed at, as x of the scene: `front` sees all of it, `left` and `right` one half each, as large."""


class Body(NamedTuple):
    """A disc of radius `width / 2`, or an upright box, in front of the background."""

    shape: Literal["disc", "box"]
    x: float
    y: float
    width: float
    height: float
    is_target: bool = False


class ToyScene(Protocol):
    """What there is to draw of a task."""

    @property
    def drifted(self) -> float:
        """How far the floor has moved, in scene units."""
        ...

    def bodies(self) -> list[Body]:
        """Return what is in front of the background, the hindmost first."""
        ...


class ToyView:
    """A `wrappers.view.View` of a toy task, anti-aliased: positions show to less than a pixel."""

    parts: frozenset[Part] = frozenset(("sky", "floor"))

    def __init__(self, task: ToyScene, height: int, width: int, camera: str = "front") -> None:
        self.height, self.width = height, width
        self._middle = CAMERAS[camera]
        self._task = task
        self._cell = max(1, min(height, width) // 6)
        self._paints: dict[Palette, dict[str, np.ndarray]] = {}
        self._textures: dict[str, np.ndarray] = {}
        self._light: np.ndarray | None = None
        self.set_camera(None)

    def render(self) -> np.ndarray:
        """Return the picture, uint8 [H, W, 3]."""
        return self._rgb(self._draw(frozenset())[0])

    def render_layers(self, hidden: frozenset[Part]) -> Layers:
        """Return the picture without the `hidden` parts, and how far they would show."""
        picture, clear = self._draw(hidden)
        coverage = clear * self._hides(hidden)
        # Bodies were drawn onto black: what shines through their edges is taken out of them again.
        return Layers(self._rgb(picture / np.maximum(1 - coverage, 1e-6)), coverage)

    def foreground(self) -> np.ndarray:
        """Return where bodies fill at least half of the pixel, bool [H, W]."""
        return self._draw(frozenset())[1] <= 0.5

    def colors(self, palette: Palette = "scene") -> dict[str, np.ndarray]:
        """Return the palette's default colors by slot, float64 [3]."""
        return {slot: color.copy() for slot, color in PALETTE[palette].items()}

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette = "scene") -> None:
        """Repaint the given slots; the palette's others return to their defaults."""
        for slot in colors:
            if slot not in PALETTE[palette]:
                raise UserError.unknown("color slot", slot, PALETTE[palette])
        self._paints[palette] = dict(colors)
        scene, materials, objects = (
            self._paints.get(name, {}) for name in ("scene", "materials", "objects")
        )
        self._colors = {**COLORS, "target": TARGET, **scene, **materials, **objects}
        for slot in ("grid1", "grid2"):  # the floor's material tints both checker colors
            self._colors[slot] = self._colors[slot] * materials.get("grid", 1.0)
        self._backgrounds: dict[tuple[frozenset[Part], int], np.ndarray] = {}

    def surfaces(self) -> tuple[str, ...]:
        """Return that the floor can show a texture."""
        return ("floor",)

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        """Cover the floor with a texture, uint8 [S, S, 3], two scene units wide and high."""
        for slot in textures:
            if slot not in self.surfaces():
                raise UserError.unknown("texture slot", slot, self.surfaces())
        self._textures = dict(textures)
        self._backgrounds = {}

    def camera(self) -> CameraPlace:
        """Return that every camera looks at the scene from the front."""
        return CameraPlace(math.pi / 2)

    def set_camera(self, shift: CameraShift | None) -> None:
        """Move, turn and enlarge the window onto the scene: a flat one has no perspective."""
        height, width = self.height, self.width
        x = (np.arange(width) + 0.5) * (2 / width) - 1
        y = (1 - (np.arange(height) + 0.5) * (2 / height))[:, None]
        distance = 1.0
        if shift is not None:
            distance = shift.distance
            cosine, sine = distance * math.cos(shift.roll), distance * math.sin(shift.roll)
            x, y = cosine * x - sine * y, sine * x + cosine * y
            x, y = x + SHIFT * shift.horizontal, y - SHIFT * shift.vertical
        x = x + self._middle
        self._pixels_per_unit = min(height, width) / 2 / distance
        self._x, self._y = x.astype(np.float32), y.astype(np.float32)
        self._is_sky = self._y > HORIZON
        # Of the undisplaced window: checkers and textures lie on the floor, not on the picture.
        self._row = np.floor((1 - y) * (height / 2)).astype(np.int64)
        self._column = np.floor((x + 1) * (width / 2)).astype(np.int64)
        self.set_colors(self._paints.get("scene", {}))

    def set_lights(self, lighting: Lighting | None) -> None:
        """Tint the whole picture: what lies in front is lit as everything else."""
        self._light = None
        if lighting is not None:
            lamp = max(0.0, math.cos(lighting.tilt)) * lighting.diffuse
            light = AMBIENT * lighting.ambient + (1 - AMBIENT) * lamp
            self._light = light.astype(np.float32)[:, None, None]

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def _hides(self, parts: frozenset[Part]) -> np.ndarray:
        """Return which pixels show one of the `parts` behind all bodies, bool [H, 1 or W]."""
        return (self._is_sky & ("sky" in parts)) | (~self._is_sky & ("floor" in parts))

    def _background(self, hidden: frozenset[Part], drift: int) -> np.ndarray:
        """Return sky and floor moved by `drift` pixels, float32 [3, H, W], 0 if `hidden`."""
        if (hidden, drift) not in self._backgrounds:
            column = self._column + drift
            sky = (255 * self._colors["sky"])[:, None, None]
            if "floor" in self._textures:
                texture = self._textures["floor"]
                down = self._row * len(texture) // self.height % len(texture)
                right = column * len(texture) // self.width % len(texture)
                floor = texture[down, right].transpose(2, 0, 1)
            else:
                is_odd = (self._row // self._cell + column // self._cell) % 2 == 1
                grid1, grid2 = (
                    255 * self._colors[slot][:, None, None] for slot in ("grid1", "grid2")
                )
                floor = np.where(is_odd, grid1, grid2)
            scene = np.where(self._is_sky, sky, floor)
            self._backgrounds[hidden, drift] = (scene * ~self._hides(hidden)).astype(np.float32)
        return self._backgrounds[hidden, drift]

    def _draw(self, hidden: frozenset[Part]) -> tuple[np.ndarray, np.ndarray]:
        """Return the picture, float32 [3, H, W], and how far no body covers it, float32 [H, W]."""
        # A texture has no period of two cells: with one, drifting begins anew at the picture's width.
        period = self.width if "floor" in self._textures else 2 * self._cell
        frame = self._background(hidden, int(self._task.drifted * self.width / 2) % period)
        clear = np.ones((self.height, self.width), np.float32)
        for body in self._task.bodies():
            alpha = self._alpha(body)
            color = 255 * self._colors["target" if body.is_target else "self"]
            beside = 1 - alpha
            frame = frame * beside + alpha * color.astype(np.float32)[:, None, None]
            clear *= beside
        return frame, clear

    def _alpha(self, body: Body) -> np.ndarray:
        """Return how much of each pixel the body fills, float32 [H, W]."""
        scale = self._pixels_per_unit
        x, y = self._x - np.float32(body.x), self._y - np.float32(body.y)
        if body.shape == "disc":
            inside = (0.5 + scale * body.width / 2) - scale * np.sqrt(x * x + y * y)
            return inside.clip(0, 1)
        inside_x = (0.5 + scale * body.width / 2) - scale * np.abs(x)
        inside_y = (0.5 + scale * body.height / 2) - scale * np.abs(y)
        return inside_x.clip(0, 1) * inside_y.clip(0, 1)

    def _rgb(self, planes: np.ndarray) -> np.ndarray:
        """Return float32 [3, H, W] in [0, 255] as uint8 [H, W, 3], lit."""
        if self._light is not None:
            planes = (planes * self._light).clip(0, 255)
        rounded = (planes + np.float32(0.5)).astype(np.uint8)
        return np.ascontiguousarray(rounded.transpose(1, 2, 0))
