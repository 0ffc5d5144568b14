"""Displaced cameras: the camera part of the Distracting Control Suite, standing or moving.

Stone et al. (2021), "The Distracting Control Suite" (arXiv:2101.02722) move the camera on a sphere
around the robot. At scale s it stands within pi/2 s of its place in both angles, is rolled by up to
pi/2 s, and is between 0.5 s nearer and 1.5 s farther than its own distance; it never looks from
below the horizontal. When it moves, its velocity walks by N(0, 0.1 s) per control step and axis, up
to a speed of 0.4 s, for a camera at a distance of 4; the roll's velocity by N(0, pi/300 s) up to
pi/50 s.

Differences from the published code: seeds and splits, which it lacks. The sphere lies around the
point that the camera looks at instead of the world's origin or the robot's center of mass (in
cartpole that is 1 higher, at a distance of 4), so that any scene's middle stays in the picture. A
camera that looks straight down (reacher) turns about its own upward direction, since angles jump at
the pole of a sphere. An episode begins where it is drawn instead of one step of the walk later.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from wrappers.distraction.base import Aspect, SceneChange, Split, draw_seed
from wrappers.view import CameraPlace, CameraShift, View

LEVEL = CameraPlace(math.pi / 2)


class RandomCamera(SceneChange):
    """Displaces the camera anew in each episode and lets it walk.

    Args:
        scale: the suite's intensity in [0, 1].
        split: whose cameras to draw.
        control_steps: steps of the walk per agent step; 0 stands still.
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("camera",))

    def __init__(self, scale: float, split: Split = "train", control_steps: int = 0) -> None:
        self.scale = scale
        self.split: Split = split
        self.control_steps = control_steps
        self._rng = np.random.default_rng(0)
        # Distance as a multiple of its own, both angles, roll; then velocities: x, y, z, roll.
        self._pose, self._velocity = np.zeros(4), np.zeros(4)
        self._inclination = math.pi / 2

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw where the camera begins and how it moves."""
        self._rng = np.random.default_rng(draw_seed(rng, self.split))
        self._find_limits(view)
        self._pose = self._rng.uniform(self._low, self._high)
        direction = self._rng.normal(size=3)
        speed = self._rng.uniform(0, 0.1 * self.scale) / np.linalg.norm(direction)
        roll = self._rng.uniform(-1, 1) * math.pi / 50 * self.scale
        self._velocity = np.append(speed * direction, roll)
        self._displace(view)

    def advance(self, view: View) -> None:
        """Walk on by one agent step."""
        if not self.control_steps:
            return
        for noise in self._rng.normal(size=(self.control_steps, 4)):
            self._walk(noise)
        self._displace(view)

    def get_state(self) -> dict[str, Any]:
        """Return pose, velocity and the generator of the walk."""
        return {
            "pose": self._pose.copy(),
            "velocity": self._velocity.copy(),
            "generator": self._rng.bit_generator.state,
        }

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Go on with the walk of `state`."""
        self._rng.bit_generator.state = state["generator"]
        self._find_limits(view)
        self._pose, self._velocity = state["pose"].copy(), state["velocity"].copy()
        self._displace(view)

    def _find_limits(self, view: View) -> None:
        """Set the ranges of distance, azimuth, inclination (0 is above) and roll, float64 [4]."""
        place = view.camera() or LEVEL
        self._inclination = place.inclination
        angle = math.pi / 2 * self.scale
        highest, lowest = place.reach
        highest = max(highest, place.inclination - angle)
        lowest = min(lowest, place.inclination + angle)
        self._low = np.array((1 - 0.5 * self.scale, -angle, highest, -angle))
        self._high = np.array((1 + 1.5 * self.scale, angle, lowest, angle))

    def _walk(self, noise: np.ndarray) -> None:
        """Take one step. Lengths are in distances of the camera, which the suite takes for 4."""
        velocity = self._velocity[:3] + 0.025 * self.scale * noise[:3]
        speed, limit = float(np.linalg.norm(velocity)), 0.1 * self.scale
        if speed > limit:
            velocity = velocity * (limit / speed)
        limit = math.pi / 50 * self.scale
        roll = self._velocity[3] + math.pi / 300 * self.scale * noise[3]
        roll = min(max(roll, -limit), limit)
        before = to_point(self._pose)
        pose = np.append(to_sphere(before + velocity), self._pose[3] + roll)
        pose = pose.clip(self._low, self._high)
        # At a limit it stops: the velocity is what was really gone.
        self._velocity = np.append(to_point(pose) - before, pose[3] - self._pose[3])
        self._pose = pose

    def _displace(self, view: View) -> None:
        distance, azimuth, inclination, roll = self._pose.tolist()
        view.set_camera(CameraShift(azimuth, inclination - self._inclination, roll, distance))


def to_point(sphere: np.ndarray) -> np.ndarray:
    """Return the point at a distance, azimuth and inclination (of which it ignores any more)."""
    distance, azimuth, inclination = sphere[:3].tolist()
    level = distance * math.sin(inclination)
    z = distance * math.cos(inclination)
    return np.array((level * math.cos(azimuth), level * math.sin(azimuth), z))


def to_sphere(point: np.ndarray) -> np.ndarray:
    """Return distance, azimuth and inclination of a point, float64 [3]."""
    x, y, z = point.tolist()
    level = math.hypot(x, y)
    return np.array((math.hypot(level, z), math.atan2(y, x), math.atan2(level, z)))
