"""Any Gymnasium task as an adapter: actions in [-1, 1], a flat observation, pictures, exact resume.

MuJoCo tasks are seen through the same renderer as the other suites, all others through their own
`render()`. Differences from the task as registered: bounded continuous actions are rescaled to [-1,
1], observations are flattened to float32 (a discrete one becomes one-hot), and MuJoCo tasks are
seen from their `track` camera where they have one: Gymnasium's own default camera stands still and
a running agent leaves the picture.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from PIL import Image

from envs.rendering import Quality, choose_backend, resolve_quality
from wrappers.errors import UserError
from wrappers.view import CameraPlace, CameraShift, Layers, Lighting, Palette, Part

choose_backend()

import mujoco  # noqa: E402

from envs import snapshot  # noqa: E402
from envs.mujoco_view import MujocoView, Simulation  # noqa: E402

# Read when a task that draws itself imports pygame. It draws into memory: without a screen SDL need
# not look for one, which prints an error line per environment.
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
if not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


class FrameView:
    """The picture of a task that draws itself: it has no parts, so no distraction applies."""

    parts: frozenset[Part] = frozenset()

    def __init__(self, env: gymnasium.Env, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._env = env

    def render(self) -> np.ndarray:
        """Return the task's own frame, resized by averaging over areas, uint8 [H, W, 3]."""
        frame = Image.fromarray(np.asarray(self._env.render(), np.uint8))
        resized = frame.resize((self.width, self.height), Image.Resampling.BOX)
        return np.array(resized)

    def render_layers(self, hidden: frozenset[Part]) -> Layers:
        """Return the frame as pure foreground."""
        return Layers(self.render(), np.zeros((self.height, self.width), np.float32))

    def foreground(self) -> np.ndarray:
        """Return that everything counts as foreground, bool [H, W]."""
        return np.ones((self.height, self.width), bool)

    def colors(self, palette: Palette = "scene") -> dict[str, np.ndarray]:
        """Return that no color can be set."""
        return {}

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette = "scene") -> None:
        """Refuse any color."""
        for slot in colors:
            raise UserError.unknown("color slot", slot, ())

    def surfaces(self) -> tuple[str, ...]:
        """Return that nothing can be covered."""
        return ()

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        """Refuse any texture."""
        for slot in textures:
            raise UserError.unknown("texture slot", slot, ())

    def camera(self) -> CameraPlace | None:
        """Return that there is no camera."""
        return None

    def set_camera(self, shift: CameraShift | None) -> None:
        """Do nothing: there is no camera."""

    def set_lights(self, lighting: Lighting | None) -> None:
        """Do nothing: there are no lights."""

    def close(self) -> None:
        """Do nothing: the task frees its window itself."""


class GymnasiumTask(gymnasium.Env):
    """One Gymnasium task at its own control rate.

    Observation: float32 [D]. Action: float32 [A] in [-1, 1], or Discrete as the task has it.
    `info` is the task's; an `is_success` in it is repeated as `info["success"]`, 0.0 or 1.0.

    Args:
        task: any id that `gymnasium.make` takes, such as `HalfCheetah-v5`.
        episode_length: steps until `truncated`; None is the task's own, which may have none.
        **settings: go to the task's constructor.
    """

    def __init__(self, task: str, *, episode_length: int | None = None, **settings: Any) -> None:
        self.task = task
        self._env = _make(task, episode_length, settings)
        self.episode_length = self._env.spec.max_episode_steps if self._env.spec else None
        self.render_mode = "rgb_array"
        fps = self._env.metadata.get("render_fps") or 30
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}

        if not self._env.observation_space.is_np_flattenable:
            raise _unsupported(task, "observation", self._env.observation_space)
        flat: Any = spaces.flatten_space(self._env.observation_space)
        self.observation_space = spaces.Box(
            flat.low.astype(np.float32), flat.high.astype(np.float32)
        )
        self.action_space = _normalized(task, self._env.action_space)
        self._in_episode = False
        self._view: MujocoView | FrameView | None = None

    @property
    def default_camera(self) -> str | None:
        """`track` where the task has such a camera, otherwise where Gymnasium puts its own."""
        simulation = self._physics()
        if simulation is None:
            return None
        names = [simulation[0].camera(number).name for number in range(simulation[0].ncam)]
        return "track" if "track" in names else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; the task's own generator goes on where no seed is given."""
        super().reset(seed=seed)
        observation, info = self._env.reset(seed=seed, options=options)
        self._in_episode = True
        return self._flat(observation), dict(info)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by one step of the task."""
        if not self._in_episode:
            raise gymnasium.error.ResetNeeded("the episode has not begun or is over: call reset()")
        observation, reward, terminated, truncated, info = self._env.step(self._to_task(action))
        self._in_episode = not (terminated or truncated)
        info = dict(info)
        if "is_success" in info:
            info["success"] = float(info["is_success"])
        return self._flat(observation), float(reward), bool(terminated), bool(truncated), info

    def _flat(self, observation: Any) -> np.ndarray:
        flat = spaces.flatten(self._env.observation_space, observation)
        return np.asarray(flat, np.float32)

    def _to_task(self, action: Any) -> Any:
        space: Any = self._env.action_space
        if isinstance(space, spaces.Discrete):
            return space.start + action
        low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
        unit = np.clip(np.asarray(action, np.float64), -1, 1).reshape(space.shape)
        return ((high + low) / 2 + (high - low) / 2 * unit).astype(space.dtype)

    def view(
        self,
        height: int,
        width: int,
        camera: str | int | None = None,
        quality: Quality = "reference",
    ) -> MujocoView | FrameView:
        """Return a picture of the task; a task that draws itself has one camera and one quality."""
        simulation = self._physics()
        if simulation is not None:
            camera = self.default_camera if camera is None else camera
            return MujocoView(
                lambda: self._physics() or simulation,
                height=height,
                width=width,
                camera=self._free_camera(simulation[0]) if camera is None else camera,
                quality=quality,
            )
        if camera is not None:
            raise UserError(f"gym/{self.task} has one camera only; leave out camera '{camera}'")
        if self._env.render_mode != "rgb_array":
            raise UserError(f"gym/{self.task} has no picture; observe its state instead")
        return FrameView(self._env, height, width)

    def _free_camera(self, model: mujoco.MjModel) -> mujoco.MjvCamera:
        """Return the camera that Gymnasium itself looks through where the model has none to follow.

        Gymnasium aims it at whatever pose is rendered first; here it is always the model's own
        pose.
        """
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        camera = mujoco.MjvCamera()
        camera.lookat[:] = np.median(data.geom_xpos, axis=0)
        camera.distance = model.stat.extent
        task: Any = self._env.unwrapped
        own = task.mujoco_renderer.default_cam_config or {}
        for name, value in own.items():
            if isinstance(value, np.ndarray):
                getattr(camera, name)[:] = value
            else:
                setattr(camera, name, value)
        return camera

    def render(self) -> np.ndarray:
        """Return the picture of the default camera, uint8 [240, 240, 3]."""
        if self._view is None:
            quality = resolve_quality("auto") if self._physics() else "reference"
            self._view = self.view(240, 240, quality=quality)
        return self._view.render()

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly, in mid-episode too.

        Raises:
            UserError: if the task keeps state that cannot be told from outside, as Box2D's world.
        """
        physics = self._physics()
        try:
            layers = [snapshot.attributes(layer, skip=skip) for layer, skip in self._layers()]
        except snapshot.NotPlainError as error:
            raise UserError(
                f"gym/{self.task} cannot be saved in mid-episode: {error}; choose another task"
            ) from None
        return {
            "in_episode": self._in_episode,
            "physics": snapshot.physics_state(*physics) if physics else None,
            "layers": layers,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which another instance of the same task may have returned."""
        self.reset()  # tasks and Gymnasium's wrappers make some attributes only here
        physics = self._physics()
        if physics:
            snapshot.set_physics_state(*physics, state["physics"])
        for (layer, _), attributes in zip(self._layers(), state["layers"], strict=True):
            snapshot.set_attributes(layer, attributes)
        self._in_episode = state["in_episode"]

    def _layers(self) -> Iterator[tuple[gymnasium.Env, set[str]]]:
        """Yield Gymnasium's wrappers (the time limit counts steps in one), then the task itself.

        With each comes what its snapshot leaves out: of a wrapper the next layer.
        """
        layer = self._env
        while isinstance(layer, gymnasium.Wrapper):
            yield layer, {"env"}
            layer = layer.env
        yield layer, set()

    def _physics(self) -> Simulation | None:
        """Return MuJoCo's model and data of the task, which it may have replaced; None without."""
        task: Any = self._env.unwrapped
        is_mujoco = isinstance(getattr(task, "model", None), mujoco.MjModel)
        return (task.model, task.data) if is_mujoco else None

    def close(self) -> None:
        """Free the task and its pictures."""
        if self._view is not None:
            self._view.close()
        self._env.close()


def _make(task: str, episode_length: int | None, settings: dict[str, Any]) -> gymnasium.Env:
    """Return the task with `rgb_array` pictures if it has any."""
    module, _, name = task.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(name).entry_point
    except ImportError as error:
        raise _not_importable(task, error) from None
    except gymnasium.error.Error:
        known = [name for name in gymnasium.registry if "/" not in name]
        raise UserError.unknown("Gymnasium task", task, known) from None
    if episode_length is not None:
        settings = {"max_episode_steps": episode_length, **settings}
    # MuJoCo 3.16 calls an attribute of Gymnasium's own models deprecated, in a log file too.
    callback = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
        drawn = {"render_mode": "rgb_array", **settings}
        if not isinstance(creator, type):  # a function does not tell what it takes
            with suppress(Exception):
                return gymnasium.make(name, disable_env_checker=True, **drawn)
        elif "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ()):
            settings = drawn
        return gymnasium.make(name, disable_env_checker=True, **settings)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise _not_importable(task, error) from None
    finally:
        mujoco.set_mju_user_warning(callback)


def _not_importable(task: str, error: Exception) -> UserError:
    why = str(error).strip().partition("\n")[0]
    return UserError(
        f"gym/{task} needs a package that is not installed: {why}; install it, or choose another "
        "task or version"
    )


def _normalized(task: str, space: spaces.Space) -> spaces.Space:
    """Return the action space that agents see: Discrete from 0, or a flat Box of [-1, 1]."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.Box) and space.is_bounded():
        return spaces.Box(-1.0, 1.0, (int(np.prod(space.shape)),), np.float32)
    raise _unsupported(task, "action", space)


def _unsupported(task: str, kind: str, space: spaces.Space) -> UserError:
    return UserError(
        f"gym/{task} has the {kind} space {space}; expected a bounded Box or Discrete one: "
        "wrap the task in one that has, register it, and use that id"
    )
