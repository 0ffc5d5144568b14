"""One owner of GL for every simulator: which backend draws, how well, and who frees what.

All renderers of a process share one GL context, which is current only inside `_Context`'s block;
whatever was current before (dm_control's or Gymnasium's own renderer) is current again afterwards.
So renderers cannot delete or draw over each other's GL objects, which MuJoCo's own do silently
(google-deepmind/mujoco#1186).

Milliseconds of CPU for an 84 x 84 frame (software GL, Mesa 22.3): dm_control's `physics.render` takes
16 to 37, `reference` with the same pixels 13 to 34, `fast` 0.3 to 0.6; Meta-World's `render` takes
90, `reference` 88, `fast` 6. EGL and OSMesa are equally fast (walker 0.35 and 0.34), so EGL, which
also finds GPUs, is tried first.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wrappers.errors import UserError

if TYPE_CHECKING:
    import mujoco

Quality = Literal["reference", "fast"]
Change = tuple[np.ndarray, Any, Any]
"""An array of a model, where to change it, and to what."""

_BACKENDS = ("egl", "osmesa")

_NO_GL = (
    "no headless OpenGL works here (MUJOCO_GL={}): install one with 'apt-get install libegl1 "
    "libgl1-mesa-dri' (EGL) or 'apt-get install libosmesa6' (OSMesa), and unset MUJOCO_GL"
)

_PROBE = """
from mujoco.{backend} import GLContext
from OpenGL import GL
context = GLContext(1, 1)
context.make_current()
print(GL.glGetString(GL.GL_RENDERER).decode())
context.free()
"""

_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software", "swiftshader")

_RENDERER_VARIABLE = "SIGHTLINE_GL_RENDERER"
"""Remembers the probe's answer for child processes, which would otherwise each spend 0.5 s on it."""


@functools.cache
def _probe(backend: str) -> str | None:
    """Return what `backend` calls its renderer, or None if it cannot draw.

    A process of its own bears what broken drivers do: crash, hang, or leave half of PyOpenGL bound
    to a platform that does not work.
    """
    environment = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", _PROBE.format(backend=backend)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[0] if done.returncode == 0 and lines[0] else None


def choose_backend() -> str:
    """Set `MUJOCO_GL` unless the user did, and return it; call before importing a simulator.

    Returns:
        `egl`, else `osmesa`, else `disable`: simulators then import and step, and drawing raises
        `UserError`.
    """
    if not os.environ.get("MUJOCO_GL"):
        found = ((backend, _probe(backend)) for backend in _BACKENDS)
        backend, renderer = next(((b, r) for b, r in found if r), ("disable", None))
        os.environ["MUJOCO_GL"] = backend
        if renderer:
            os.environ[_RENDERER_VARIABLE] = renderer
    return os.environ["MUJOCO_GL"].lower().strip()


def gl_renderer() -> str:
    """Return GL's own name of what draws, such as `llvmpipe (LLVM 15.0.6, 256 bits)`.

    Raises:
        UserError: if nothing can draw.
    """
    backend = choose_backend()
    if _RENDERER_VARIABLE not in os.environ:
        renderer = _probe(backend) if backend in _BACKENDS else None
        if renderer is None:
            raise UserError(_NO_GL.format(backend))
        os.environ[_RENDERER_VARIABLE] = renderer
    return os.environ[_RENDERER_VARIABLE]


def resolve_quality(quality: str) -> Quality:
    """Return `reference` or `fast`; `auto` is `fast` where GL runs in software and `reference` on a GPU.

    Call it before the first import of a simulator: a fast frame is so small that llvmpipe's threads
    cost more than they bring (walker 0.44 ms with them, 0.35 without), and their number is read when
    GL is loaded. So the quality that is asked for first decides for its process: where it is
    `reference`, which they speed up, they stay on.
    """
    if quality not in ("auto", "reference", "fast"):
        raise UserError.unknown("quality", quality, ("auto", "reference", "fast"))
    if quality == "auto":
        software = any(name in gl_renderer().lower() for name in _SOFTWARE)
        quality = "fast" if software else "reference"
    if quality == "fast":
        os.environ.setdefault("LP_NUM_THREADS", "0")
    return quality  # type: ignore[return-value]


class _Context:
    """This process's GL context: `with context: ...` makes it current and then restores what was.

    Any thread may enter, one at a time. Entering again inside is free, so that a renderer which the garbage
    collector closes in the middle of another one's frame does no harm.
    """

    def __init__(self) -> None:
        gl_renderer()  # raises UserError where the imports below would fail in many other ways
        self._backend = choose_backend()
        if self._backend == "egl":
            from mujoco import egl

            self._egl: Any = egl
            context: Any = egl.GLContext
        else:
            from mujoco.osmesa import GLContext
            from OpenGL import osmesa

            self._osmesa: Any = osmesa
            context = GLContext
        self.process = os.getpid()
        self.renderers: weakref.WeakSet[Renderer] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._depth = 0
        before = self._current()
        self._gl = context(1, 1)
        self._restore(before)
        if self._backend == "egl":
            # All libraries share one display: who ends it at exit makes the others' frees fail.
            atexit.unregister(self._egl.EGL.eglTerminate)
        atexit.register(self._shut_down)

    def __enter__(self) -> None:
        if os.getpid() != self.process:
            raise UserError(
                "GL was used before this process was forked and cannot be used in it; start workers "
                "with multiprocessing's 'forkserver' or 'spawn' instead of 'fork'"
            )
        self._lock.acquire()
        try:
            if self._depth == 0:
                self._before = self._current()
                self._gl.make_current()
        except BaseException:
            self._lock.release()
            raise
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore(self._before)
        self._lock.release()

    def _current(self) -> tuple[Any, ...]:
        if self._backend == "egl":
            api = self._egl.EGL
            surfaces = [api.eglGetCurrentSurface(kind) for kind in (api.EGL_DRAW, api.EGL_READ)]
            return api.eglGetCurrentDisplay(), *surfaces, api.eglGetCurrentContext()
        context = self._osmesa.OSMesaGetCurrentContext()
        return context, self._osmesa.OSMesaGetColorBuffer(context) if context else None

    def _restore(self, before: tuple[Any, ...]) -> None:
        if self._backend == "egl":
            display = before[0] or self._egl.EGL_DISPLAY
            self._egl.EGL.eglMakeCurrent(display, *before[1:])
            return
        context, buffer = before
        width, height, _, pixels = buffer if context else (0, 0, None, None)
        # 0x1406 is GL_FLOAT, as which every MuJoCo suite lays out its OSMesa buffer.
        self._osmesa.OSMesaMakeCurrent(context or None, pixels, 0x1406, width, height)

    def _shut_down(self) -> None:
        if os.getpid() != self.process:
            return
        # A simulator that was imported later has ended the display by now: nothing is left to free.
        with contextlib.suppress(Exception):
            for renderer in list(self.renderers):
                renderer.close()
            self._gl.free()
        # Its `__del__` would try once more: here in vain, but later amid modules that are gone.
        self._gl._context = None
        self._gl = None


_FAST_QUALITY = {"offsamples": 0, "shadowsize": 0, "numslices": 16, "numstacks": 8}
"""Spheres and capsules get a quarter of the triangles: at 84 pixels nobody sees, at half the time."""


@functools.cache
def _context() -> _Context:
    return _Context()


class Renderer:
    """Draws one model at one size: `update` takes a scene from the simulation, `draw` its pixels.

    Attributes:
        model: the model whose meshes and textures lie in GL.
        scene: what the next `draw` draws; callers may change flags and geoms after `update`.
        option: what of the model `update` puts into the scene.
    """

    def __init__(
        self, model: mujoco.MjModel, height: int, width: int, *, quality: Quality = "reference"
    ) -> None:
        """Upload `model` to GL; `reference` draws exactly what the simulator's own renderer does."""
        import mujoco

        self._mujoco = mujoco
        self.model = model
        self.height, self.width, self.quality = height, width, quality
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self.option = mujoco.MjvOption()
        # dm_control hides what its rangefinders measure; no other suite has any.
        self.option.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = False
        # Tendons and lights add to the model's own geoms.
        self.scene = mujoco.MjvScene(model, maxgeom=1000 + 4 * (model.ngeom + model.nsite))
        if quality == "fast":
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._texels = _smaller_skies(model, max(height, width)) if quality == "fast" else {}
        self._gl = _context()
        with self._gl, self._suited_model(self._texels):
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        self._heights = model.hfield_data.copy()
        self._gl.renderers.add(self)

    def update(self, data: mujoco.MjData, camera: mujoco.MjvCamera) -> None:
        """Take the scene from the simulation as `camera` sees it."""
        mujoco = self._mujoco
        mujoco.mjv_updateScene(
            self.model,
            data,
            self.option,
            None,
            camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self.scene,
        )
        if self.quality == "fast":
            # GL lights vertices, and planes have few of them here: a spotlight would flicker as it
            # follows the robot over them. As a sun it lights the floor evenly.
            for light in self.scene.lights[: self.scene.nlight]:
                light.type = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL.value
        # Terrains are drawn anew every episode (quadruped-escape).
        if self._heights.size and not np.array_equal(self._heights, self.model.hfield_data):
            self._heights[:] = self.model.hfield_data
            with self._gl:
                for terrain in range(self.model.nhfield):
                    mujoco.mjr_uploadHField(self.model, self._context, terrain)

    def draw(self, depth: np.ndarray | None = None) -> np.ndarray:
        """Return the scene's pixels, uint8 [height, width, 3], a view of a fresh array.

        Args:
            depth: float32 [height, width], filled with the same drawing's depth buffer *bottom row
                first*: 1 is the far plane, where nothing was drawn.
        """
        if self._context is None:
            raise RuntimeError("this renderer is closed")
        pixels = np.empty((self.height, self.width, 3), np.uint8)
        mujoco = self._mujoco
        with self._gl:
            # Renderers share a context, and MuJoCo binds a renderer's buffer only when told to.
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
            mujoco.mjr_render(self._rectangle, self.scene, self._context)
            mujoco.mjr_readPixels(pixels, depth, self._rectangle, self._context)
        return pixels[::-1]

    def texels(self, texture: int) -> np.ndarray:
        """Return a copy of what a new renderer uploads, uint8 [height, width, channels]."""
        return self._texels.get(texture, texture_data(self.model, texture)).copy()

    def upload_texture(self, texture: int, texels: np.ndarray) -> None:
        """Give GL other texels for one of the model's textures; the model keeps its own.

        Args:
            texture: its id in the model.
            texels: uint8, of the shape that `texels` returned.
        """
        with self._gl, self._suited_model({texture: texels}):
            self._mujoco.mjr_uploadTexture(self.model, self._context, texture)

    def close(self) -> None:
        """Free what lies in GL, with our context current: MuJoCo deletes by number in any that is."""
        context, self._context = getattr(self, "_context", None), None
        if context is not None and os.getpid() == self._gl.process:
            with self._gl:
                context.free()

    def __del__(self) -> None:
        # At interpreter exit modules may be gone before their objects.
        with contextlib.suppress(Exception):
            self.close()

    @contextlib.contextmanager
    def _suited_model(self, texels: Mapping[int, np.ndarray]) -> Iterator[None]:
        """Change in the model what GL takes from it, for as long as GL does."""
        model, visual = self.model, self.model.vis
        settings = [(visual.global_, {"offheight": self.height, "offwidth": self.width})]
        arrays = [change for item in texels.items() for change in _other_texels(model, *item)]
        if self.quality == "fast":
            settings.append((visual.quality, _FAST_QUALITY))
            arrays.append(_coarser_planes(model))
        own_settings = [{name: getattr(owner, name) for name in new} for owner, new in settings]
        own_arrays = [np.copy(array[where]) for array, where, _ in arrays]
        try:
            for owner, new in settings:
                _set(owner, new)
            for array, where, values in arrays:
                array[where] = values
            yield
        finally:
            for (owner, _), old in zip(settings, own_settings, strict=True):
                _set(owner, old)
            for (array, where, _), values in zip(arrays, own_arrays, strict=True):
                array[where] = values


def _coarser_planes(model: mujoco.MjModel) -> Change:
    """Draw planes as at most 24 x 24 quads; humanoid's floor is 200 x 200 (1.5 of 2 ms a frame)."""
    planes = np.flatnonzero(model.geom_type == 0)  # mjGEOM_PLANE
    spacing = np.maximum(model.geom_size[planes, 2], model.geom_size[planes, :2].max(1) / 12)
    return model.geom_size, (planes, 2), spacing


def _smaller_skies(model: mujoco.MjModel, size: int) -> dict[int, np.ndarray]:
    """Return skyboxes halved until they hardly outnumber the picture's pixels: 0.7 of 11 MB."""
    skies = {}
    for texture in np.flatnonzero(model.tex_type == 2).tolist():  # mjTEXTURE_SKYBOX
        texels = texture_data(model, texture)
        factor = 1
        while texels.shape[1] % (2 * factor) == 0 and texels.shape[1] // (2 * factor) >= 2 * size:
            factor *= 2
        offsets = itertools.product(range(factor), repeat=2)
        parts = [texels[i::factor, j::factor].astype(np.uint16) for i, j in offsets]
        skies[texture] = (sum(parts[1:], parts[0]) // factor**2).astype(np.uint8)
    return skies


def _other_texels(model: mujoco.MjModel, texture: int, texels: np.ndarray) -> list[Change]:
    start = model.tex_adr[texture]
    return [
        (model.tex_data, slice(start, start + texels.size), texels.ravel()),
        (model.tex_height, texture, texels.shape[0]),
        (model.tex_width, texture, texels.shape[1]),
    ]


def texture_data(model: mujoco.MjModel, texture: int) -> np.ndarray:
    """Return the model's own texels of one texture, uint8 [height, width, channels], not a copy."""
    shape = [
        int(array[texture]) for array in (model.tex_height, model.tex_width, model.tex_nchannel)
    ]
    start = int(model.tex_adr[texture])
    return model.tex_data[start : start + int(np.prod(shape))].reshape(shape)


def _set(owner: object, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def main() -> int:
    """Print the backend and GL's renderer; exit code 2 and one line where nothing can draw."""
    try:
        renderer = gl_renderer()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{choose_backend()}: {renderer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
