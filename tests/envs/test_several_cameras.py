"""Several cameras of every simulator: as each shows alone, whatever changes the scene, and made again from settings."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack, closing
from typing import Any

import gymnasium
import numpy as np
import pytest

import envs
from wrappers.errors import UserError
from wrappers.view import CameraShift

SIMULATED = [
    ("dmc/cartpole-swingup", ("fixed", "lookatcart"), "color_hard+light_hard+textures"),
    ("metaworld/drawer-open", ("corner2", "corner"), "objects_hard+light_hard"),
]
"""Task, cameras (`corner2` hangs upside down), and what changes its scene however it is seen."""


def make(id: str, camera: Any, distraction: str | None = None) -> envs.Environment:
    return envs.make(
        id, camera=camera, distraction=distraction, seed=5, size=32, quality="fast", frame_stack=1, side_by_side=True
    )  # fmt: skip


@pytest.mark.parametrize(("id", "cameras", "changed"), SIMULATED)
def test_several_cameras_show_what_each_shows_alone(
    id: str, cameras: tuple[str, str], changed: str
) -> None:
    with ExitStack() as stack:
        pictures = []
        for distraction in (None, changed):
            both, *alone = (
                stack.enter_context(closing(make(id, camera, distraction)))
                for camera in (cameras, *cameras)
            )
            for seed in (5, 6):  # another episode, another appearance
                for env in (both, *alone):
                    env.reset(seed=seed)
                    env.step(np.full(env.action_space.shape, 0.7, np.float32))
                wide, *each = (env.observe() for env in (both, *alone))
                assert wide.shape == (3, 32, 64)
                assert np.array_equal(wide, np.concatenate(each, axis=2))
                pictures.append(wide)
                masks = [env.foreground() for env in alone]
                assert np.array_equal(both.foreground(), np.concatenate(masks, axis=1))
                assert masks[0].any()
                assert (masks[0] != masks[1]).any()
            shift = CameraShift(0.2, -0.1, 0.3, 1.3)
            for env in (both, *alone):
                env.view.set_camera(shift)
            wide, *each = (env.view.render() for env in (both, *alone))
            assert np.array_equal(wide, np.concatenate(each, axis=1))
            assert (wide != pictures[-1].transpose(1, 2, 0)).any()
        assert all((left != right).any() for left, right in itertools.pairwise(pictures))


def test_a_simulators_state_goes_on_exactly_through_several_cameras() -> None:
    id, cameras, _ = SIMULATED[0]
    with (
        closing(make(id, cameras, "dcs_hard")) as env,
        closing(make(id, cameras, "dcs_hard")) as fresh,
    ):
        action = np.ones(1, np.float32)
        env.reset()
        for _ in range(3):
            env.step(action)
        state = env.get_state()
        expected = [env.step(action)[0] for _ in range(4)]
        fresh.reset(seed=1)
        fresh.set_state(state)
        for frames in expected:
            assert np.array_equal(fresh.step(action)[0], frames)


def test_settings_name_cameras_as_json_does_and_make_the_same_again() -> None:
    with ExitStack() as stack:

        def shown(**given: Any) -> np.ndarray:
            settings = {"side_by_side": True, **given}
            env = stack.enter_context(closing(envs.make("toy/reach", size=24, seed=3, **settings)))
            assert json.loads(json.dumps(env.settings)) == env.settings
            again = stack.enter_context(closing(envs.make(**env.settings)))
            assert again.settings == env.settings
            seen = env.reset()[0]
            assert np.array_equal(again.reset()[0], seen)
            return seen

        wide = shown(camera=("right", "front"))
        assert wide.shape == (9, 24, 48)
        assert np.array_equal(shown(camera=[2, 0]), wide), "numbers mean the same cameras"
        registered = stack.enter_context(
            closing(gymnasium.make("toy/reach-v0", size=24, seed=3, camera=("right", "front")))
        )
        parts = registered.reset()[0]
        assert sorted(parts) == ["front", "right"]
        assert np.array_equal(np.concatenate([parts["right"], parts["front"]], axis=2), wide)
        assert np.array_equal(shown(camera=["right"]), wide[..., :24])
        assert np.array_equal(shown(), wide[..., 24:]), "as without naming any"


def test_what_one_camera_is_called_in_settings_stays_as_it_was() -> None:
    for camera in ("front", 0, ("front",), ["front"]):
        with closing(envs.make("toy/reach", camera=camera)) as env:
            assert env.settings["camera"] in ("front", 0)
        for side_by_side in (
            False,
            True,
        ):  # of one camera both mean the same, and none is written down
            with closing(envs.make("toy/reach", camera=camera, side_by_side=side_by_side)) as env:
                assert "side_by_side" not in env.settings
                assert env.observation_space.shape == (9, 84, 84)
    for side_by_side in (False, True):
        task: dict[str, Any] = {"camera": ("front", "left"), "side_by_side": side_by_side}
        with closing(envs.make("toy/reach", **task)) as env:
            assert env.settings["camera"] == ["front", "left"]
            assert ("side_by_side" in env.settings) == side_by_side


@pytest.mark.parametrize("workers", [0, 1])
def test_vectors_and_their_workers_show_several_cameras_too(workers: int) -> None:
    task: dict[str, Any] = {"size": 24, "seed": 3, "camera": ("right", "left"), "episode_length": 2}
    make_vec = envs.make_vec
    with (
        closing(make_vec("toy/reach", 2, workers=workers, side_by_side=True, **task)) as wide,
        closing(make_vec("toy/reach", 2, workers=workers, **task)) as apart,
    ):
        assert wide.single_observation_space.shape == (9, 24, 48)
        assert apart.single_observation_space["right"].shape == (9, 24, 24)
        whole, parts = wide.reset()[0], apart.reset()[0]
        for _ in range(3):
            assert apart.observation_space.contains(parts)
            assert sorted(parts) == ["left", "right"]
            assert np.array_equal(np.concatenate([parts["right"], parts["left"]], axis=3), whole)
            (whole, *_, info), (parts, *_, other) = (
                env.step(np.ones((2, 2), np.float32)) for env in (wide, apart)
            )
            if "final_obs" in info:
                last, ended = info["final_obs"][0], other["final_obs"][0]
                assert np.array_equal(np.concatenate([ended["right"], ended["left"]], axis=2), last)


def test_an_unknown_camera_among_several_is_told_with_the_nearest_ones() -> None:
    with pytest.raises(UserError, match="unknown camera 'corner9'; did you mean corner"):
        make("metaworld/reach", ("corner2", "corner9"))
