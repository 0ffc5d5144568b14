"""dm_control's suite as Gymnasium environments: all 51 tasks, seedable, exact to save and resume.

`reset(seed=s)` begins the same episode as `suite.load(..., task_kwargs={"random": s})`. dm_control
tells a time limit (discount 1) from a real end (discount 0): `truncated` and `terminated` here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from absl import logging
from gymnasium import spaces

from envs.rendering import Quality, choose_backend, resolve_quality

choose_backend()

from dm_control import suite  # noqa: E402

from envs import snapshot  # noqa: E402
from envs.mujoco_view import MujocoView  # noqa: E402
from wrappers.errors import UserError  # noqa: E402

_CAMERAS = {"quadruped": 2}
"""Cameras other than 0, as DrQ-v2 chose: quadruped's 0 does not follow the robot."""

_MODEL_FIELDS = """
    body_pos body_quat dof_damping geom_pos geom_rgba geom_size hfield_data light_pos mat_rgba
    site_pos site_rgba site_size wrap_prm
""".split()
"""What tasks change in their model when an episode begins: targets, terrains, gains."""


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, such as `walker-walk`."""
    return tuple(f"{domain}-{task}" for domain, task in suite.ALL_TASKS)


class DMControlTask(gymnasium.Env[np.ndarray, np.ndarray]):
    """One task of dm_control's suite at its own control rate.

    Attributes:
        default_camera: the number of the camera that `view` and `render` look through by default.
        episode_length: control steps after which an episode is truncated.
    """

    render_mode = "rgb_array"

    def __init__(self, task: str, episode_length: int | None = None) -> None:
        """Build the task.

        Args:
            task: domain and task, such as `ball_in_cup-catch`.
            episode_length: control steps; None is the suite's own 1000.

        Raises:
            UserError: if there is no such task; the nearest names are offered.
        """
        if task not in task_names():
            raise UserError.unknown("dm_control task", task, task_names())
        domain, _, name = task.partition("-")
        with _quiet():
            # The number also draws the springs of `lqr`: the same ones in every instance.
            self._env = suite.load(domain, name, task_kwargs={"random": 0})
        if task == "quadruped-escape":
            _keep_from_rendering(self._env.physics)
        self._env.task.random.seed()
        self.episode_length = episode_length or _own_length(self._env)
        self._env._step_limit = self.episode_length
        self.default_camera = _CAMERAS.get(domain, 0)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / self._env.control_timestep()),
        }
        self._view: MujocoView | None = None
        action = self._env.action_spec()
        # An actuator without limits (`lqr`) takes the unit range as it is.
        limited = np.isfinite(action.minimum) & (np.abs(action.minimum) < 1e9)
        low, high = np.where(limited, action.minimum, -1), np.where(limited, action.maximum, 1)
        self._center, self._half_range = (high + low) / 2, (high - low) / 2
        self.action_space = spaces.Box(-1, 1, action.shape, np.float32)
        size = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; without a seed the task's own random stream goes on."""
        super().reset(seed=seed)
        if seed is not None:
            # NumPy's old generator takes 32 bits at a time.
            self._env.task.random.seed(seed if seed < 2**32 else [seed % 2**32, seed // 2**32])
        return _flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply one action, float [A] in [-1, 1], for one control step."""
        if self._env._reset_next_step:
            raise gymnasium.error.ResetNeeded("the episode has not begun or is over: call reset()")
        unit = np.clip(np.asarray(action, np.float64), -1, 1)
        step = self._env.step(self._center + self._half_range * unit)
        terminated = step.last() and step.discount == 0
        truncated = step.last() and not terminated
        return _flat(step.observation), float(step.reward), bool(terminated), bool(truncated), {}

    def view(
        self,
        height: int,
        width: int,
        camera: str | int | None = None,
        quality: Quality = "reference",
    ) -> MujocoView:
        """Return a picture of the task; GL is touched at its first render."""
        physics = self._env.physics
        return MujocoView(
            lambda: (physics.model.ptr, physics.data.ptr),
            height=height,
            width=width,
            camera=self.default_camera if camera is None else camera,
            quality=quality,
        )

    def render(self) -> np.ndarray:
        """Return the picture of the default camera, uint8 [240, 240, 3]."""
        if self._view is None:
            self._view = self.view(240, 240, quality=resolve_quality("auto"))
        return self._view.render()

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly, in mid-episode too."""
        task, physics = self._env.task, self._env.physics
        model, data = physics.model.ptr, physics.data.ptr
        return {
            "model": {name: getattr(model, name).copy() for name in _MODEL_FIELDS},
            "physics": snapshot.physics_state(model, data),
            "task": {name: np.array(v) for name, v in vars(task).items() if _is_number(v)},
            "random": task.random.get_state(legacy=False),
            "step_count": self._env._step_count,
            "in_episode": not self._env._reset_next_step,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which an environment of the same task gave."""
        task, physics = self._env.task, self._env.physics
        model, data = physics.model.ptr, physics.data.ptr
        for name, values in state["model"].items():
            getattr(model, name)[:] = values
        snapshot.set_physics_state(model, data, state["physics"])
        for name, value in state["task"].items():
            setattr(task, name, value.copy() if value.ndim else value.item())
        task.random.set_state(state["random"])
        self._env._step_count = state["step_count"]
        self._env._reset_next_step = not state["in_episode"]

    def close(self) -> None:
        """Free GL and the simulation."""
        if self._view is not None:
            self._view.close()
        self._env.close()


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    parts = [np.ravel(value) for value in observation.values()]
    return np.concatenate(parts).astype(np.float32)


def _is_number(value: object) -> bool:
    """Tell numbers and arrays from a task's other attributes: `dog` sets some at reset."""
    return isinstance(value, bool | int | float | np.ndarray)


def _own_length(env: Any) -> int:
    return round(env._step_limit) if np.isfinite(env._step_limit) else 1000


def _keep_from_rendering(physics: Any) -> None:
    """Let a task reset without GL: this one uploads its terrain to a renderer nobody looks at."""
    own = type(physics)
    physics.__class__ = type(own.__name__, (own,), {"contexts": None})


@contextmanager
def _quiet() -> Iterator[None]:
    """Spare users the warnings that MuJoCo gives about dm_control's own models."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
