"""Meta-World through our adapter: seeded, exact to resume, upright, and still the same tasks."""

from contextlib import closing

import gymnasium
import numpy as np
import pytest
from metaworld import env_dict, policies

import envs
from envs.metaworld_tasks import MetaWorldTask, task_names
from wrappers.errors import UserError

# Their targets or start positions are windows onto the simulator's memory (basketball, door-lock),
# rewards go through stages (pick-place), several bodies are placed (stick-pull).
SAMPLE = ("basketball", "door-lock", "drawer-open", "pick-place", "stick-pull")
EVERY = [
    name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in task_names()
]


def actions(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, 4)).astype(np.float32)


def trace(env: MetaWorldTask, steps: np.ndarray) -> np.ndarray:
    """Return observations, rewards and infos of a rollout in one array."""
    rows = []
    for action in steps:
        observation, reward, terminated, truncated, info = env.step(action)
        rows.append(np.hstack((observation, reward, terminated, truncated, *info.values())))
    return np.array(rows)


@pytest.mark.parametrize("task", EVERY)
def test_the_seed_decides_the_episode_whatever_came_before(task: str) -> None:
    fresh, used = MetaWorldTask(task), MetaWorldTask(task)
    used.reset(seed=9)
    trace(used, actions(30))
    np.testing.assert_array_equal(fresh.reset(seed=5)[0], used.reset(seed=5)[0])
    np.testing.assert_array_equal(trace(fresh, actions(30)), trace(used, actions(30)))
    np.testing.assert_array_equal(fresh.reset()[0], used.reset()[0])


@pytest.mark.parametrize("task", EVERY)
def test_a_restored_episode_goes_on_exactly(task: str) -> None:
    env = MetaWorldTask(task)
    env.reset(seed=1)
    trace(env, actions(40))
    state = env.get_state()
    expected = trace(env, actions(25)), env.reset()[0]

    fresh, used = MetaWorldTask(task), MetaWorldTask(task)
    used.reset(seed=2)
    trace(used, actions(10))
    for other in (fresh, used):
        other.set_state(state)
        np.testing.assert_array_equal(trace(other, actions(25)), expected[0])
        np.testing.assert_array_equal(other.reset()[0], expected[1])


@pytest.mark.parametrize("task", EVERY)
def test_resets_write_only_the_model_arrays_that_a_state_holds(task: str) -> None:
    env = MetaWorldTask(task)
    model = env._env.model
    before = {
        name: value.copy()
        for name in dir(model)
        if not name.startswith("_") and isinstance(value := getattr(model, name), np.ndarray)
    }
    env.reset(seed=0)
    trace(env, actions(10))
    changed = {name for name, value in before.items() if not _same(value, getattr(model, name))}
    assert changed <= set(env.get_state()["model"])


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.tobytes() == second.tobytes()


def test_every_reset_draws_new_places() -> None:
    env = MetaWorldTask("drawer-open")
    env.reset(seed=0)
    goals = {tuple(env.reset()[0][-3:]) for _ in range(5)}
    assert len(goals) == 5


@pytest.mark.parametrize("task", SAMPLE)
def test_rewards_and_success_are_meta_worlds_own(task: str) -> None:
    ours = MetaWorldTask(task)
    observation, _ = ours.reset(seed=3)
    theirs = env_dict.ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    theirs._partially_observable = False
    del theirs.sawyer_observation_space
    theirs._set_task_called = True
    theirs._last_rand_vec = (
        ours._env._last_rand_vec.copy()
    )  # replays one draw, as its benchmarks do
    theirs.reset()
    for action in actions(40):
        observation, reward, _, _, info = ours.step(action)
        expected, expected_reward, _, _, expected_info = theirs.step(action)
        # Upstream's first observation is one substep old; the second still has it as the last one.
        observation, expected = (np.delete(o, np.s_[18:36]) for o in (observation, expected))
        np.testing.assert_allclose(observation, expected, atol=1e-5)
        assert reward == pytest.approx(expected_reward, abs=1e-5)
        assert info["success"] == expected_info["success"]


def test_the_first_observation_shows_the_objects_where_they_are() -> None:
    env = MetaWorldTask("drawer-open")
    env.reset(seed=4)
    observation, _ = env.reset()
    drawer = env._env.data.body("drawer_link").xpos + np.array((0, -0.16, 0))
    np.testing.assert_allclose(observation[4:7], drawer, atol=1e-6)
    assert drawer[0] == pytest.approx(env._env._last_rand_vec[0], abs=1e-3)


def test_corner2_is_meta_worlds_picture_turned_upright() -> None:
    ours = MetaWorldTask("drawer-open")
    ours.reset(seed=0)
    theirs = env_dict.ALL_V3_ENVIRONMENTS["drawer-open-v3"](
        render_mode="rgb_array", camera_name="corner2", width=84, height=84
    )
    theirs.model.body_pos[:] = ours._env.model.body_pos
    theirs.model.site_pos[:] = ours._env.model.site_pos
    theirs.set_state(ours._env.data.qpos.copy(), ours._env.data.qvel.copy())
    picture = ours.view(84, 84, quality="reference").render()
    np.testing.assert_array_equal(picture, theirs.render()[::-1, ::-1])
    theirs.close()


def test_walls_and_floor_are_background_while_table_and_objects_stay() -> None:
    env = MetaWorldTask("drawer-open")
    env.reset(seed=0)
    view = env.view(84, 84, quality="fast")
    assert view.parts == {"sky", "floor", "walls"}
    foreground = view.foreground()
    assert not foreground[0].any()  # the room behind
    assert foreground[42:48, 42:54].all()  # the table
    assert 0.2 < foreground.mean() < 0.6


@pytest.mark.parametrize("task", ["drawer-open", "hammer"])
def test_the_registry_says_that_the_table_is_no_foreground(task: str) -> None:
    masks, pictures = [], []
    with closing(envs.make(f"metaworld/{task}", quality="fast", size=84, seed=0)) as env:
        env.reset(seed=0)
        masks.append(env.foreground())
        view = env.view
        slots = [slot for slot in view.colors("objects") if slot.startswith("table")]
        for color in (np.ones(3), np.zeros(3)):  # of unlit white and black nothing is alike
            view.set_colors(dict.fromkeys(slots, color), "objects")
            pictures.append(view.render().astype(int))
        adapter = MetaWorldTask(task)
        adapter.set_state(env.get_state()["env"])
        with closing(adapter.view(84, 84, quality="fast")) as with_table:
            masks.append(with_table.foreground())
    repainted = np.abs(pictures[0] - pictures[1]).max(2) > 0
    np.testing.assert_array_equal(masks[1] & ~masks[0], repainted)
    assert not (masks[0] & ~masks[1]).any()
    assert 0.03 < masks[0].mean() < masks[1].mean() - 0.1, "robot and objects remain"


@pytest.mark.parametrize("quality", ["fast", "reference"])
@pytest.mark.parametrize("task", ["drawer-open", "pick-place"])
def test_a_video_covers_every_pixel_of_the_background(task: str, quality: str) -> None:
    env = MetaWorldTask(task)
    env.reset(seed=0)
    view = env.view(84, 84, quality=quality)
    coverage = view.render_layers(view.parts).coverage
    # Without the walls, the sides of the table come out: 303 pixels here.
    assert view.foreground()[coverage < 0.5].all()
    assert (coverage[view.foreground()] < 0.5).mean() > 0.98
    view.close()


def test_a_camera_is_upright_whether_named_or_numbered() -> None:
    env = MetaWorldTask("drawer-open")
    env.reset(seed=0)
    number = env._env.model.camera("corner2").id
    views = [env.view(24, 24, camera, "fast") for camera in (None, "corner2", number, str(number))]
    pictures = [view.render() for view in views]
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])


def test_floor_and_walls_can_be_tinted_and_nothing_else_changes() -> None:
    env = MetaWorldTask("drawer-open")
    env.reset(seed=0)
    view = env.view(84, 84, quality="fast")
    clean = view.render().astype(int)
    for part in ("floor", "walls"):
        view.set_colors({part: np.array([1.0, 0.0, 0.0])})
        changed = (view.render() != clean).any(-1)
        covered = view.render_layers(frozenset({part})).coverage == 1
        assert changed[covered].mean() > 0.9
        assert not changed[~covered].any()
    view.close()


def test_the_time_limit_truncates_and_stepping_on_is_refused() -> None:
    env = MetaWorldTask("reach", episode_length=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(4))
    env.reset(seed=0)
    ends = [env.step(action)[2:4] for action in actions(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(4))


def test_an_episode_lasts_500_steps_by_default() -> None:
    env = MetaWorldTask("reach")
    env.reset(seed=0)
    truncated = [env.step(np.zeros(4))[3] for _ in range(500)]
    assert truncated == [False] * 499 + [True]


def test_nothing_makes_it_look_like_a_goal_environment() -> None:
    assert not hasattr(MetaWorldTask("reach"), "compute_reward")


def test_unknown_tasks_are_told_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"'drawer-opne'; did you mean drawer-open"):
        MetaWorldTask("drawer-opne")


def solves(task: str, seed: int) -> bool:
    """Tell whether Meta-World's scripted expert solves the task through the adapter."""
    env = MetaWorldTask(task)
    expert = policies.ENV_POLICY_MAP[f"{task}-v3"]()
    observation, _ = env.reset(seed=seed)
    truncated = False
    while not truncated:
        action = np.clip(expert.get_action(observation.astype(np.float64)), -1, 1)
        observation, _, _, truncated, info = env.step(action)
        if info["success"]:
            return True
    return False


@pytest.mark.filterwarnings("ignore:Constant")  # the experts' own actions exceed [-1, 1]
@pytest.mark.parametrize("task", ["drawer-open", "button-press", "window-close", "door-lock"])
def test_scripted_experts_solve_tasks(task: str) -> None:
    assert solves(task, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")
def test_scripted_experts_solve_nearly_every_task() -> None:
    failed = [task for task in task_names() if not (solves(task, seed=0) or solves(task, seed=1))]
    assert not failed
