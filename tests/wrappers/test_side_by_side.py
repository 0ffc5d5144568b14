"""Several cameras against the same cameras one by one, bit for bit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.toy import Catch, Reach
from wrappers.distraction.presets import make_distraction
from wrappers.distraction.textures import ProceduralVideos
from wrappers.pixels import Pixels
from wrappers.side_by_side import SideBySide
from wrappers.view import CameraPlace, CameraShift

SIDES = ("left", "right")
SCENES = [
    None, "color_hard", "objects_easy", "textures", "light_hard", "camera_hard",
    "color_hard+textures+light_easy+camera_easy",
]  # fmt: skip
"""Distractions that draw the same for one camera as for two: of video and noise the wide picture is another one."""


def make(camera: Any, distraction: str | None = None, **settings: Any) -> Pixels:
    values: dict[str, Any] = {
        "size": 24,
        "observation": "both",
        "foreground_mask": True,
        "side_by_side": True,
        **settings,
    }
    return Pixels(
        Reach(drift=0.05), camera=camera, distraction=make_distraction(distraction), **values
    )


def episodes(env: Pixels, steps: int = 12) -> list[np.ndarray]:
    """Return what an environment shows in two episodes: pictures, masks, frames that it renders."""
    random, shown = np.random.default_rng(0), []
    for _ in range(2):
        seen, info = env.reset(seed=None if shown else 4)
        for _ in range(steps):
            shown += [seen["pixels"], info["foreground"][None], env.render().transpose(2, 0, 1)]
            seen, *_, info = env.step(random.uniform(-1, 1, 2))
    return shown


@pytest.mark.parametrize("supersample", [1, 2])
@pytest.mark.parametrize("distraction", SCENES)
def test_several_cameras_show_what_each_shows_alone(
    distraction: str | None, supersample: int
) -> None:
    both, left, right = (
        episodes(make(camera, distraction, supersample=supersample)) for camera in (SIDES, *SIDES)
    )
    for wide, one, other in zip(both, left, right, strict=True):
        assert wide.shape[1:] == (24, 48)
        assert np.array_equal(wide, np.concatenate([one, other], axis=2))
    assert any((one != other).any() for one, other in zip(left, right, strict=True))


def test_one_camera_in_a_tuple_is_that_camera() -> None:
    for one, other in zip(episodes(make(("left",))), episodes(make("left")), strict=True):
        assert np.array_equal(one, other)


def test_a_video_goes_on_from_one_view_to_the_next() -> None:
    env, clean = make(SIDES, "video_hard"), make(SIDES)
    for one in (env, clean):
        one.reset(seed=2)
    for step in range(4):
        state = env.get_state()["distraction"]
        video = ProceduralVideos().open(state["name"], 24, 48)
        behind = video.frame(int(state["start"] * video.length) + step)
        coverage = env.view.render_layers(env.view.parts).coverage
        assert coverage.shape == (24, 48)
        for seen, wanted, where in (
            (env.render(), behind, coverage == 1),
            (env.render(), clean.render(), coverage == 0),
        ):
            assert where[:, :24].any()
            assert where[:, 24:].any()
            assert np.array_equal(seen[where], wanted[where])
        for one in (env, clean):
            one.step(np.array((-0.1, 0.0)))


def test_both_views_see_the_middle_and_each_hides_a_half() -> None:
    env = Pixels(Catch(), size=24, camera=("front", *SIDES), foreground_mask=True)
    env.reset(seed=0)
    state = env.get_state()
    for x, seen in ((-0.7, [True, False]), (0.7, [False, True]), (0.0, [True, True])):
        state["env"]["scene"] = np.array((x, x, 0.5))  # paddle, ball and how high it is
        env.set_state(state)
        front, *sides = np.split(env.foreground(), 3, axis=1)
        assert front.any()
        assert [side.any() for side in sides] == seen


@pytest.mark.parametrize("distraction", [None, "dcs_hard", "randomized", "video_hard+noise_hard"])
def test_a_state_taken_in_mid_episode_goes_on_exactly(distraction: str | None) -> None:
    env, fresh = make(SIDES, distraction), make(SIDES, distraction)
    env.reset(seed=3)
    for _ in range(5):
        env.step(np.ones(2))
    state = env.get_state()
    expected = [env.step(np.full(2, -0.5))[0]["pixels"] for _ in range(6)]
    fresh.reset(seed=99)
    fresh.set_state(state)
    for frames in expected:
        assert np.array_equal(fresh.step(np.full(2, -0.5))[0]["pixels"], frames)


@pytest.mark.filterwarnings("error", "ignore:.*different from the unwrapped version")
@pytest.mark.parametrize("distraction", [None, "randomized"])
def test_gymnasiums_checker_passes(distraction: str | None) -> None:
    for together in (True, False):
        env = make(SIDES, distraction, foreground_mask=False, side_by_side=together)
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize("cameras", [("right", "front", "left"), (2, 0, 1)])
@pytest.mark.parametrize("distraction", [None, "dcs_hard", "video_hard+noise_hard"])
def test_parts_by_name_are_what_stands_side_by_side(cameras: Any, distraction: str | None) -> None:
    names = [str(camera) for camera in cameras]
    wide, apart = (
        make(cameras, distraction, frame_stack=2, side_by_side=together)
        for together in (True, False)
    )
    box = apart.observation_space["right" if "right" in names else "2"]
    assert sorted(apart.observation_space.spaces) == sorted([*names, "state"])
    assert box.shape == (6, 24, 24)
    shown = [env.reset(seed=4)[0] for env in (wide, apart)]
    for _ in range(4):
        together, parts = shown
        assert apart.observation_space.contains(parts)
        joined = np.concatenate([parts[name] for name in names], axis=2)
        assert np.array_equal(joined, together["pixels"])
        assert np.array_equal(parts["state"], together["state"])
        assert np.array_equal(wide.render(), apart.render())
        shown = [env.step(np.array((0.5, -1.0)))[0] for env in (wide, apart)]


def test_what_of_several_cameras_is_asked_for_is_what_is_shown() -> None:
    pixels = make(SIDES, observation="pixels", side_by_side=False)
    assert sorted(pixels.reset(seed=1)[0]) == ["left", "right"]
    state = make(SIDES, observation="state", side_by_side=False)
    assert state.observation_space.contains(state.reset(seed=1)[0])
    for camera in (None, "left", ("left",)):
        one = make(camera, observation="pixels", side_by_side=False)
        assert one.reset(seed=1)[0].shape == (9, 24, 24), "as ever"


class Placed:
    """A view that remembers how its camera was displaced."""

    height = width = 8

    def __init__(self, place: CameraPlace | None) -> None:
        self.place, self.shift = place, CameraShift()

    def camera(self) -> CameraPlace | None:
        return self.place

    def set_camera(self, shift: CameraShift | None) -> None:
        self.shift = shift  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("inclination", "asked", "got"),
    [
        (0.5, 0.4, 0.4),
        (math.pi / 2, 0.4, 0.0),  # level already
        (1.4, 0.4, math.pi / 2 - 1.4),
        (1.8, 0.4, 0.0),  # as low as it stands
        (1.8, -0.4, -0.4),
        (0.2, -0.5, -0.2),  # as far as straight above
    ],
)
def test_no_camera_is_moved_below_level_or_beyond_the_vertical(
    inclination: float, asked: float, got: float
) -> None:
    shift = CameraShift(0.3, asked, -0.2, 1.5)
    others = CameraPlace(inclination), CameraPlace(math.pi / 2, is_overhead=True), None
    views: list[Any] = [Placed(place) for place in (CameraPlace(0.8), *others)]
    beside = SideBySide(views)
    assert beside.camera() == CameraPlace(0.8)
    beside.set_camera(shift)
    assert [view.shift for view in views] == [
        shift, CameraShift(0.3, pytest.approx(got), -0.2, 1.5), shift, shift
    ]  # fmt: skip
    beside.set_camera(None)
    assert [view.shift for view in views] == [None] * 4


def test_closing_frees_every_view() -> None:
    closed: list[int] = []
    views: list[Any] = [
        SimpleNamespace(height=8, width=8, close=lambda number=number: closed.append(number))
        for number in range(3)
    ]
    SideBySide(views).close()
    assert closed == [0, 1, 2]
