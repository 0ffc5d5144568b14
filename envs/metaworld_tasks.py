"""Meta-World's tasks as Gymnasium environments: seedable, upright, exact to resume.

Differences from Meta-World 3.0.0 as shipped:

- `reset(seed=)` decides the episode. Meta-World ignores the seed (its issues #496, #554) and draws
  goals from NumPy's global generator, or replays 50 goals fixed in advance; here every reset draws
  a new one, uniformly from the task's own space, from the environment's generator.
- The scene settles with the objects where the episode has them. Upstream draws twice per reset and
  lets the hand settle among the first draw, so that the first observation can tell of an object
  where it no longer is.
- `corner2` is turned upright (Meta-World issue #555).
- The end of an episode is `truncated` here, and stepping on raises Gymnasium's `ResetNeeded`.
- Nothing of the simulator's class is visible, in particular no `compute_reward`, for which
  Stable-Baselines3 would take it for a goal environment.

The goal is part of the state observation, as in the MT1 benchmark: without it a random goal would
have to be guessed. In pictures it is a small colored mark, where the task has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from envs.rendering import Quality, choose_backend, resolve_quality
from wrappers.errors import UserError
from wrappers.view import Part

choose_backend()

import metaworld.env_dict  # noqa: E402
import mujoco  # noqa: E402

from envs import snapshot  # noqa: E402
from envs.mujoco_view import MujocoView, find_camera  # noqa: E402
from envs.scenery import Scenery, find_scenery, find_surfaces, flat_paint, object_paints  # noqa: E402

VERSION = "-v3"
_MODEL_ARRAYS = ("body_pos", "site_pos")
"""What resets write into the model: found by comparing every array of all 50 models, held by a
test."""


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, such as `drawer-open`."""
    return tuple(
        sorted(name.removesuffix(VERSION) for name in metaworld.env_dict.ALL_V3_ENVIRONMENTS)
    )


def metaworld_scenery(model: mujoco.MjModel) -> Scenery:
    """Find the background: floor, sky, and the metal walls around the table, which itself stays.

    Objects are the table and whatever else is neither background nor robot, fixed or not.
    """
    scenery = find_scenery(model)
    bodies = model.geom_bodyid.tolist()
    walls = [geom for geom, body in enumerate(bodies) if model.body(body).name == "RetainingWall"]
    paints = {"walls": flat_paint(model, walls)} if walls else {}
    geoms: dict[Part, list[int]] = {**scenery.geoms, "walls": walls}  # type: ignore[dict-item]
    robot = int(model.body_rootid[model.body("hand").id])
    others = {0, robot, *(bodies[geom] for geom in walls)}
    objects = object_paints(model, set(model.body_rootid.tolist()) - others)
    objects = {slot.replace("tablelink", "table"): paint for slot, paint in objects.items()}
    surfaces = find_surfaces(model, {**geoms, **{name: o.geoms for name, o in objects.items()}})
    return Scenery(geoms, {**scenery.paints, **paints}, scenery.materials, objects, surfaces)


class MetaWorldTask(gymnasium.Env):
    """One Meta-World task at its own control rate of 80 steps per simulated second.

    Observation: float32 [39], hand, gripper and objects now, the same one step ago, and the goal.
    Action: float32 [4] in [-1, 1], the hand's displacement and the gripper.
    Reward in [0, 10]; `info["success"]` is 1.0 while the task is solved.

    Args:
        task: its name without version, such as `drawer-open`.
        episode_length: steps until `truncated`; None is Meta-World's own 500.
        furniture: objects that masks leave out of the foreground.
    """

    default_camera = "corner2"

    def __init__(
        self, task: str, *, episode_length: int | None = None, furniture: Sequence[str] = ()
    ) -> None:
        if task not in task_names():
            raise UserError.unknown("Meta-World task", task, task_names())
        self.task = task
        self._furniture = tuple(furniture)
        self._env = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task + VERSION]()
        self._env._partially_observable = False
        self._env._set_task_called = True
        self._env.seeded_rand_vec = True
        del self._env.sawyer_observation_space  # cached before the goal was made visible

        self.episode_length = episode_length or self._env.max_path_length
        self._env.max_path_length = self.episode_length + 1  # upstream raises at its own limit
        box = self._env.sawyer_observation_space
        self.observation_space = gymnasium.spaces.Box(
            box.low.astype(np.float32), box.high.astype(np.float32)
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 80}
        self.render_mode = "rgb_array"
        self._in_episode = False
        self._view: MujocoView | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode with new places of objects and goal."""
        super().reset(seed=seed)
        env = self._env
        env.np_random = self.np_random
        env.curr_path_length = 0
        mujoco.mj_resetData(env.model, env.data)
        env._freeze_rand_vec = False
        env.reset_model()  # draws, until the task accepts the draw
        mujoco.mj_resetData(env.model, env.data)
        env._freeze_rand_vec = True
        env.reset_model()  # settles the same draw
        mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._in_episode = True
        return self._to_space(env._get_obs()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by 1/80 second."""
        if not self._in_episode:
            raise gymnasium.error.ResetNeeded("the episode has not begun or is over: call reset()")
        observation, reward, _, _, info = self._env.step(np.asarray(action, np.float64))
        truncated = self._env.curr_path_length >= self.episode_length
        self._in_episode = not truncated
        info = {name: float(value) for name, value in info.items()}
        return self._to_space(observation), float(reward), False, truncated, info

    def _to_space(self, observation: np.ndarray) -> np.ndarray:
        box: Any = self.observation_space
        return np.clip(observation.astype(np.float32), box.low, box.high)

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly, in mid-episode too."""
        env = self._env
        return {
            "in_episode": self._in_episode,
            "generator": self.np_random.bit_generator.state,
            "model": {name: getattr(env.model, name).copy() for name in _MODEL_ARRAYS},
            "physics": snapshot.physics_state(env.model, env.data),
            "attributes": snapshot.attributes(env),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which another instance of the same task may have returned."""
        env = self._env
        if env._last_rand_vec is None:
            self.reset()  # makes the attributes that are windows onto the simulator's memory
        for name, value in state["model"].items():
            getattr(env.model, name)[:] = value
        snapshot.set_physics_state(env.model, env.data, state["physics"])
        snapshot.set_attributes(env, state["attributes"])
        self.np_random.bit_generator.state = state["generator"]
        env.np_random = self.np_random
        self._in_episode = state["in_episode"]

    def view(
        self,
        height: int,
        width: int,
        camera: str | int | None = None,
        quality: Quality = "reference",
    ) -> MujocoView:
        """Return a picture of the task; `corner2` hangs upside down in the model and is turned."""
        model = self._env.model
        through = find_camera(model, self.default_camera if camera is None else camera)
        return MujocoView(
            lambda: (self._env.model, self._env.data),
            height=height,
            width=width,
            camera=through,
            quality=quality,
            scenery=metaworld_scenery,
            furniture=self._furniture,
            upside_down=through.fixedcamid == model.camera("corner2").id,
        )

    def render(self) -> np.ndarray:
        """Return the picture of the default camera, uint8 [240, 240, 3]."""
        if self._view is None:
            self._view = self.view(240, 240, quality=resolve_quality("auto"))
        return self._view.render()

    def close(self) -> None:
        """Free the picture that `render` used."""
        if self._view is not None:
            self._view.close()
