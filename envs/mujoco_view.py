"""A MuJoCo simulation as a `wrappers.view.View`: hide its background, repaint it, take it apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import mujoco
import numpy as np

from envs.mujoco_changes import Changes
from envs.rendering import Quality, Renderer
from envs.scenery import Scenery, find_scenery
from wrappers.errors import UserError
from wrappers.view import CameraPlace, CameraShift, Layers, Lighting, Palette, Part

Simulation = tuple[mujoco.MjModel, mujoco.MjData]


class MujocoView:
    """One camera at one size onto one MuJoCo simulation; implements `wrappers.view.View`.

    The simulation is asked for anew at every render, so a task may rebuild its model between two. A
    view leaves the model as it found it, see `envs.mujoco_changes`. GL is not touched before the
    first render.
    """

    def __init__(
        self,
        simulation: Callable[[], Simulation],
        *,
        height: int,
        width: int,
        camera: int | str | mujoco.MjvCamera | None = None,
        quality: Quality = "reference",
        scenery: Callable[[mujoco.MjModel], Scenery] = find_scenery,
        furniture: Sequence[str] = (),
        upside_down: bool = False,
    ) -> None:
        """Look at `simulation()`.

        Args:
            simulation: returns the model and its data.
            height: pixels.
            width: pixels.
            camera: a fixed camera's number or name, a free camera, or None for MuJoCo's default
                free one.
            quality: see `Renderer`.
            scenery: tells what of a model is background; asked again when the model is another.
            furniture: objects of the scenery that are no foreground, though nothing can replace them.
            upside_down: the camera hangs upside down: turn its picture by half a turn.
        """
        self.height, self.width, self.quality = height, width, quality
        self._simulation, self._find_scenery = simulation, scenery
        self._camera_name, self._upside_down = camera, upside_down
        self._furniture = frozenset(furniture)
        self._renderer: Renderer | None = None
        self._changes = Changes()
        self._look_at(simulation()[0])

    @property
    def parts(self) -> frozenset[Part]:
        """The background parts that this scene has, seen from this camera or not."""
        return frozenset(("sky", *self._scenery.geoms))

    def render(self) -> np.ndarray:
        """Return the picture, uint8 [H, W, 3], a fresh array."""
        return self._upright(self._scene().draw())

    def render_layers(self, hidden: frozenset[Part]) -> Layers:
        """Render without the `hidden` parts and tell where they would have been.

        Where no pixel is mixed of two things, coverage is the same drawing's far plane. Behind
        walls and below the floor there may be more than sky (the sides of Meta-World's table, the
        lower halves of the rims around gym/Reacher's arena): what hiding them uncovers is taken for
        hidden too, at the price of one more drawing (Meta-World: 5.7 ms of CPU without it, 10.5
        with it).
        """
        if "sky" not in hidden:
            rgb = self._upright(self._scene(hidden).draw())
            return Layers(rgb, self._shown_parts(hidden).astype(np.float32))
        layers = self._layers_before_the_far_plane(hidden)
        if any(self._scenery.geoms.get(part) for part in hidden):
            # Not where coverage is above one half: silhouettes stay soft.
            layers.coverage[self._shown_parts(hidden) & (layers.coverage < 0.5)] = 1
        return layers

    def _layers_before_the_far_plane(self, hidden: frozenset[Part]) -> Layers:
        renderer = self._scene(hidden)
        geoms = renderer.scene.geoms[: renderer.scene.ngeom]
        if self.quality == "reference" or any(geom.rgba[3] < 1 for geom in geoms):
            return self._mixed_layers(renderer)
        depth = np.empty((self.height, self.width), np.float32)
        rgb = renderer.draw(depth)
        return Layers(self._upright(rgb), self._upright(depth[::-1] == 1).astype(np.float32))

    def _mixed_layers(self, renderer: Renderer) -> Layers:
        """Take apart a picture with multisampled silhouettes or transparent things.

        Coverage is how much of a white wall behind everything shows, and the foreground is what
        remains of the picture without its share of sky. The three drawings besides the picture
        itself are cheap: no shadows, no reflections.
        """
        scene, flag = renderer.scene, mujoco.mjtRndFlag
        flags = scene.flags.copy()
        scene.flags[flag.mjRND_SKYBOX] = True
        picture = renderer.draw()
        geoms, scene.ngeom = scene.ngeom, 0
        sky = renderer.draw()
        scene.ngeom = geoms
        for effect in (flag.mjRND_SKYBOX, flag.mjRND_SHADOW, flag.mjRND_REFLECTION):
            scene.flags[effect] = False
        before_black = renderer.draw()
        _add_backdrop(scene)
        before_white = renderer.draw()
        scene.flags[:] = flags
        coverage = (before_white.astype(np.float32) - before_black).max(2).clip(0, 255) / 255
        behind = coverage[..., None]
        share = np.maximum(1 - behind, 1 / 255)
        front = np.where(behind < 1, (picture - behind * sky) / share, 0).clip(0, 255).round()
        return Layers(self._upright(front.astype(np.uint8)), self._upright(coverage))

    def foreground(self) -> np.ndarray:
        """Return where the picture shows neither sky, floor, walls nor furniture, bool [H, W]."""
        furniture = (
            geom
            for slot, paint in self._scenery.objects.items()
            if slot.rstrip("0123456789")
            in self._furniture  # a body of several looks has several slots
            for geom in paint.geoms
        )
        return ~self._shown_parts(self.parts, furniture)

    def visible_parts(self) -> frozenset[Part]:
        """Return the background parts of which at least one pixel is seen now."""
        return frozenset(part for part in self.parts if self._shown_parts(frozenset((part,))).any())

    def colors(self, palette: Palette = "scene") -> dict[str, np.ndarray]:
        """Return the palette's colors by slot, float64 [3] in [0, 1], as the simulator ships them."""
        paints = self._scenery.palette(palette)
        return {slot: paint.color.copy() for slot, paint in paints.items()}

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette = "scene") -> None:
        """Repaint the given slots until the next call; the others return to their own colors."""
        self._changes.set_colors(colors, palette)

    def surfaces(self) -> tuple[str, ...]:
        """Return the slots that can show another texture."""
        return tuple(self._scenery.surfaces)

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        """Cover the given slots with uint8 [S, S, 3] until the next call."""
        self._changes.set_textures(textures)

    def camera(self) -> CameraPlace:
        """Return where the camera stands in the model's own pose."""
        return self._changes.place(self._camera)

    def set_camera(self, shift: CameraShift | None) -> None:
        """Displace the camera until the next call; None puts it back."""
        self._changes.camera = shift

    def set_lights(self, lighting: Lighting | None) -> None:
        """Change the lights until the next call; None leaves them as the model has them."""
        self._changes.lighting = lighting

    def close(self) -> None:
        """Free what the view holds in GL; the next render would make it anew."""
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = None
        self._changes.forget_uploads()

    def _look_at(self, model: mujoco.MjModel) -> None:
        self.close()
        self._model, self._scenery = model, self._find_scenery(model)
        self._camera = find_camera(model, self._camera_name)
        self._changes.look_at(model, self._scenery)

    def _scene(self, hidden: frozenset[Part] = frozenset()) -> Renderer:
        """Return the renderer with the simulation's current scene in it."""
        model, data = self._simulation()
        if model is not self._model:
            self._look_at(model)
        if self._renderer is None:
            self._renderer = Renderer(model, self.height, self.width, quality=self.quality)
        self._changes.upload(self._renderer)
        scene = self._renderer.scene
        scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = "sky" not in hidden
        with self._changes.dressed(hidden):
            self._renderer.update(data, self._camera)
        self._changes.adjust(scene, self._camera)
        return self._renderer

    def _shown_parts(self, parts: frozenset[Part], others: Iterable[int] = ()) -> np.ndarray:
        """Return the pixels that show any of `parts`, or of the geoms `others`, bool [H, W]."""
        renderer = self._scene()
        scene, flags = renderer.scene, renderer.scene.flags
        kept = flags.copy()
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        try:
            codes = renderer.draw().astype(np.int32)
        finally:
            flags[:] = kept
        numbers = codes[..., 0] + (codes[..., 1] << 8) + (codes[..., 2] << 16)
        background = {id_ for part in parts for id_ in self._scenery.geoms.get(part, ())}
        background.update(others)
        shown = np.zeros(scene.ngeom + 1, bool)
        shown[0] = "sky" in parts
        for geom in scene.geoms[: scene.ngeom]:
            is_part = geom.objid in background and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM
            shown[geom.segid + 1] |= bool(is_part and geom.segid >= 0)
        return self._upright(shown[numbers])

    def _upright(self, pixels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(pixels[::-1, ::-1] if self._upside_down else pixels)


def find_camera(
    model: mujoco.MjModel, name: int | str | mujoco.MjvCamera | None
) -> mujoco.MjvCamera:
    """Return the camera that `name` stands for.

    Raises:
        UserError: if the model has no such camera.
    """
    if isinstance(name, mujoco.MjvCamera):
        return name
    camera = mujoco.MjvCamera()
    if name is None or name == -1:
        mujoco.mjv_defaultFreeCamera(model, camera)
        return camera
    names = [model.camera(i).name or str(i) for i in range(model.ncam)]
    number = names.index(name) if name in names else int(name) if str(name).isdigit() else -1
    if not 0 <= number < model.ncam:
        raise UserError.unknown("camera", str(name), names)
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED.value, number
    return camera


def _add_backdrop(scene: mujoco.MjvScene) -> None:
    """Put a white, self-luminous wall behind everything in the scene."""
    eye = scene.camera[0]
    distance = 0.95 * eye.frustum_far
    axes = np.stack([np.cross(eye.forward, eye.up), eye.up, -eye.forward], axis=1)
    geom = scene.geoms[scene.ngeom]
    mujoco.mjv_initGeom(
        geom,
        mujoco.mjtGeom.mjGEOM_BOX.value,
        np.array([5 * distance, 5 * distance, 1e-4 * distance]),
        (eye.pos + distance * eye.forward).astype(np.float64),
        axes.astype(np.float64).ravel(),
        np.ones(4, np.float32),
    )
    geom.emission = 1
    scene.ngeom += 1
