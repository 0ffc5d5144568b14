"""Displaced cameras against the definition of the Distracting Control Suite, computed step by step."""

import math

import numpy as np
import pytest

from envs.toy import Reach
from envs.toy_view import ToyView
from wrappers.distraction.camera import RandomCamera, to_point, to_sphere
from wrappers.view import CameraPlace, CameraShift


class Tripod(ToyView):
    """A view that remembers how its camera was displaced."""

    def __init__(self, place: CameraPlace | None) -> None:
        super().__init__(Reach(), 8, 8)
        self.place = place
        self.shifts: list[CameraShift | None] = []

    def camera(self) -> CameraPlace | None:  # type: ignore[override]
        return self.place

    def set_camera(self, shift: CameraShift | None) -> None:
        super().set_camera(shift)
        if shift is not None:
            self.shifts.append(shift)


def poses(view: Tripod) -> np.ndarray:
    """Return distance, horizontal, vertical, roll of every shift, float64 [N, 4]."""
    shifts = [shift for shift in view.shifts if shift is not None]
    return np.array([(s.distance, s.horizontal, s.vertical, s.roll) for s in shifts])


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_episodes_begin_uniformly_in_the_published_ranges(scale: float) -> None:
    view, rng = Tripod(CameraPlace(1.0)), np.random.default_rng(0)
    for _ in range(4000):
        RandomCamera(scale).reset(view, rng)
    drawn, angle = poses(view), math.pi / 2 * scale
    low = np.array((1 - 0.5 * scale, -angle, -angle, -angle))
    high = np.array((1 + 1.5 * scale, angle, angle, angle))
    place = (drawn - low) / (high - low)
    assert place.min() >= 0
    assert place.max() <= 1
    for column in place.T:
        share = np.histogram(column, 10, (0, 1))[0] / len(column)
        assert share == pytest.approx(0.1, abs=0.02)
    assert np.abs(np.corrcoef(place.T) - np.eye(4)).max() < 0.06


def test_no_camera_looks_from_below_and_only_one_from_above_may_cross_the_pole() -> None:
    ranges = {}
    for name, place in {
        "level": CameraPlace(math.pi / 2),
        "high": CameraPlace(0.4),
        "below": CameraPlace(1.8),
        "overhead": CameraPlace(math.pi / 2, is_overhead=True),
    }.items():
        view, rng = Tripod(place), np.random.default_rng(0)
        for _ in range(500):
            RandomCamera(0.5).reset(view, rng)
        down = poses(view)[:, 2]
        ranges[name] = (down.min(), down.max())
    quarter = math.pi / 4
    assert ranges["level"] == pytest.approx((-quarter, 0), abs=0.01)
    assert ranges["high"] == pytest.approx((-0.4, quarter), abs=0.02)
    assert ranges["below"] == pytest.approx((-quarter, 0), abs=0.01)
    assert ranges["overhead"] == pytest.approx((-quarter, quarter), abs=0.02)


def naive_walk(pose, velocity, roll_velocity, noise, scale, inclination):
    """One step as the suite's code takes it, for a camera that stands 4 away; in its own units."""
    radius, azimuth, polar, roll = 4 * pose[0], pose[1], pose[2], pose[3]
    v = [velocity[i] + 0.1 * scale * noise[i] for i in range(3)]
    norm = math.sqrt(sum(x * x for x in v))
    if norm > 0.4 * scale:
        v = [x * 0.4 * scale / norm for x in v]
    w = roll_velocity + math.pi / 300 * scale * noise[3]
    w = max(-math.pi / 50 * scale, min(math.pi / 50 * scale, w))

    def cartesian(r, h, p):
        return (r * math.sin(p) * math.cos(h), r * math.sin(p) * math.sin(h), r * math.cos(p))

    old = cartesian(radius, azimuth, polar)
    x, y, z = (a + b for a, b in zip(old, v, strict=True))
    angle = math.pi / 2 * scale
    r = max(4 - 4 * 0.5 * scale, min(4 + 4 * 1.5 * scale, math.sqrt(x * x + y * y + z * z)))
    h = max(-angle, min(angle, math.atan2(y, x)))
    top, bottom = max(inclination - angle, 0), min(inclination + angle, math.pi / 2)
    p = max(top, min(bottom, math.atan2(math.sqrt(x * x + y * y), z)))
    new_velocity = [a - b for a, b in zip(cartesian(r, h, p), old, strict=True)]
    new_roll = max(-angle, min(angle, roll + w))
    return (r / 4, h, p, new_roll), new_velocity, new_roll - roll


@pytest.mark.parametrize(("scale", "inclination"), [(0.1, 1.2), (0.3, math.pi / 2), (0.5, 0.6)])
def test_the_walk_is_the_published_one(scale: float, inclination: float) -> None:
    view = Tripod(CameraPlace(inclination))
    camera = RandomCamera(scale, "train", control_steps=3)
    camera.reset(view, np.random.default_rng(5))
    state = camera.get_state()
    twin = np.random.default_rng(0)
    twin.bit_generator.state = state["generator"]
    pose, velocity = tuple(state["pose"]), list(4 * state["velocity"][:3])
    roll_velocity = state["velocity"][3]
    for step in range(300):
        for noise in twin.normal(size=(3, 4)):
            pose, velocity, roll_velocity = naive_walk(
                pose, velocity, roll_velocity, noise, scale, inclination
            )
        camera.advance(view)
        expected = np.array(pose) - (0, 0, inclination, 0)
        np.testing.assert_allclose(poses(view)[-1], expected, atol=1e-9, err_msg=str(step))


def test_the_first_velocity_has_a_uniform_speed_in_every_direction() -> None:
    view, rng, speeds, sides = Tripod(CameraPlace(1.0)), np.random.default_rng(0), [], []
    for _ in range(2000):
        camera = RandomCamera(0.2, control_steps=1)
        camera.reset(view, rng)
        velocity = camera.get_state()["velocity"]
        speeds.append(np.linalg.norm(velocity[:3]) / (0.1 * 0.2))
        sides.append(np.sign(velocity))
    assert np.histogram(speeds, 4, (0, 1))[0] / 2000 == pytest.approx(0.25, abs=0.03)
    assert np.abs(np.mean(sides, 0)).max() < 0.07


def test_without_steps_the_camera_stands_still_and_elsewhere_nothing_happens() -> None:
    view = Tripod(CameraPlace(1.0))
    camera = RandomCamera(0.3)
    camera.reset(view, np.random.default_rng(0))
    first = camera.frame(view)
    for _ in range(5):
        camera.advance(view)
        assert (camera.frame(view) == first).all()
    without = Tripod(None)
    camera.reset(without, np.random.default_rng(0))
    camera.advance(without)


def test_spheres_and_points_are_inverse() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sphere = rng.uniform((0.5, -3, 0.1), (2, 3, 3))
        np.testing.assert_allclose(to_sphere(to_point(sphere)), sphere, atol=1e-12)
    assert to_point(np.array((2.0, 0.0, math.pi / 2))) == pytest.approx((2, 0, 0))
    assert to_point(np.array((2.0, 0.0, 0.0))) == pytest.approx((0, 0, 2))
