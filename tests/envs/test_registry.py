"""Making environments by id: every argument checked, everything resolved and recorded, nothing
imported early."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

import envs
from envs import registry
from envs.environment import gymnasium_id
from envs.rendering import choose_backend
from wrappers.errors import UserError

FAMILIES = ("dmc/walker-walk", "metaworld/drawer-open", "gym/HalfCheetah-v5", "gym/CartPole-v1")
ALL = (*FAMILIES, *(f"toy/{task}" for task in registry.TOY_TASKS), "toy/reach-drift")
SAMPLE = {*ALL, "dmc/reacher-easy", "metaworld/basketball", "gym/Pendulum-v1"}
EVERY = [id if id in SAMPLE else pytest.param(id, marks=pytest.mark.slow) for id in envs.list_ids()]
SMALL = {"size": 32, "quality": "fast"}


def trace(env: gymnasium.Env, steps: list) -> np.ndarray:
    """Return observations and rewards of a rollout, over the ends of episodes, in one array."""
    rows = []
    for action in steps:
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
        rows.append(np.hstack((observation.ravel(), reward, terminated, truncated)))
    return np.array(rows)


def actions(env: gymnasium.Env, count: int) -> list:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(count)]


def test_names_are_the_simulators_own() -> None:
    choose_backend()
    from dm_control import suite
    from metaworld import env_dict

    ids = envs.list_ids()
    assert {id for id in ids if id.startswith("dmc/")} == {
        f"dmc/{d}-{t}" for d, t in suite.ALL_TASKS
    }
    tasks = {f"metaworld/{name.removesuffix('-v3')}" for name in env_dict.ALL_V3_ENVIRONMENTS}
    assert {id for id in ids if id.startswith("metaworld/")} == tasks


def test_toy_names_are_the_toy_familys_own() -> None:
    from envs import toy

    assert set(registry.TOY_TASKS) == set(toy.TASKS)


def test_importing_envs_imports_no_simulator() -> None:
    heavy = "{'mujoco', 'dm_control', 'metaworld', 'pygame', 'torch', 'OpenGL', 'imageio'}"
    code = f"import sys, envs; envs.list_ids(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("id", EVERY)
def test_the_seed_decides_everything(id: str) -> None:
    first, second = (envs.make(id, observation="state", seed=4) for _ in range(2))
    steps = actions(first, 12)
    np.testing.assert_array_equal(first.reset()[0], second.reset(seed=4)[0])
    np.testing.assert_array_equal(trace(first, steps), trace(second, steps))
    assert not np.array_equal(first.reset()[0], first.reset(seed=4)[0]) or id in SAME_START
    first.close()
    second.close()


SAME_START = {id for id in envs.list_ids() if "Frozen" in id or "Cliff" in id or "Blackjack" in id}
"""Text tasks may begin twice in the same of their few states."""


@pytest.mark.parametrize("id", EVERY)
def test_every_task_can_be_restored_in_mid_episode(id: str) -> None:
    env, fresh = (envs.make(id, observation="state", seed=seed) for seed in (1, 2))
    steps = actions(env, 20)
    env.reset()
    trace(env, steps[:8])
    fresh.set_state(env.get_state())
    np.testing.assert_array_equal(trace(fresh, steps[8:]), trace(env, steps[8:]))
    env.close()
    fresh.close()


@pytest.mark.parametrize("distraction", ["color_hard", "video_hard"])
@pytest.mark.parametrize("id", ["dmc/walker-walk", "metaworld/drawer-open", "toy/catch"])
def test_pictures_are_restored_in_mid_episode(id: str, distraction: str | None) -> None:
    env, fresh = (envs.make(id, distraction=distraction, seed=seed, **SMALL) for seed in (1, 2))
    steps = actions(env, 10)
    env.reset()
    trace(env, steps[:4])
    fresh.set_state(env.get_state())
    np.testing.assert_array_equal(trace(fresh, steps[4:]), trace(env, steps[4:]))
    env.close()
    fresh.close()


@pytest.mark.parametrize("id", EVERY)
def test_what_is_said_to_be_background_is_what_the_camera_shows(id: str) -> None:
    spec = envs.get_spec(id)
    env = envs.make(id, seed=0, size=84, quality="fast")
    shown = set()
    for seed in range(3):
        env.reset(seed=seed)
        for part in env.view.parts:
            shown |= {part} if _changes(env.view, part) else set()
    assert shown == spec.background
    env.close()


def _changes(view, part: str) -> bool:
    return bool(view.render_layers(frozenset({part})).coverage.any())


@pytest.mark.parametrize("id", ALL)
def test_settings_make_the_same_environment_again(id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a video in front of CartPole
        env = envs.make(id, distraction="video_hard", size=32)
        again = envs.make(**json.loads(json.dumps(env.get_wrapper_attr("settings"))))
    assert again.settings == env.settings
    assert env.settings["quality"] in ("reference", "fast")
    assert isinstance(env.settings["seed"], int)
    assert env.settings["camera"] == env.unwrapped.default_camera
    steps = actions(env, 5)
    np.testing.assert_array_equal(env.reset()[0], again.reset()[0])
    np.testing.assert_array_equal(trace(env, steps), trace(again, steps))
    env.close()
    again.close()


@pytest.mark.parametrize("id", ALL)
def test_spaces_are_as_promised(id: str) -> None:
    both = envs.make(id, observation="both", size=40, frame_stack=2, quality="fast", seed=0)
    observation, _ = both.reset()
    assert both.observation_space["pixels"] == gymnasium.spaces.Box(0, 255, (6, 40, 40), np.uint8)
    assert observation["pixels"].shape == (6, 40, 40)
    assert observation["state"].dtype == np.float32
    if isinstance(both.action_space, gymnasium.spaces.Box):
        assert both.action_space.dtype == np.float32
        assert both.action_space.low.max() == -1
        assert both.action_space.high.min() == 1
    assert both.render().shape == (40, 40, 3)
    both.close()


def test_action_repeat_and_episode_length_count_control_steps() -> None:
    env = envs.make("metaworld/reach", observation="state", episode_length=7, action_repeat=3)
    env.reset()
    truncated = [env.step(np.zeros(4, np.float32))[3] for _ in range(3)]
    assert truncated == [False, False, True]


def test_gymnasium_makes_every_id_with_our_arguments() -> None:
    for id in envs.list_ids():
        assert gymnasium_id(id) in gymnasium.registry
    env = gymnasium.make("toy/reach-v0", distraction="video_easy", size=24, seed=3)
    ours = envs.make("toy/reach", distraction="video_easy", size=24, seed=3)
    np.testing.assert_array_equal(env.reset()[0], ours.reset()[0])
    rebuilt = gymnasium.make(pickle.loads(pickle.dumps(env.spec)))
    np.testing.assert_array_equal(rebuilt.reset(seed=5)[0], ours.reset(seed=5)[0])
    assert pickle.loads(pickle.dumps(ours.spec)).make().reset(seed=5)[0].shape == (9, 24, 24)


def test_any_gymnasium_id_works_with_module_and_namespace() -> None:
    if "Arcade/Dot-v3" not in gymnasium.registry:
        gymnasium.register("Arcade/Dot-v3", "gymnasium.envs.classic_control:PendulumEnv")
    for id in ("gym/Arcade/Dot-v3", "gym/gymnasium.envs:Pendulum-v1"):
        env = envs.make(id, observation="state", seed=0)
        np.testing.assert_array_equal(env.reset()[0], env.spec.make().reset(seed=0)[0])


def test_gymnasium_makes_a_simulators_task() -> None:
    env = gymnasium.make("metaworld/drawer-open-v0", render_mode="rgb_array", **SMALL)
    assert env.reset(seed=0)[0].shape == (9, 32, 32)
    assert env.render().shape == (32, 32, 3)
    env.close()


def test_a_chunk_may_last_as_long_as_an_episode() -> None:
    """Its last action, which is repeated less often where the limit cuts it short, counts."""
    for repeat, chunk in ((1, 25), (10, 3)):
        env = envs.make(
            "toy/reach", observation="state", action_chunk=chunk, action_repeat=repeat, seed=1
        )
        env.reset()
        assert env.step(env.action_space.sample())[3], "truncated"
        env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id": "dmc/waker-walk"}, "unknown task 'dmc/waker-walk'; did you mean dmc/walker-walk"),
        ({"id": "walker-walk"}, "unknown task 'walker-walk'; did you mean dmc/walker-walk"),
        ({"id": "gym/CartPol-v1"}, "did you mean gym/CartPole-v1"),
        ({"observation": "pixel"}, "unknown observation 'pixel'; did you mean pixels"),
        (
            {"distraction": "video_hrad"},
            "unknown distraction 'video_hrad'; did you mean video_hard",
        ),
        ({"quality": "best"}, "unknown quality 'best'"),
        ({"split": "tset"}, "unknown split 'tset'; did you mean test"),
        ({"size": 0}, "size is 0; expected a whole number from 8"),
        ({"size": 84.0}, "size is 84.0; expected a whole number"),
        ({"frame_stack": -1}, "frame_stack is -1; expected a whole number from 1"),
        ({"action_repeat": 0}, "action_repeat is 0"),
        ({"episode_length": 0}, "episode_length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"camera": 1.5}, "camera is 1.5; expected a camera's name or number"),
        ({"camera": "top"}, "top"),
        ({"camera": ("front", "rihgt")}, "unknown camera 'rihgt'; did you mean right"),
        ({"camera": ("front", "left", "front")}, "camera 'front' is given twice; give each once"),
        ({"camera": ("0", 0)}, "camera '0' is given twice; give each once"),
        ({"camera": ("front", "state")}, "camera 'state' has the name of another part of an"),
        ({"camera": ("pixels", 0)}, "camera 'pixels' has the name of another part of an"),
        ({"camera": ["front", 1.5]}, "camera is 1.5; expected a camera's name or number"),
        ({"camera": ()}, "camera is empty"),
        (
            {"id": "gym/CartPole-v1", "camera": ("front", "left")},
            "has one camera only; leave out camera 'front'",
        ),
        (
            {"id": "dmc/quadruped-walk", "protocol": "drqv2", "camera": (0, 2)},
            "camera is 0 2, but protocol 'drqv2' fixes 2 for dmc/quadruped-walk",
        ),
        ({"id": "metaworld/reach", "camera": "corner9"}, "corner9"),
        ({"protocol": "dmcgb"}, "unknown protocol 'dmcgb'; did you mean dmc-gb"),
        ({"protocol": "drqv2"}, "protocol 'drqv2' is for dmc/ tasks, not for toy/reach"),
        (
            {"id": "dmc/walker-walk", "protocol": "drqv2", "size": 64},
            "fixes 84 for dmc/walker-walk",
        ),
        (
            {"id": "dmc/walker-walk", "protocol": "drqv2", "action_repeat": 4},
            "action_repeat is 4, but",
        ),
        ({"distraction": "video_hard", "videos": "/no/such/folder"}, "/no/such/folder"),
        ({"distraction": "video_hard", "videos": ""}, "no video folder ''; give a folder"),
        ({"videos": "/no/such/folder"}, "/no/such/folder"),
        (
            {"action_chunk": 26},
            "action_chunk is 26, but an episode of toy/reach ends after 25 actions",
        ),
        (
            {"action_chunk": 4, "action_repeat": 10},
            r"after 3 actions \(25 control steps, 10 to an a",
        ),
        (
            {"id": "dmc/walker-walk", "action_chunk": 251},
            r"after 250 actions \(1000 control steps, 4",
        ),
        ({"id": "gym/Pendulum-v1", "action_chunk": 201}, "ends after 200 actions"),
        (
            {"id": "toy/balance", "end_at_success": True},
            "toy/balance does not tell whether it is solved",
        ),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        envs.make(**{"id": "toy/reach", "quality": "fast", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("id", "distraction", "message"),
    [
        ("dmc/reacher-easy", "video_easy", "video_easy changes no pixel of dmc/reacher-easy"),
        ("gym/CartPole-v1", "video_hard", "its picture shows no floor or sky or walls"),
        ("gym/CartPole-v1", "color_hard", "its picture has fixed colors"),
    ],
)
def test_a_distraction_that_changes_nothing_is_told(
    id: str, distraction: str, message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        envs.make(id, distraction=distraction, **SMALL)


def test_a_folder_that_cannot_serve_an_evaluation_is_told_when_training_starts(
    tmp_path: Path,
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "train" / "0.png")
    with pytest.warns(UserWarning, match="belongs to split 'validation' or 'test'"):
        envs.make("toy/reach", distraction="video_hard", videos=tmp_path, size=24)


@pytest.mark.parametrize(
    ("id", "distraction"), [("dmc/reacher-easy", "video_hard"), ("metaworld/reach", "video_easy")]
)
def test_a_distraction_that_changes_pixels_is_not_complained_about(
    id: str, distraction: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.make(id, distraction=distraction, **SMALL)


@pytest.mark.parametrize(
    ("protocol", "repeats", "encoder", "updates", "batch"),
    [
        ("dmc-gb", {"walker-walk": 4, "finger-spin": 2, "cartpole-swingup": 8}, "dmc-gb", 1, 128),
        ("drqv2", {"walker-walk": 2, "finger-spin": 2, "cartpole-swingup": 2}, "drqv2", 0.5, 256),
        (
            "planet",
            {
                "cartpole-swingup": 8,
                "reacher-easy": 4,
                "cheetah-run": 4,
                "finger-spin": 2,
                "ball_in_cup-catch": 4,
                "walker-walk": 2,
            },
            "drqv2",
            1,
            512,
        ),
    ],
)
def test_protocols_fix_what_their_papers_fixed(protocol, repeats, encoder, updates, batch) -> None:
    fixed = envs.PROTOCOLS[protocol]
    assert (fixed.encoder, fixed.updates_per_step, fixed.batch_size) == (encoder, updates, batch)
    assert (fixed.size, fixed.frame_stack) == (84, 3)
    for task, repeat in repeats.items():
        assert fixed.action_repeat_of(envs.get_spec(f"dmc/{task}")) == repeat


def test_a_protocol_decides_what_make_makes() -> None:
    env = envs.make("dmc/quadruped-walk", protocol="drqv2", quality="fast")
    assert env.settings["action_repeat"] == env.action_repeat == 2
    assert env.settings["camera"] == 2
    assert envs.make("dmc/cartpole-swingup", protocol="planet", quality="fast").action_repeat == 8


def test_the_floor_of_reach_drift_moves() -> None:
    lowest = {}
    for id in ("toy/reach", "toy/reach-drift"):
        env = envs.make(id, size=24, frame_stack=1, seed=0)
        begun = env.reset()[0]
        for _ in range(8):
            seen = env.step(np.zeros(2))[0]
        lowest[id] = (begun[:, -1] != seen[:, -1]).any()
    assert lowest == {"toy/reach": False, "toy/reach-drift": True}


def test_tasks_that_draw_themselves_need_no_gl() -> None:
    code = "import envs; env = envs.make('gym/CartPole-v1', size=24, seed=0); print(env.reset()[0].shape)"
    without = {**os.environ, "MUJOCO_GL": "disable"}
    without.pop("SIGHTLINE_GL_RENDERER", None)
    done = subprocess.run([sys.executable, "-c", code], env=without, capture_output=True, text=True)
    assert done.stdout == "(9, 24, 24)\n", done.stderr


class Third(envs.get_spec("toy/reach").build().__class__):
    """Someone else's task."""


def test_tasks_of_ones_own_work_like_ours() -> None:
    if "mine/reach" not in envs.list_ids():
        envs.register("mine/reach", Third, action_repeat=2, arguments={"drift": 0.1})
    env = gymnasium.make("mine/reach-v0", size=24)
    assert isinstance(env.unwrapped, Third)
    assert env.get_wrapper_attr("settings")["action_repeat"] == 2
    with pytest.raises(UserError, match="a second time"):
        envs.register("mine/reach", Third)
    with pytest.raises(UserError, match="expected an id of the form"):
        envs.register("mine", Third)


def test_a_vector_environment_does_not_depend_on_its_workers() -> None:
    alone, shared = (
        envs.make_vec("toy/reach", 3, workers=workers, size=24, distraction="color_hard", seed=1)
        for workers in (0, 2)
    )
    first, second = alone.reset()[0], shared.reset(seed=1)[0]
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    alone.action_space.seed(0)
    for _ in range(30):  # over an episode's end
        action = alone.action_space.sample()
        for one, other in zip(alone.step(action)[:4], shared.step(action)[:4], strict=True):
            np.testing.assert_array_equal(one, other)
    alone.close()
    shared.close()


def test_workers_know_tasks_that_were_registered_outside_of_them() -> None:
    if "mine/balance" not in envs.list_ids():
        envs.register("mine/balance", "envs.toy:Balance", arguments={"drift": 0.1})
    env = envs.make_vec("mine/balance", 1, workers=1, observation="state", seed=0)
    assert env.reset()[0].shape == (1, 2)
    env.close()


def test_the_seed_of_a_vector_environment_is_also_its_replacements() -> None:
    seeded = [envs.make_vec("toy/reach", 1, observation="state", seed=seed) for seed in (1, 1, 2)]
    entropies = [env.get_state()["entropy"] for env in seeded]
    assert entropies == [1, 1, 2]


@pytest.mark.parametrize(
    "arguments", [{"num_envs": 0}, {"num_envs": 2, "workers": -1}, {"num_envs": 2, "size": 0}]
)
def test_impossible_vector_environments_are_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match="expected"):
        envs.make_vec("toy/reach", **arguments)
