"""Tiny tasks drawn with NumPy: no simulator, no GL, tens of microseconds a step with its picture.

Every agent's learning test runs on them in seconds. The picture has a sky, a checkered floor and
colored bodies in front, so that every distraction that works on a MuJoCo scene works here too.

Mean undiscounted returns over 2000 episodes, for the thresholds of learning tests:

| task    | action       | steps | random | zero action | best script | without velocity |
| ------- | ------------ | ----- | ------ | ----------- | ----------- | ---------------- |
| reach   | Box 2, place | 25    | 12.7   | 14.1        | 23.9        |                  |
| balance | Box 1, force | 40    | 5.9    | 5.9         | 38.3        | 16.5             |
| catch   | Discrete 3   | <= 60 | 0.4    | 0.6 (stay)  | 6.0         |                  |
| goals   | Discrete 4   | <= 12 | 0.36   |             | 1.0 (left)  |                  |
| recall  | Discrete 2   | 12    | 2.5    | 2.5 (left)  | 5.0         |                  |

No policy of what a picture or a stack of seven shows has more than 2.5 in recall.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium
import numpy as np

from envs.toy_view import CAMERAS, Body, ToyView
from wrappers.errors import UserError


class ToyTask(gymnasium.Env):
    """What the toy tasks share: time limit, seeding, picture, exact state.

    Args:
        episode_length: steps until `truncated`; None is the task's own.
        drift: by how much the floor moves per step, in scene units (a picture is 2 wide).
        render_mode: only "rgb_array".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - as Gymnasium declares it
    default_camera = "front"
    default_episode_length: ClassVar[int]

    def __init__(
        self,
        *,
        episode_length: int | None = None,
        drift: float = 0.0,
        render_mode: str | None = "rgb_array",
    ) -> None:
        self.episode_length = episode_length or self.default_episode_length
        self.render_mode = render_mode
        self._drift = drift
        self._steps = 0
        self._scene = self._begin()
        self._view: ToyView | None = None

    @property
    def drifted(self) -> float:
        """How far the floor has moved in this episode, in scene units."""
        return self._drift * self._steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode, which `seed` fully determines; without one the generator goes on."""
        super().reset(seed=seed)
        self._steps = 0
        self._scene = self._begin()
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by one step of the task."""
        self._steps += 1
        reward, terminated, info = self._advance(action)
        truncated = not terminated and self._steps >= self.episode_length
        return self._observation(), reward, terminated, truncated, info

    def view(
        self, height: int, width: int, camera: str | int | None = None, quality: str = "reference"
    ) -> ToyView:
        """Return a picture of the task through one of `CAMERAS`; both qualities are the same."""
        name = self.default_camera if camera is None else camera
        if name in range(len(CAMERAS)):
            name = list(CAMERAS)[int(name)]
        if name not in CAMERAS:
            raise UserError.unknown("camera", str(camera), CAMERAS)
        return ToyView(self, height, width, str(name))

    def render(self) -> np.ndarray:
        """Return the picture, uint8 [24, 24, 3]."""
        self._view = self._view or self.view(24, 24)
        return self._view.render()

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly."""
        generator = self.np_random.bit_generator.state
        return {"scene": self._scene.copy(), "steps": self._steps, "generator": generator}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._scene = state["scene"].copy()
        self._steps = state["steps"]
        self.np_random.bit_generator.state = state["generator"]

    def _observation(self) -> np.ndarray:
        """Return the state observation, float32."""
        return self._scene.astype(np.float32)

    def _begin(self) -> np.ndarray:
        """Draw the first scene of an episode: every variable of the task, float64."""
        raise NotImplementedError

    def _advance(self, action: Any) -> tuple[float, bool, dict[str, Any]]:
        """Move the scene by one step and return reward, terminated, info."""
        raise NotImplementedError

    def bodies(self) -> list[Body]:
        """Return what stands before the background, the hindmost first."""
        raise NotImplementedError


class Reach(ToyTask):
    """A point goes where `action` says and pays off near a target: 1 on it, 0 from 1.5 away.

    State: x and y of the point, x and y of the target. `info["success"]` is 1 within 0.15 of the
    target. A place, not a velocity, and a slope where a beginner stands: with velocities and the
    reward exp(-2 * distance) a small DDPG from pixels learned nothing in 3000 steps; like this its
    return is 19 after 1500 and 20 after 2500.
    """

    default_episode_length = 25
    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    speed = 0.2

    def _begin(self) -> np.ndarray:
        return self.np_random.uniform(-0.85, 0.85, 4)

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, Any]]:
        x, y, target_x, target_y = self._scene.tolist()
        wanted_x, wanted_y = (min(max(float(place), -1), 1) for place in action)
        x += min(max(wanted_x - x, -self.speed), self.speed)
        y += min(max(wanted_y - y, -self.speed), self.speed)
        self._scene = np.array((x, y, target_x, target_y))
        distance = math.hypot(x - target_x, y - target_y)
        return max(0.0, 1 - distance / 1.5), False, {"success": float(distance < 0.15)}

    def bodies(self) -> list[Body]:
        """Return the target and the point in front of it."""
        x, y, target_x, target_y = self._scene.tolist()
        return [
            Body("box", target_x, target_y, 0.6, 0.6, is_target=True),
            Body("disc", x, y, 0.36, 0.36),
        ]


class Balance(ToyTask):
    """A ball on a hilltop is to be held over a mark: `action` is a force.

    The reward is exp(-3 * abs(x)), and x'' = 3 x + 8 action by explicit Euler steps of 0.1: a force
    that depends on the position alone feeds the swing, so one picture is not enough and a stack of
    frames is. State: position and velocity of the ball.
    """

    default_episode_length = 40
    observation_space = gymnasium.spaces.Box(
        np.array((-1, -4), np.float32), np.array((1, 4), np.float32)
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def _begin(self) -> np.ndarray:
        return self.np_random.uniform((-0.6, -1.0), (0.6, 1.0))

    def _advance(self, action: np.ndarray) -> tuple[float, bool, dict[str, Any]]:
        x, velocity = self._scene.tolist()
        force = min(max(float(action[0]), -1), 1)
        x, velocity = x + 0.1 * velocity, velocity + 0.1 * (3 * x + 8 * force)
        if abs(x) > 1:  # the walls at both ends swallow the ball's speed
            x, velocity = math.copysign(1, x), 0.0
        self._scene = np.array((x, min(max(velocity, -4), 4)))
        return math.exp(-3 * abs(x)), False, {}

    def bodies(self) -> list[Body]:
        """Return the mark and the ball."""
        return [
            Body("box", 0, -0.45, 0.2, 0.5, is_target=True),
            Body("disc", float(self._scene[0]), 0, 0.5, 0.5),
        ]


class Catch(ToyTask):
    """A paddle catches falling balls: a catch pays 1, a miss terminates.

    Actions: left, stay, right. State: x of the paddle, x and y of the ball.
    """

    default_episode_length = 60
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    speed, reach, ground = 0.25, 0.3, -0.8

    def _begin(self) -> np.ndarray:
        return np.array((0.0, self.np_random.uniform(-0.85, 0.85), 0.9))

    def _advance(self, action: int) -> tuple[float, bool, dict[str, Any]]:
        paddle, x, y = self._scene.tolist()
        paddle = min(max(paddle + self.speed * (int(action) - 1), -1), 1)
        y -= 0.2
        is_down = y < self.ground
        is_caught = is_down and abs(x - paddle) <= self.reach
        if is_caught:
            x, y = self.np_random.uniform(-0.85, 0.85), 0.9
        self._scene = np.array((paddle, x, y))
        return float(is_caught), is_down and not is_caught, {}

    def bodies(self) -> list[Body]:
        """Return the paddle and the ball."""
        paddle, x, y = self._scene.tolist()
        return [
            Body("box", paddle, self.ground, 0.5, 0.2),
            Body("disc", x, y, 0.3, 0.3, is_target=True),
        ]


class Goals(ToyTask):
    """A point may go to any of four goals: the first one that it reaches pays 1 and ends the episode.

    Actions: left, right, down, up, each by 0.2; in each of these directions there is a goal, reached within 0.2 in both
    coordinates. The point begins within 0.1 of the middle, three or four steps from every goal, so that none is better
    than another: what a policy prefers is its own habit. `info["behavior"]` is the number of the goal that was reached,
    as the actions are numbered, and -1 before. State: x and y of the point.
    """

    default_episode_length = 12
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)
    speed, reach = 0.2, 0.2
    moves = ((-1, 0), (1, 0), (0, -1), (0, 1))
    places = ((-0.8, 0.0), (0.8, 0.0), (0.0, -0.8), (0.0, 0.8))

    def _begin(self) -> np.ndarray:
        return self.np_random.uniform(-0.1, 0.1, 2)

    def _advance(self, action: int) -> tuple[float, bool, dict[str, Any]]:
        x, y = self._scene.tolist()
        right, up = self.moves[int(action)]
        x, y = (min(max(v, -1), 1) for v in (x + self.speed * right, y + self.speed * up))
        self._scene = np.array((x, y))
        reached = [max(abs(x - a), abs(y - b)) <= self.reach for a, b in self.places]
        behavior = reached.index(True) if True in reached else -1
        success = float(behavior >= 0)
        return success, bool(success), {"success": success, "behavior": behavior}

    def bodies(self) -> list[Body]:
        """Return the goals and the point in front of them."""
        x, y = self._scene.tolist()
        goals = [Body("box", a, b, 0.5, 0.5, is_target=True) for a, b in self.places]
        return [*goals, Body("disc", x, y, 0.36, 0.36)]


class Recall(ToyTask):
    """A mark stands on one side while an episode begins, and is asked for when it is long gone.

    Actions: left, right. As soon as the ball lies on the floor, every answer that names the mark's side pays 1; those
    before pay nothing. State: the mark's place (0 when it is gone), and 1 when an answer is asked for. Neither depends
    on what was done, so that nothing but a memory brings the side to where it is needed.
    """

    default_episode_length = 12
    observation_space = gymnasium.spaces.Box(
        np.array((-1, 0), np.float32), np.array((1, 1), np.float32)
    )
    action_space = gymnasium.spaces.Discrete(2)
    delay = 7  # steps until the first answer

    @property
    def is_asked(self) -> bool:
        """Whether the next action is an answer."""
        return self._steps >= self.delay

    def _begin(self) -> np.ndarray:
        return self.np_random.uniform(0.4, 0.8, 1) * self.np_random.choice((-1, 1))

    def _observation(self) -> np.ndarray:
        place = 0.0 if self._steps else float(self._scene[0])
        return np.array((place, self.is_asked), np.float32)

    def _advance(self, action: int) -> tuple[float, bool, dict[str, Any]]:
        was_asked = self._steps > self.delay  # the step that is being taken is counted already
        is_right = bool(int(action)) == bool(self._scene[0] > 0)
        return float(was_asked and is_right), False, {}

    def bodies(self) -> list[Body]:
        """Return the mark, as long as it is there, and the ball."""
        mark = Body("box", float(self._scene[0]), 0.0, 0.6, 0.6, is_target=True)
        ball = Body("disc", 0, -0.6 if self.is_asked else 0.6, 0.5, 0.5)
        return [ball] if self._steps else [mark, ball]


TASKS: dict[str, type[ToyTask]] = {
    "reach": Reach,
    "balance": Balance,
    "catch": Catch,
    "goals": Goals,
    "recall": Recall,
}
"""The toy tasks by the name that follows `toy/`."""
