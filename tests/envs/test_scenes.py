"""Scenes of one episode, shown under another appearance, are what that appearance would have shown."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import gymnasium
import numpy as np
import pytest

import envs
from tests.experiments.helpers import difference

TASKS = {
    "toy/reach-drift": {"size": 24},
    "dmc/quadruped-escape": {"size": 32},  # its terrain is drawn anew in every episode
    "dmc/cartpole-swingup": {"size": 32},
    "metaworld/drawer-open": {"size": 32, "action_repeat": 1},
    "gym/HalfCheetah-v5": {"size": 32},
}
STEPS = 5


def play(
    id: str, seeds: list[int], **settings: Any
) -> tuple[list[list[Any]], list[list[dict[str, Any]]]]:
    """Return observations and scenes of episodes with fixed actions."""
    seen, scenes = [], []
    with closing(envs.make(id, **{**TASKS[id], **settings})) as env:
        for seed in seeds:
            env.action_space.seed(0)
            seen.append([env.reset(seed=seed)[0]])
            scenes.append([env.get_scene()])
            for _ in range(STEPS):
                seen[-1].append(env.step(env.action_space.sample())[0])
                scenes[-1].append(env.get_scene())
    return seen, scenes


@pytest.mark.parametrize(
    ("id", "distraction"),
    [
        ("toy/reach-drift", None),
        ("toy/reach-drift", "color_hard"),
        ("toy/reach-drift", "video_hard"),
        pytest.param("dmc/quadruped-escape", "color_hard", marks=pytest.mark.slow),
        ("dmc/cartpole-swingup", None),
        ("dmc/cartpole-swingup", "video_hard"),
        ("metaworld/drawer-open", "video_hard"),
        ("gym/HalfCheetah-v5", "color_hard"),
    ],
)
def test_a_shown_episode_is_the_one_that_would_have_been(id: str, distraction: str | None) -> None:
    _, scenes = play(id, [3, 4], observation="state")
    expected, _ = play(id, [3, 4], observation="both", distraction=distraction)
    with closing(
        envs.make(id, **TASKS[id], observation="both", distraction=distraction, seed=99)
    ) as env:
        for seed, episode, wanted in zip([3, 4], scenes, expected, strict=True):
            shown = [
                env.show_scene(scene, seed=None if i else seed) for i, scene in enumerate(episode)
            ]
            assert difference(shown, wanted) is None


def test_videos_go_on_through_a_chunk_of_actions() -> None:
    chunked = {"action_chunk": 3, "episode_length": 3 * STEPS - 1}  # the last chunk is cut short
    _, (scenes,) = play("toy/reach-drift", [3], observation="state", **chunked)
    (wanted,), _ = play("toy/reach-drift", [3], distraction="video_hard", **chunked)
    with closing(envs.make("toy/reach-drift", size=24, distraction="video_hard", **chunked)) as env:
        shown = [env.show_scene(s, seed=None if i else 3) for i, s in enumerate(scenes)]
    assert difference(shown, wanted) is None


def test_a_scene_is_gone_on_from_exactly() -> None:
    _, (scenes,) = play("toy/reach-drift", [3])
    with closing(envs.make("toy/reach-drift", size=24)) as env:
        env.show_scene(scenes[2], seed=3)
        env.action_space.seed(0)
        actions = [env.action_space.sample() for _ in range(STEPS)]
        for action, scene in zip(actions[2:], scenes[3:], strict=True):
            env.step(action)
            assert difference(env.get_scene(), scene) is None


def test_an_episode_must_begin_with_a_seed() -> None:
    _, (scenes,) = play("toy/reach-drift", [3])
    with closing(envs.make("toy/reach-drift", size=24)) as env:
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.show_scene(scenes[0])
        first = env.show_scene(scenes[0], seed=3)
        np.testing.assert_array_equal(first[:3], first[-3:])
