"""Gymnasium's tasks through our adapter: same task, actions in [-1, 1], pictures, exact to
resume."""

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

import envs
from envs.gymnasium_tasks import GymnasiumTask
from envs.registry import list_ids
from wrappers.errors import UserError

# A reward from the position of one substep ago (Ant), contact forces in the observation (Humanoid),
# a state in Python attributes (CartPole, Pendulum), tables and a card deck's generator (Taxi,
# Blackjack).
SAMPLE = ("Ant-v5", "Blackjack-v1", "CartPole-v1", "HalfCheetah-v5", "Humanoid-v5", "Pendulum-v1")
TASKS = [id.removeprefix("gym/") for id in list_ids() if id.startswith("gym/")]
EVERY = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]


class Opaque(gymnasium.Env):
    """A task of which a part cannot be told from outside, as the world of Box2D."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.MultiBinary(3)
    metadata = {"render_modes": []}  # noqa: RUF012

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.world = memoryview(b"?")
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple:
        return np.zeros(2, np.float32), 0.0, False, False, {"is_success": np.True_}


class OpaqueDiscrete(Opaque):
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def step(self, action: int) -> tuple:
        assert action in self.action_space
        return super().step(action)


def drawn(render_mode: str | None = None) -> gymnasium.Env:
    return CartPoleEnv(render_mode=render_mode)


def undrawn() -> gymnasium.Env:
    return CartPoleEnv()


@pytest.fixture(autouse=True)
def _own_tasks() -> None:
    for task in (Opaque, OpaqueDiscrete, drawn, undrawn):
        if f"{task.__name__}-v0" not in gymnasium.registry:
            gymnasium.register(f"{task.__name__}-v0", task)


def actions(env: GymnasiumTask, count: int) -> list:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(count)]


def trace(env: GymnasiumTask, steps: list) -> np.ndarray:
    """Return observations and rewards of a rollout, over the ends of episodes, in one array."""
    rows = []
    for action in steps:
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
        rows.append(np.hstack((observation, reward, terminated, truncated)))
    return np.array(rows)


@pytest.mark.parametrize("task", EVERY)
def test_the_seed_decides_the_episode_whatever_came_before(task: str) -> None:
    fresh, used = GymnasiumTask(task), GymnasiumTask(task)
    steps = actions(fresh, 30)
    used.reset(seed=9)
    trace(used, steps)
    np.testing.assert_array_equal(fresh.reset(seed=5)[0], used.reset(seed=5)[0])
    np.testing.assert_array_equal(trace(fresh, steps), trace(used, steps))


@pytest.mark.parametrize("task", EVERY)
def test_a_restored_episode_goes_on_exactly(task: str) -> None:
    env = GymnasiumTask(task)
    steps = actions(env, 60)
    env.reset(seed=1)
    trace(env, steps[:30])
    picture = env.render()
    state = env.get_state()
    expected = trace(env, steps[30:])

    fresh, used = GymnasiumTask(task), GymnasiumTask(task)
    used.reset(seed=2)
    used.render()
    for other in (fresh, used):
        other.set_state(state)
        np.testing.assert_array_equal(other.render(), picture)
        np.testing.assert_array_equal(trace(other, steps[30:]), expected)
    for each in (env, fresh, used):
        each.close()


def test_the_time_limit_goes_on_where_it_was() -> None:
    env = GymnasiumTask("Pendulum-v1", episode_length=10)
    env.reset(seed=0)
    trace(env, actions(env, 7))
    fresh = GymnasiumTask("Pendulum-v1", episode_length=10)
    fresh.set_state(env.get_state())
    assert [fresh.step(np.zeros(1))[2:4] for _ in range(3)] == [(False, False)] * 2 + [
        (False, True)
    ]
    with pytest.raises(gymnasium.error.ResetNeeded):
        fresh.step(np.zeros(1))


@pytest.mark.parametrize("task", ["Pendulum-v1", "Humanoid-v5", "HalfCheetah-v5"])
def test_actions_are_rescaled_to_the_tasks_own_bounds(task: str) -> None:
    ours, theirs = GymnasiumTask(task), gymnasium.make(task)
    assert ours.action_space == gymnasium.spaces.Box(-1, 1, theirs.action_space.shape, np.float32)
    observation, _ = ours.reset(seed=3)
    expected, _ = theirs.reset(seed=3)
    np.testing.assert_array_equal(observation, expected.astype(np.float32))
    for action in actions(ours, 20):
        observation, reward, *_ = ours.step(action)
        scaled = theirs.action_space.high * action
        expected, expected_reward, *_ = theirs.step(scaled)
        np.testing.assert_allclose(observation, expected, rtol=1e-4, atol=1e-4)
        assert reward == pytest.approx(expected_reward, rel=1e-4)
    theirs.close()


def test_a_module_that_registers_the_task_may_be_named() -> None:
    assert GymnasiumTask("gymnasium.envs:CartPole-v1").episode_length == 500


def test_a_fall_terminates_and_does_not_truncate() -> None:
    env = GymnasiumTask("CartPole-v1")
    env.reset(seed=0)
    ended = (False, False)
    while not any(ended):
        _, _, *ended, _ = env.step(0)
    assert tuple(ended) == (True, False)


def test_discrete_observations_become_one_hot_and_actions_stay() -> None:
    env = GymnasiumTask("FrozenLake-v1")
    observation, _ = env.reset(seed=0)
    assert observation.tolist() == [1.0] + [0.0] * 15
    assert observation.dtype == np.float32
    assert env.action_space == gymnasium.spaces.Discrete(4)


def test_discrete_actions_start_at_zero_and_success_is_told() -> None:
    env = GymnasiumTask("OpaqueDiscrete-v0")
    env.reset()
    assert env.action_space == gymnasium.spaces.Discrete(2)
    assert env.step(1)[4]["success"] == 1.0


def test_self_drawn_pictures_are_averaged_down_and_are_all_foreground() -> None:
    env = GymnasiumTask("CartPole-v1")
    env.reset(seed=0)
    view = env.view(50, 60)
    full = env._env.render()  # 400 x 600: every pixel of ours is the mean of 8 x 10 of it
    expected = full.reshape(50, 8, 60, 10, 3).mean((1, 3))
    assert view.render().shape == (50, 60, 3)
    np.testing.assert_allclose(view.render(), expected, atol=1)
    assert view.foreground().all()
    assert not view.render_layers(frozenset({"sky"})).coverage.any()


def test_a_running_body_stays_in_the_picture() -> None:
    env = GymnasiumTask("HalfCheetah-v5")
    env.reset(seed=0)
    view = env.view(64, 64, quality="fast")
    before = view.foreground().mean()
    env._env.unwrapped.data.qpos[0] += 50
    env.step(np.zeros(6))
    env.step(np.zeros(6))
    assert view.foreground().mean() == pytest.approx(before, rel=0.5)
    assert before > 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GymnasiumTask("CartPol-v1"),
            "unknown Gymnasium task 'CartPol-v1'; did you mean CartP",
        ),
        (lambda: GymnasiumTask("nowhere:Env-v0"), "needs a package.*nowhere"),
        (lambda: GymnasiumTask("Opaque-v0"), "action space MultiBinary.*expected a bounded Box"),
        (lambda: GymnasiumTask("LunarLander-v3"), "needs a package that is not installed"),
        (lambda: GymnasiumTask("HalfCheetah-v3"), "gym/HalfCheetah-v3 needs .*another task or ver"),
        (lambda: GymnasiumTask("phys2d/CartPole-v0"), "gym/phys2d/CartPole-v0 needs a package"),
        (lambda: GymnasiumTask("CartPole-v1").view(8, 8, camera="top"), "has one camera only"),
        (lambda: GymnasiumTask("HalfCheetah-v5").view(8, 8, camera="top"), "camera"),
        (lambda: GymnasiumTask("OpaqueDiscrete-v0").view(8, 8), "has no picture"),
    ],
)
def test_mistakes_are_told_in_one_line(call, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_task_that_cannot_be_saved_exactly_says_so() -> None:
    env = GymnasiumTask("OpaqueDiscrete-v0")
    env.reset()
    with pytest.raises(UserError, match="cannot be saved in mid-episode: its attribute 'world'"):
        env.get_state()


def test_a_task_without_a_picture_is_made_where_none_is_asked_for() -> None:
    for id in ("gym/OpaqueDiscrete-v0", "gym/undrawn-v0"):
        env = envs.make(id, observation="state", seed=0)
        env.reset()
        env.step(0)
        for asked in ({}, {"foreground_mask": True}, {"distraction": "video_hard"}):
            with pytest.raises(UserError, match="has no picture; observe its state instead"):
                envs.make(id, **{"observation": "state", **asked} if asked else {})
    with pytest.raises(UserError, match="has one camera only"):
        envs.make("gym/CartPole-v1", observation="state", camera="top")


def test_a_function_that_makes_a_task_is_asked_for_pictures() -> None:
    env = envs.make("gym/drawn-v0", size=24, quality="fast", seed=0)
    assert env.reset()[0].shape == (9, 24, 24)
    env.close()
