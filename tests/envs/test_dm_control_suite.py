import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from envs.rendering import resolve_quality

resolve_quality("fast")

from envs import dm_control_suite  # noqa: E402
from envs.dm_control_suite import DMControlTask, task_names  # noqa: E402
from wrappers.errors import UserError  # noqa: E402

suite = dm_control_suite.suite

# Among them everything that a task may keep: targets in the model, terrains, springs, stages.
SAMPLE = (
    "ball_in_cup-catch",
    "cheetah-run",
    "dog-run",
    "finger-turn_hard",
    "fish-upright",
    "lqr-lqr_2_1",
    "manipulator-insert_peg",
    "point_mass-hard",
    "quadruped-escape",
    "reacher-hard",
    "stacker-stack_2",
    "swimmer-swimmer6",
)
REST = tuple(sorted(set(task_names()) - set(SAMPLE)))
EVERY_TASK = [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


def actions(env, count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *env.action_space.shape))


def rollout(env, sequence):
    """Return all that an agent gets to see of a sequence of actions."""
    return [env.step(action) for action in sequence]


def same(left, right):
    return all(
        np.array_equal(a[0], b[0]) and a[1:4] == b[1:4] for a, b in zip(left, right, strict=True)
    )


def is_tree(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_tree(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_tree(item) for item in value)
    return value is None or isinstance(value, np.ndarray | bool | int | float | str)


def model_arrays(env):
    model = env._env.physics.model.ptr
    names = [name for name in dir(model) if not name.startswith(("_", "tex_data", "mesh_"))]
    arrays = ((name, getattr(model, name)) for name in names)
    return {name: a.copy() for name, a in arrays if isinstance(a, np.ndarray)}


def test_there_are_51_tasks():
    assert len(task_names()) == 51
    assert {"walker-walk", "ball_in_cup-catch", "lqr-lqr_6_2"} < set(task_names())


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_fresh_environment_goes_on_exactly_from_the_middle_of_an_episode(task):
    env = DMControlTask(task)
    env.reset(seed=3)
    at_first = model_arrays(DMControlTask(task))
    rollout(env, actions(env, 3))
    env.reset()
    rollout(env, actions(env, 9))
    state = env.get_state()
    assert is_tree(state)
    changed = {
        name for name, a in model_arrays(env).items() if not np.array_equal(a, at_first[name])
    }
    assert changed <= set(state["model"]), "what an episode changes in its model is saved"
    going_on = actions(env, 20, seed=1)
    expected = rollout(env, going_on)
    expected_next = env.reset()[0]

    fresh = DMControlTask(task)
    fresh.set_state(state)
    assert same(rollout(fresh, going_on), expected)
    assert np.array_equal(fresh.reset()[0], expected_next)

    used = env
    used.set_state(state)
    assert same(rollout(used, going_on), expected), "also in an environment that went elsewhere"


@pytest.mark.parametrize(
    "task", ["fish-swim", "finger-turn_easy", "manipulator-bring_peg", "quadruped-escape"]
)
def test_a_restored_episode_looks_the_same(task):
    env, other = DMControlTask(task), DMControlTask(task)
    env.reset(seed=1)
    other.reset(seed=2)
    views = [e.view(48, 48, quality="fast") for e in (env, other)]
    assert not np.array_equal(views[0].render(), views[1].render())
    rollout(env, actions(env, 5))
    other.set_state(env.get_state())
    assert np.array_equal(views[0].render(), views[1].render())
    for view in views:
        view.close()


@pytest.mark.parametrize("task", ["walker-walk", "reacher-easy", "dog-fetch"])
def test_a_seed_begins_the_episode_that_the_suite_itself_begins(task):
    domain, _, name = task.partition("-")
    shipped = suite.load(domain, name, task_kwargs={"random": 7})
    step = shipped.reset()
    env = DMControlTask(task)
    rollout_of_another_seed, _ = env.reset(seed=8)
    observation, _ = env.reset(seed=7)
    assert not np.array_equal(observation, rollout_of_another_seed)
    for action in actions(env, 5):
        flat = np.concatenate([np.ravel(part) for part in step.observation.values()])
        np.testing.assert_array_equal(observation, flat.astype(np.float32))
        step = shipped.step(action)
        observation, reward, *_ = env.step(action)
        assert reward == step.reward


@pytest.mark.parametrize("task", EVERY_TASK)
def test_the_same_seed_gives_the_same_episodes(task):
    env, other = DMControlTask(task), DMControlTask(task)
    for seed in (2**40, None):  # the second episode goes on with the first's stream
        first, second = env.reset(seed=seed)[0], other.reset(seed=seed)[0]
        assert np.array_equal(first, second)
        assert first in env.observation_space
        sequence = actions(env, 3)
        assert same(rollout(env, sequence), rollout(other, sequence))


def test_without_a_seed_environments_differ():
    first, second = (DMControlTask("reacher-easy").reset()[0] for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_actions_of_one_reach_the_actuators_limits(task):
    env = DMControlTask(task)
    env.reset(seed=0)
    control = env._env.physics.data.ctrl
    spec = env._env.action_spec()
    # `lqr` has no limits: it takes the action as it is.
    low, high = (
        np.where(np.abs(limit) < 1e9, limit, unit)
        for unit, limit in ((-1, spec.minimum), (1, spec.maximum))
    )
    for action, expected in ((-1, low), (0, (low + high) / 2), (1, high), (5, high)):
        env.step(np.full(env.action_space.shape, action, np.float32))
        np.testing.assert_array_equal(control, expected)


def test_a_time_limit_truncates_and_stepping_on_is_refused():
    env = DMControlTask("cartpole-balance")
    assert env.episode_length == 1000
    short = DMControlTask("cartpole-balance", episode_length=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        short.step(np.zeros(1))
    for _ in range(2):
        short.reset()
        ends = [step[2:4] for step in rollout(short, actions(short, 3))]
        assert ends == [(False, False), (False, False), (False, True)]
        with pytest.raises(gymnasium.error.ResetNeeded):
            short.step(np.zeros(1))
    short.reset()
    rollout(short, actions(short, 2))
    resumed = DMControlTask("cartpole-balance", episode_length=3)
    resumed.set_state(short.get_state())
    assert resumed.step(np.zeros(1))[2:4] == (False, True), "the time limit is saved too"
    short.step(np.zeros(1))
    resumed.set_state(short.get_state())
    with pytest.raises(gymnasium.error.ResetNeeded):
        resumed.step(np.zeros(1))


def test_a_real_end_terminates():
    env = DMControlTask("lqr-lqr_2_1")
    env.reset(seed=0)
    env._env.physics.data.qpos[:] = 0
    env._env.physics.data.qvel[:] = 0
    env._env.physics.forward()
    _, _, terminated, truncated, _ = env.step(np.zeros(1))
    assert terminated
    assert not truncated


@pytest.mark.parametrize("task", ["walker-walk", "quadruped-run", "swimmer-swimmer6"])
def test_reference_pictures_are_the_suites_own(task):
    env = DMControlTask(task)
    env.reset(seed=0)
    view = env.view(64, 80)
    own = env._env.physics.render(64, 80, camera_id=2 if task.startswith("quadruped") else 0)
    np.testing.assert_array_equal(view.render(), own)
    view.close()


def test_render_shows_the_default_camera():
    env = DMControlTask("cartpole-swingup")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (240, 240, 3)
    assert env.metadata["render_fps"] == 100
    view = env.view(240, 240, camera="fixed", quality="fast")
    assert np.abs(picture.astype(int) - view.render()).mean() < 10
    view.close()
    env.close()


def test_tasks_reset_where_nothing_can_draw():
    code = (
        "from envs.dm_control_suite import DMControlTask as T; T('quadruped-escape').reset(seed=0)"
    )
    environment = {**os.environ, "MUJOCO_GL": "disable"}
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, check=True
    )


def test_an_unknown_task_offers_the_nearest():
    with pytest.raises(UserError, match="dm_control task 'walker-wlak'; did you mean walker-walk"):
        DMControlTask("walker-wlak")
