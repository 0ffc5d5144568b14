"""How a MuJoCo picture may be made to look other than its model: colors, textures, camera, lights.

Nothing of it stays in the model: colors and hidden parts stand in it only while a scene is taken,
textures are changed in GL alone, camera and lights in the scene that was taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import mujoco
import numpy as np

from envs.rendering import Renderer
from envs.scenery import STAR_SKIES, Scenery, geom_color
from wrappers.errors import UserError
from wrappers.view import PALETTES, CameraPlace, CameraShift, Lighting, Palette, Part

OVERHEAD = 0.35
"""Radians from the vertical up to which a camera counts as looking straight down."""

_HIDDEN_GROUP = 5
"""MuJoCo shows groups 0 to 2 unless told otherwise."""


class Changes:
    """What is wanted of one view's appearance, and the means to get it.

    Attributes:
        camera: how the camera is displaced, None for not at all.
        lighting: how the lights are changed, None for not at all.
    """

    def __init__(self) -> None:
        self.camera: CameraShift | None = None
        self.lighting: Lighting | None = None
        self._colors: dict[Palette, dict[str, np.ndarray]] = {name: {} for name in PALETTES}
        self._textures: dict[str, tuple[int, np.ndarray]] = {}
        self._texture_numbers = count()
        self._uploaded: dict[int, object] = {}

    def look_at(self, model: mujoco.MjModel, scenery: Scenery) -> None:
        """Go on with another model: what it lacks is forgotten."""
        self._model, self._scenery = model, scenery
        for name, colors in self._colors.items():
            slots = scenery.palette(name)
            self._colors[name] = {slot: rgb for slot, rgb in colors.items() if slot in slots}
        surfaces = scenery.surfaces
        self._textures = {slot: t for slot, t in self._textures.items() if slot in surfaces}

    def forget_uploads(self) -> None:
        """Take note that the renderer, and with it every texture in GL, is a new one."""
        self._uploaded = {}

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette) -> None:
        """Repaint the given slots; the palette's other slots return to their own colors."""
        known = self._scenery.palette(palette)
        for slot in colors:
            if slot not in known:
                raise UserError.unknown("color slot", slot, known)
        self._colors[palette] = {slot: np.array(rgb, np.float64) for slot, rgb in colors.items()}

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        """Cover the given slots; the others return to their own textures."""
        for slot in textures:
            if slot not in self._scenery.surfaces:
                raise UserError.unknown("texture slot", slot, self._scenery.surfaces)
        self._textures = {slot: (next(self._texture_numbers), t) for slot, t in textures.items()}

    @contextmanager
    def dressed(self, hidden: frozenset[Part]) -> Iterator[None]:
        """Hide parts and paint the model for as long as a scene is taken from it."""
        model, scenery = self._model, self._scenery
        changes: list[tuple[np.ndarray, Sequence[int], object]] = []
        for part in sorted(hidden - {"sky"}):
            changes.append((model.geom_group, scenery.geoms.get(part, ()), _HIDDEN_GROUP))
        for palette in ("scene", "materials"):
            for slot, color in self._colors[palette].items():
                paint = scenery.palette(palette)[slot]
                changes.append((model.mat_rgba[:, :3], paint.materials, color))
                changes.append((model.geom_rgba[:, :3], paint.geoms, color))
        for slot, color in self._colors["objects"].items():
            geoms = scenery.objects[slot].geoms
            # All four: a color that is not the default replaces the material's, opacity included.
            opacity = [geom_color(model, geom)[3] for geom in geoms]
            changes.append((model.geom_rgba, geoms, [(*color, alpha) for alpha in opacity]))
        changes = [(array, list(ids), value) for array, ids, value in changes if len(ids)]
        kept = [array[ids] for array, ids, _ in changes]
        try:
            for array, ids, value in changes:
                array[ids] = value
            yield
        finally:
            for (array, ids, _), values in zip(changes, kept, strict=True):
                array[ids] = values

    def upload(self, renderer: Renderer) -> None:
        """Bring GL's textures in line with the colors and textures that were set."""
        wanted: dict[int, tuple[object, dict[str, np.ndarray], np.ndarray | None]] = {}
        for slot, paint in self._scenery.paints.items():
            if paint.texture >= 0:
                _, colors, _ = wanted.get(paint.texture, (None, {}, None))
                if slot in self._colors["scene"]:
                    colors[slot] = self._colors["scene"][slot]
                painted = tuple((slot, color.tobytes()) for slot, color in colors.items())
                wanted[paint.texture] = painted, colors, None
        for slot, texture in self._scenery.surfaces.items():
            if slot in self._textures:
                number, texels = self._textures[slot]
                wanted[texture] = number, {}, texels
            else:
                wanted.setdefault(texture, ((), {}, None))
        for texture, (key, colors, cover) in wanted.items():
            if self._uploaded.get(texture, ()) == key:
                continue
            own = renderer.texels(texture)
            new = self._repaint(own, colors) if cover is None else _covered(own, cover)
            renderer.upload_texture(texture, new)
            self._uploaded[texture] = key

    def _repaint(self, texels: np.ndarray, colors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return texels with the slots' own colors replaced by `colors`."""
        repainted = texels.copy()
        for slot, color in colors.items():
            old, new = _bytes(self._scenery.paints[slot].color), _bytes(color)
            if slot == "sky":
                # A gradient that ends in black: scale what is not a star.
                for channel in range(3):
                    table = (np.arange(256) * (new[channel] / max(1, old[channel]))).clip(0, 255)
                    if old.max() < STAR_SKIES:
                        table[255] = 255
                    repainted[..., channel] = table.round().astype(np.uint8)[texels[..., channel]]
            else:
                repainted[(texels == old).all(-1)] = new
        return repainted

    def place(self, camera: mujoco.MjvCamera) -> CameraPlace:
        """Return where a camera stands in the model's own pose."""
        return _place(self._backward(camera))

    def _backward(self, camera: mujoco.MjvCamera) -> np.ndarray:
        """Return the direction from what the camera looks at to the camera, float64 [3]."""
        if camera.type == mujoco.mjtCamera.mjCAMERA_FIXED:
            return self._model.cam_mat0[camera.fixedcamid].reshape(3, 3)[:, 2]
        azimuth, elevation = math.radians(camera.azimuth), math.radians(camera.elevation)
        level = math.cos(elevation)
        forward = (level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation))
        return -np.array(forward)

    def _distance(self, camera: mujoco.MjvCamera) -> float:
        """Return how far away the point is that a camera looks at.

        As in the Distracting Control Suite, the center of mass of what the camera belongs to (all
        bodies, for one that belongs to none) is as far; here in the model's own pose, so that
        a camera that stands still does so however bodies move.
        """
        if camera.type == mujoco.mjtCamera.mjCAMERA_FIXED:
            return float(np.linalg.norm(self._model.cam_poscom0[camera.fixedcamid]))
        return float(camera.distance)

    def adjust(self, scene: mujoco.MjvScene, camera: mujoco.MjvCamera) -> None:
        """Displace the camera and change the lights in a scene that was just taken."""
        if self.camera is None and self.lighting is None:
            return
        eyes = scene.camera
        forward = np.array(eyes[0].forward, np.float64)
        pivot = _middle(eyes) + self._distance(camera) * forward
        if self.lighting is not None:
            _relight(scene, self.lighting, pivot)
        if self.camera is not None:
            is_overhead = self.place(camera).is_overhead
            _displace(eyes, self.camera, pivot, is_overhead)
            for light in scene.lights[: scene.nlight]:
                if light.headlight:
                    light.pos[:] = _middle(eyes)
                    light.dir[:] = eyes[0].forward


def _middle(eyes: Sequence[mujoco.MjvGLCamera]) -> np.ndarray:
    """Return where the two cameras of a scene, one per eye, are on average, float64 [3]."""
    return (np.array(eyes[0].pos, np.float64) + eyes[1].pos) / 2


def _place(backward: np.ndarray) -> CameraPlace:
    inclination = math.acos(min(1.0, max(-1.0, float(backward[2]))))
    if inclination < OVERHEAD:
        return CameraPlace(math.pi / 2, is_overhead=True)
    return CameraPlace(inclination)


def _displace(
    eyes: Sequence[mujoco.MjvGLCamera], shift: CameraShift, pivot: np.ndarray, is_overhead: bool
) -> None:
    """Move the cameras on the sphere around `pivot`, then roll them."""
    forward, up = (np.array(v, np.float64) for v in (eyes[0].forward, eyes[0].up))
    axis = up if is_overhead else np.array((0.0, 0.0, 1.0))
    sideways = _cross(axis, -forward)
    if math.sqrt(sideways @ sideways) < 1e-6:  # a camera on a body may come to look along the axis
        sideways = _cross(forward, up)
    turn = rotation(axis, shift.horizontal) @ rotation(sideways, shift.vertical)
    roll = rotation(turn @ -forward, shift.roll)
    for eye in eyes:
        offset = np.asarray(eye.pos, np.float64) - pivot
        eye.pos[:] = pivot + shift.distance * (turn @ offset)
        eye.forward[:], eye.up[:] = turn @ forward, roll @ turn @ up


def _relight(scene: mujoco.MjvScene, lighting: Lighting, pivot: np.ndarray) -> None:
    """Tilt lamps around the points they shine at, as far away as `pivot`, and change colors."""
    direction = lighting.direction
    axis = np.array((-math.sin(direction), math.cos(direction), 0.0))
    tilt = rotation(axis, lighting.tilt)
    for light in scene.lights[: scene.nlight]:
        gain = lighting.diffuse * (lighting.headlight if light.headlight else 1.0)
        light.diffuse[:] = light.diffuse * gain
        light.specular[:] = light.specular * gain
        light.ambient[:] = light.ambient * lighting.ambient
        if not light.headlight:
            toward = np.array(light.dir, np.float64)
            target = light.pos + np.linalg.norm(light.pos - pivot) * toward
            light.pos[:] = target + tilt @ (light.pos - target)
            light.dir[:] = tilt @ toward


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the rotation by `angle` radians about `axis`, float64 [3, 3] (Rodrigues' formula)."""
    # Plain numbers: several rotations per picture, and NumPy takes 20 us for a cross product.
    x, y, z = axis.tolist()
    length = math.sqrt(x * x + y * y + z * z)
    x, y, z = x / length, y / length, z / length
    sine, cosine = math.sin(angle), math.cos(angle)
    rest = 1 - cosine
    return np.array((
        (cosine + rest * x * x, rest * x * y - sine * z, rest * x * z + sine * y),
        (rest * x * y + sine * z, cosine + rest * y * y, rest * y * z - sine * x),
        (rest * x * z - sine * y, rest * y * z + sine * x, cosine + rest * z * z),
    ))  # fmt: skip


def _cross(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    a, b, c = left.tolist()
    d, e, f = right.tolist()
    return np.array((b * f - c * e, c * d - a * f, a * e - b * d))


def _covered(own: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Return `cover`, uint8 [S, S, 3], in the form of the texels that it replaces.

    Never more texels than they were: what GL takes lies where the model's own texture does. Cubes
    have six faces below each other, or one that is shown on all.
    """
    height, width, channels = own.shape
    faces = 6 if height == 6 * width else 1
    side = min(height // faces, width, len(cover))
    places = np.arange(side) * len(cover) // side
    face = cover[places][:, places]
    if channels > 3:
        face = np.concatenate((face, np.full((side, side, channels - 3), 255, np.uint8)), axis=2)
    return np.ascontiguousarray(np.tile(face[..., :channels], (faces, 1, 1)))


def _bytes(color: np.ndarray) -> np.ndarray:
    return (np.clip(color, 0, 1) * 255).round().astype(np.uint8)
