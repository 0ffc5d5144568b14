"""Every distraction in real tasks: seeded, split, exact to resume, and told where it changes nothing."""

import warnings

import numpy as np
import pytest

import envs
from tests.envs.test_registry import actions, trace
from wrappers.distraction.presets import DISTRACTIONS
from wrappers.errors import UserError

SMALL = {"size": 32, "quality": "fast", "frame_stack": 2}
LISTED = "clean,dcs_hard,color_hard+light_easy+noise_easy"
SIMULATED = ("dmc/cartpole-swingup", "metaworld/drawer-open")
REPRESENTATIVE = ("randomized", LISTED)
LEVELS = [name for name in DISTRACTIONS if name.startswith("dcs_0")]
NEW = [n for n in DISTRACTIONS if not n.startswith(("color", "video")) and n not in LEVELS]
EVERYWHERE = [
    pytest.param(id, name, marks=() if id.startswith("toy") or name in REPRESENTATIVE else slow)
    for slow in [pytest.mark.slow]
    for id in ("toy/reach-drift", *SIMULATED)
    for name in (*NEW, LISTED)
]


def made(id: str, distraction: str, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cartpole has no objects
        return envs.make(id, distraction=distraction, **{**SMALL, "seed": 2, **settings})


@pytest.mark.parametrize(("id", "name"), EVERYWHERE)
def test_an_episode_resumes_exactly_in_its_middle(id: str, name: str) -> None:
    with made(id, name, episode_length=8) as env, made(id, name, episode_length=8, seed=5) as fresh:
        fresh.reset()
        env.reset()
        steps = actions(env, 20)
        trace(env, steps[:3])
        state = env.get_state()
        expected = trace(env, steps)  # over the ends of episodes
        fresh.set_state(state)
        np.testing.assert_array_equal(trace(fresh, steps), expected)


@pytest.mark.parametrize(("id", "name"), EVERYWHERE)
def test_the_seed_decides_the_pictures_and_splits_differ(id: str, name: str) -> None:
    seen = []
    for split in ("train", "train", "test"):
        with made(id, name, split=split) as env:
            first = env.reset()[0]
            seen.append(np.append(first.ravel(), trace(env, actions(env, 3))))
    np.testing.assert_array_equal(seen[0], seen[1])
    changes = name != LISTED and not (name.startswith("objects") and "cartpole" in id)
    assert not changes or not np.array_equal(seen[0], seen[2])


@pytest.mark.parametrize("name", [LISTED, pytest.param("dcs_medium", marks=pytest.mark.slow)])
def test_two_workers_resume_exactly(name: str) -> None:
    keywords = {**SMALL, "distraction": name, "episode_length": 6}
    first = envs.make_vec("dmc/cartpole-swingup", 2, workers=2, seed=1, **keywords)
    second = envs.make_vec("dmc/cartpole-swingup", 2, workers=2, seed=9, **keywords)
    try:
        first.reset()
        second.reset()
        first.action_space.seed(0)
        steps = [first.action_space.sample() for _ in range(12)]
        for action in steps[:2]:
            first.step(action)
        second.set_state(first.get_state())
        for action in steps:
            for one, other in zip(first.step(action)[:4], second.step(action)[:4], strict=True):
                np.testing.assert_array_equal(one, other)
    finally:
        first.close()
        second.close()


def test_the_suite_moves_once_per_control_step_and_leaves_floors_as_published() -> None:
    for domain, opacity in {"walker-walk": 1.0, "reacher-easy": 0.0, "finger-spin": 0.3}.items():
        env = envs.make(f"dmc/{domain}", distraction="dcs_easy", action_repeat=3, size=16)
        background = env.distraction.parts["background"]
        assert (background.floor_opacity, background.steps) == (opacity, 3)
        assert ("floor" in background.hidden) == (opacity == 0)


@pytest.mark.parametrize(
    ("id", "distraction", "message"),
    [
        (
            "dmc/walker-walk",
            "objects_hard",
            "objects_hard changes no pixel of dmc/walker-walk: its",
        ),
        ("gym/Pusher-v5", "textures", "its picture has no textures"),
        ("gym/CartPole-v1", "camera_easy", "its picture has no camera"),
        ("gym/CartPole-v1", "light_hard", "its picture has no light"),
        ("gym/CartPole-v1", "dcs_hard", "its picture has fixed colors"),
        ("gym/CartPole-v1", "clean,noise_easy+camera_hard", "camera_hard changes no pixel"),
        ("dmc/reacher-easy", "color_hard+video_easy", "video_easy changes no pixel of dmc/reacher"),
    ],
)
def test_a_part_that_changes_nothing_is_told(id: str, distraction: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        envs.make(id, distraction=distraction, **SMALL).close()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("id", "distraction"),
    [
        ("dmc/finger-spin", "objects_hard+light_easy"),
        ("metaworld/reach", "textures+objects_easy"),
        ("gym/CartPole-v1", "noise_hard"),
        ("gym/CartPole-v1", "randomized"),
        ("dmc/reacher-easy", "dcs_hard"),
    ],
)
def test_what_changes_pixels_is_not_complained_about(id: str, distraction: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with envs.make(id, distraction=distraction, **SMALL, seed=0) as env:
            clean = envs.make(id, **SMALL, seed=0)
            assert (env.reset()[0] != clean.reset()[0]).any()
            clean.close()


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_most_lights_can_be_told_from_the_floor_of_dm_control(level: str) -> None:
    with made("dmc/walker-walk", f"light_{level}") as env:
        env.reset()
        floor = env.view.render_layers(frozenset({"floor"})).coverage == 1
        brightness = []
        for seed in range(30):
            env.distraction.reset(env.view, np.random.default_rng(seed))
            brightness.append(env.view.render()[floor].mean())
        env.view.set_lights(None)
        clean = env.view.render()[floor].mean()
    assert np.median(brightness) < (0.9 if level == "easy" else 0.6) * clean
    assert np.std(brightness) > 0.1 * clean


def test_names_are_checked_before_anything_is_built() -> None:
    with pytest.raises(UserError, match="unknown distraction 'dcs_esay'; did you mean dcs_easy"):
        envs.make("toy/reach", distraction="clean,color_hard+dcs_esay")
    with pytest.raises(UserError, match="both change the colors"):
        envs.make("toy/reach", distraction="color_hard+color_easy")


SAMPLE = ("dmc/finger-spin", "dmc/walker-walk", "metaworld/reach", "gym/Pusher-v5", "toy/catch")
EVERY = [
    id if id in SAMPLE else pytest.param(id, marks=pytest.mark.slow)
    for id in envs.list_ids()
    if envs.get_spec(id).objects is not None
]


@pytest.mark.parametrize("id", EVERY)
def test_the_registry_knows_who_has_objects_and_textures(id: str) -> None:
    spec = envs.get_spec(id)
    if spec.background == frozenset() and not id.startswith("toy"):
        assert (spec.objects, spec.textures) == (False, False)
        return
    with envs.make(id, **SMALL) as env:
        room = {"floor", "walls", "table"} & set(env.view.surfaces())
        assert (bool(env.view.colors("objects")), bool(room)) == (spec.objects, spec.textures)
