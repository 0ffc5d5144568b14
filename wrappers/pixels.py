"""What an agent sees of a simulator: action repeat, distraction, frame stack."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from wrappers.distraction.base import Distraction
from wrappers.errors import UserError
from wrappers.side_by_side import SideBySide, apart
from wrappers.supersampling import Supersampled
from wrappers.view import View

if TYPE_CHECKING:
    Observation = np.ndarray | dict[str, np.ndarray]

# Keeps the distraction's stream apart from the simulator's, which is seeded with the bare seed:
# the same seed begins the same episodes under every distraction.
DISTRACTION_STREAM = 0xD157


def chunk_space(space: spaces.Space, chunk: int) -> spaces.Box:
    """Return the space of `chunk` actions of a space, one after the other.

    Raises:
        UserError: the actions are not continuous.
    """
    if not isinstance(space, spaces.Box):
        raise UserError(
            f"action_chunk is {chunk}, but only Box actions come in chunks, not {space}"
        )
    low, high = (np.broadcast_to(bound, (chunk, *space.shape)) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)


class Pixels(gymnasium.Wrapper):
    """Turns a simulator's adapter into the environment that agents act in.

    One step repeats the action, sums the rewards, stops at the episode's end, and renders once:
    nothing is rendered where the observation is only the state. GL is not touched before the first
    picture. With `action_chunk` one step takes several actions, one after the other, and is still
    seen once: at its end.

    Args:
        env: an adapter: a Gymnasium environment with a flat state observation, `view`,
            `get_state`, `set_state`.
        observation: "pixels" is uint8 [3 * frame_stack, size, size], RGB of the oldest frame
            first, at the beginning of an episode the first frame repeated; of several cameras a
            dict of such by the camera's name (its number as text where that was given); "state" is
            the adapter's own; "both" a dict of "pixels", or of all cameras, and "state".
        size: height and width of a camera's picture.
        frame_stack: how many pictures an observation holds.
        action_repeat: simulator steps per action.
        action_chunk: actions per agent step; above 1 the action space is a Box [chunk, A], and a
            frame stack holds what was seen between chunks.
        quality: "reference" or "fast", see the adapter's `view`.
        supersample: draw this many times larger in both directions and average.
        camera: name or number of the camera, or several; None is the adapter's default.
        side_by_side: show several cameras as one picture "pixels" of [.., size, V * size], the first
            on the left, as they are drawn, stacked and distracted anyway.
        distraction: what changes the picture; None leaves it clean.
        foreground_mask: put `info["foreground"]`, bool [size, width], into every info (one extra
            render); the masks of several cameras stand side by side.
        end_at_success: end the episode with the first simulator step whose info tells a `success`.

    Attributes:
        render_seconds: what pictures took so far, distractions included; for the log.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        observation: Literal["pixels", "state", "both"] = "pixels",
        size: int = 84,
        frame_stack: int = 3,
        action_repeat: int = 1,
        action_chunk: int = 1,
        quality: Literal["reference", "fast"] = "reference",
        supersample: int = 1,
        camera: str | int | tuple[str | int, ...] | None = None,
        side_by_side: bool = False,
        distraction: Distraction | None = None,
        foreground_mask: bool = False,
        end_at_success: bool = False,
    ) -> None:
        super().__init__(env)
        self.action_repeat = action_repeat
        self.action_chunk = action_chunk
        if action_chunk > 1:
            self.action_space = chunk_space(env.action_space, action_chunk)
        self.distraction = distraction
        self._mode = observation
        self._foreground_mask = foreground_mask
        self._end_at_success = end_at_success
        self._cameras = camera if isinstance(camera, tuple) else (camera,)
        self._quality = quality
        self._size = size
        self._supersample = supersample
        self._frame_stack = frame_stack
        self._view: View | None = None
        self._rng = np.random.default_rng()
        self._frames: deque[np.ndarray] = deque(maxlen=frame_stack)  # uint8 [3, size, width] each
        self._state = np.zeros(0, np.float32)
        self._has_begun = False
        self._taken = 0  # actions of the newest step
        self.render_seconds = 0.0
        # What the parts are called where the cameras are parts of their own.
        is_apart = len(self._cameras) > 1 and not side_by_side
        self._names = [str(camera) for camera in self._cameras] if is_apart else []
        shape = 3 * frame_stack, size, size if is_apart else len(self._cameras) * size
        pictures: dict[str, spaces.Space] = {
            name: spaces.Box(0, 255, shape, np.uint8) for name in self._names or ["pixels"]
        }
        self.observation_space = {
            "pixels": spaces.Dict(pictures) if is_apart else pictures["pixels"],
            "state": env.observation_space,
            "both": spaces.Dict(pictures | {"state": env.observation_space}),
        }[observation]

    @property
    def view(self) -> View:
        """The picture of the simulator that observations are made from."""
        if self._view is None:
            make_view = self.env.get_wrapper_attr("view")
            side = self._size * self._supersample
            views: list[View] = [
                make_view(side, side, camera=camera, quality=self._quality)
                for camera in self._cameras
            ]
            view = SideBySide(views) if len(views) > 1 else views[0]
            self._view = Supersampled(view, self._supersample) if self._supersample > 1 else view
        return self._view

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode: `seed` determines simulator and appearance, without it both go on."""
        self._state, info = self.env.reset(seed=seed, options=options)
        return self._first_look(seed), self._with_foreground(info)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Repeat every action and sum the rewards; a success at any moment of it counts.

        The end of an episode may cut this short: `info["control_steps"]` then says how many were taken.
        """
        self._check_begun()
        total, success, ended, control_steps = 0.0, 0.0, False, 0
        self._taken = 0
        for single in action if self.action_chunk > 1 else (action,):
            if ended:
                break
            self._taken += 1
            for _ in range(self.action_repeat):
                self._state, reward, terminated, truncated, info = self.env.step(single)
                control_steps += 1
                total += float(reward)
                success = max(success, info.get("success", 0.0))
                terminated = terminated or bool(self._end_at_success and success)
                ended = terminated or truncated
                if ended:
                    break
            if self.distraction is not None:
                self.distraction.advance(self.view)
        if ended:
            info["control_steps"] = control_steps
        if "success" in info:
            info["success"] = success
        return self._look(), total, terminated, truncated, self._with_foreground(info)

    def observe(self) -> Observation:
        """Return the current observation once more, for instance after `set_state`."""
        if self._mode == "state":
            return self._state
        pixels = np.concatenate(self._frames)
        if self._mode == "pixels" and not self._names:
            return pixels
        seen = apart(pixels, self._names) if self._names else {"pixels": pixels}
        return seen if self._mode == "pixels" else seen | {"state": self._state}

    def foreground(self) -> np.ndarray:
        """Return where the newest picture shows the foreground, see `View.foreground`, bool [size, width]."""
        self._check_begun()
        return self.view.foreground()

    def render(self) -> np.ndarray:
        """Return the current picture as the agent sees it, uint8 [size, width, 3], all cameras side by side."""
        self._check_begun()
        if self._frames:
            return np.ascontiguousarray(self._frames[-1].transpose(1, 2, 0))
        return self._picture()

    def close(self) -> None:
        """Free the picture, then the simulator."""
        if self._view is not None:
            self._view.close()
            self._view = None
        super().close()

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly, in mid-episode too."""
        return {
            "env": self.env.get_wrapper_attr("get_state")(),
            "distraction": self.distraction.get_state() if self.distraction else None,
            "generator": self._rng.bit_generator.state,
            "frames": np.array(self._frames, np.uint8),
            "state": self._state.copy(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which an environment of the same settings gave."""
        self.env.get_wrapper_attr("set_state")(state["env"])
        if self.distraction is not None:
            self.distraction.set_state(self.view, state["distraction"])
        self._rng.bit_generator.state = state["generator"]
        self._frames.clear()
        self._frames.extend(state["frames"].copy())
        self._state = state["state"].copy()
        self._has_begun = True

    def foreseen(self, act: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Return the next action of somebody who looks at the state before every single one.

        For a chunk of actions the simulator goes on and comes back: nothing is drawn, and what follows does not differ.
        Actions behind an episode's end repeat the last one.

        Args:
            act: from a state observation to an action; without a memory.
        """
        self._check_begun()
        actions = [np.asarray(act(self._state))]
        if self.action_chunk == 1:
            return actions[0]
        before = self.env.get_wrapper_attr("get_state")()
        ended = False
        while len(actions) < self.action_chunk:
            for _ in range(self.action_repeat):
                if not ended:
                    state, _, terminated, truncated, info = self.env.step(actions[-1])
                    solved = self._end_at_success and info.get("success", 0.0) > 0
                    ended = terminated or truncated or solved
            actions.append(actions[-1] if ended else np.asarray(act(state)))
        self.env.get_wrapper_attr("set_state")(before)
        return np.stack(actions)

    def get_scene(self) -> dict[str, Any]:
        """Return the part of `get_state` that is there however it is seen: simulator and state observation."""
        scene = {"env": self.env.get_wrapper_attr("get_state")(), "state": self._state.copy()}
        return scene if self.action_chunk == 1 else {**scene, "actions": self._taken}

    def show_scene(self, scene: dict[str, Any], *, seed: int | None = None) -> Observation:
        """Look at a scene as if an episode here had led to it, and return the observation.

        The scenes of an episode, shown in order, give what the same seed and actions would have given under this
        environment's distraction, camera and quality.

        Args:
            scene: what `get_scene` of an environment of the same task returned.
            seed: begins an episode, with the appearance of `reset(seed=seed)`; None goes on by an agent step.
        """
        if seed is None:
            self._check_begun()
        self.env.get_wrapper_attr("set_state")(scene["env"])
        self._state = scene["state"].copy()
        if seed is not None:
            return self._first_look(seed)
        if self.distraction is not None:
            for _ in range(scene.get("actions", 1)):
                self.distraction.advance(self.view)
        return self._look()

    def _first_look(self, seed: int | None) -> Observation:
        """Draw an episode's appearance and return the first observation."""
        self._has_begun = True
        if seed is not None:
            self._rng = np.random.default_rng((seed, DISTRACTION_STREAM))
        if self.distraction is not None:
            self.distraction.reset(self.view, self._rng)
        self._frames.clear()
        return self._look()

    def _check_begun(self) -> None:
        if not self._has_begun:
            raise gymnasium.error.ResetNeeded("no episode has begun: call reset() first")

    def _look(self) -> Observation:
        """Render where the observation has pixels, stack, and return the observation."""
        if self._mode != "state":
            frame = np.ascontiguousarray(self._picture().transpose(2, 0, 1))
            missing = 1 if self._frames else self._frame_stack
            self._frames.extend([frame] * missing)
        return self.observe()

    def _picture(self) -> np.ndarray:
        """Return the current picture, uint8 [size, width, 3]."""
        start = time.perf_counter()
        picture = self.distraction.frame(self.view) if self.distraction else self.view.render()
        self.render_seconds += time.perf_counter() - start
        return picture

    def _with_foreground(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return `info` with the mask of the foreground where one was asked for."""
        if self._foreground_mask:
            info["foreground"] = self.view.foreground()
        return info
