"""The toy tasks: documented returns, exactness, and a view that keeps the protocol."""

from collections.abc import Callable

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.toy import TASKS, Balance, Catch, Goals, Reach, Recall, ToyTask
from envs.toy_experts import scripted_expert
from envs.toy_view import TARGET
from wrappers.errors import UserError

Policy = Callable[[np.ndarray, np.random.Generator], object]


def mean_return(task: type[ToyTask], policy: Policy, episodes: int) -> float:
    env, rng, total = task(), np.random.default_rng(0), 0.0
    for seed in range(episodes):
        state, _ = env.reset(seed=seed)
        done = False
        while not done:
            state, reward, terminated, truncated, _ = env.step(policy(state, rng))
            total += reward
            done = terminated or truncated
    return total / episodes


@pytest.mark.parametrize(
    ("task", "policy", "documented"),
    [
        (Reach, lambda s, rng: rng.uniform(-1, 1, 2), 12.7),
        (Reach, lambda s, rng: np.zeros(2), 14.1),
        (Reach, lambda s, rng: s[2:], 23.9),
        (Balance, lambda s, rng: rng.uniform(-1, 1, 1), 5.9),
        (Balance, lambda s, rng: np.zeros(1), 5.9),
        (Balance, lambda s, rng: [-8 * s[0] - 2 * s[1]], 38.3),
        (Catch, lambda s, rng: rng.integers(3), 0.4),
        (Catch, lambda s, rng: 1, 0.6),
        (Catch, lambda s, rng: 1 + np.sign(np.trunc((s[1] - s[0]) / 0.13)), 6.0),
        (Goals, lambda s, rng: rng.integers(4), 0.36),
        (Goals, lambda s, rng: 0, 1.0),
        (Recall, lambda s, rng: rng.integers(2), 2.5),
        (Recall, lambda s, rng: 0, 2.5),
    ],
)
def test_documented_returns(task: type[ToyTask], policy: Policy, documented: float) -> None:
    assert mean_return(task, policy, 400) == pytest.approx(documented, abs=0.06 + 0.06 * documented)


@pytest.mark.parametrize(
    ("name", "documented"), [("reach", 23.9), ("balance", 38.3), ("catch", 6.0)]
)
def test_scripted_experts_reach_the_documented_best(name: str, documented: float) -> None:
    expert = scripted_expert(name)
    task = TASKS[name]
    state, _ = task().reset(seed=0)
    assert task.action_space.contains(expert(state))
    achieved = mean_return(task, lambda s, rng: expert(s), 400)
    assert achieved == pytest.approx(documented, abs=0.06 + 0.06 * documented)


def test_tasks_without_an_expert_say_so() -> None:
    with pytest.raises(UserError, match="did you mean reach"):
        scripted_expert("raech")
    with pytest.raises(
        UserError, match="toy/recall has no scripted expert; those of balance, catch"
    ):
        scripted_expert("recall")  # it sees no cue in the state of the moment


def test_balance_cannot_be_solved_from_the_position_alone() -> None:
    gains = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2, 4, 16)
    blind = max(mean_return(Balance, lambda s, rng, k=k: [-k * s[0]], 150) for k in gains)
    assert blind == pytest.approx(16.5, abs=1.5)


@pytest.mark.parametrize("seed", range(4))
def test_recall_pays_for_what_was_seen_first_and_shows_it_once(seed: int) -> None:
    env = Recall()
    state, _ = env.reset(seed=seed)
    side, right, wrong = state[0], int(state[0] > 0), int(state[0] < 0)
    assert 0.4 <= abs(side) <= 0.8
    shown, rewards, later = env.render(), [], []
    for step in range(12):
        asked = state[1]
        state, reward, terminated, truncated, _ = env.step(right if step != 9 else wrong)
        rewards.append((asked, reward))
        later.append((state[0], env.render()))
        assert (terminated, truncated) == (False, step == 11)
    assert rewards == [(0, 0)] * 7 + [(1, 1)] * 2 + [(1, 0)] + [(1, 1)] * 2
    assert all(side == 0 for side, _ in later)
    other = Recall()
    other.reset(seed=next(s for s in range(20) if Recall().reset(seed=s)[0][0] * side < 0))
    assert (other.render() != shown).any(), "the picture shows the side"
    for _, picture in later:
        other.step(0)
        assert (other.render() == picture).all(), "and nothing of it is left"


def test_ends_are_told_apart() -> None:
    reach, catch = Reach(), Catch()
    reach.reset(seed=0)
    assert [reach.step(np.zeros(2))[2:4] for _ in range(25)][-2:] == [(False, False), (False, True)]
    catch.reset(seed=0)
    catch.set_state({**catch.get_state(), "scene": np.array((-1.0, 0.8, -0.7))})
    assert catch.step(1)[1:4] == (0.0, True, False), "a miss terminates"
    catch.set_state({**catch.get_state(), "scene": np.array((0.8, 0.8, -0.7)), "steps": 59})
    assert catch.step(1)[1:4] == (1.0, False, True), "the time limit truncates"
    assert Reach(episode_length=3).episode_length == 3


@pytest.mark.parametrize("goal", range(4))
def test_every_goal_ends_the_episode_says_which_it_is_and_is_as_far(goal: int) -> None:
    env = Goals()
    for seed in range(20):
        env.reset(seed=seed)
        told, terminated = [], False
        while not terminated:
            state, reward, terminated, _, info = env.step(goal)
            told.append(info["behavior"])
        assert told[:-1] == [-1] * (len(told) - 1)
        assert (told[-1], reward, info["success"]) == (goal, 1.0, 1.0)
        assert len(told) in (3, 4)
        assert np.abs(state - Goals.places[goal]).max() <= 0.2 + 1e-6


def test_a_picture_tells_where_the_point_is_and_every_goal() -> None:
    env = Goals()
    env.reset(seed=0)
    env.set_state({**env.get_state(), "scene": np.array((0.0, 0.2))})
    picture = env.render()
    target = np.rint(255 * TARGET).tolist()
    for row, column in ((12, 2), (12, 21), (2, 12), (21, 12)):
        assert picture[row, column].tolist() == target
    assert picture[9, 12].tolist() == [179, 128, 77]


@pytest.mark.parametrize("task", TASKS.values())
def test_checker_seeds_and_states(task: type[ToyTask]) -> None:
    check_env(task())
    first, second = task(drift=0.1), task(drift=0.1)
    first.reset(seed=1)
    second.reset(seed=2)
    first.action_space.seed(0)
    actions = [first.action_space.sample() for _ in range(40)]
    first.step(actions[0])
    state = first.get_state()
    runs = []
    for env in (first, second, first):
        if runs:  # the first run goes on as if nothing had been saved
            env.set_state(state)
        run = []
        for action in actions:
            _, reward, terminated, truncated, _ = env.step(action)
            run.append((env.render().tobytes(), reward, terminated))
            if terminated or truncated:
                env.reset()
        runs.append(run)
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("size", [(24, 24), (84, 84), (30, 50)])
def test_the_view_keeps_the_protocol(size: tuple[int, int]) -> None:
    env = Reach()
    env.reset(seed=0)
    env.set_state({**env.get_state(), "scene": np.array((0.0, 0.35, 0.5, -0.5))})
    view = env.view(*size)
    picture = view.render()
    assert picture.shape == (*size, 3)
    assert picture.dtype == np.uint8
    assert picture is not view.render()
    top, bottom = picture[0, 0], picture[-1, 0]
    assert top.tolist() == [102, 153, 204], "the sky is above"
    assert bottom.tolist() in ([26, 51, 77], [51, 77, 102]), "the checkered floor is below"
    point, target = (int(0.325 * size[0]), size[1] // 2), (int(0.75 * size[0]), int(0.75 * size[1]))
    assert picture[point].tolist() == [179, 128, 77]
    assert picture[target].tolist() == np.rint(255 * TARGET).tolist()
    foreground = view.foreground()
    assert foreground[point]
    assert foreground[target]
    assert not foreground[0, 0]
    assert not foreground[-1, 0]


@pytest.mark.parametrize("hidden", [("sky",), ("floor",), ("sky", "floor"), ("walls",), ()])
def test_layers_recompose_to_the_picture(hidden: tuple) -> None:
    env = Reach()
    env.reset(seed=4)
    view = env.view(48, 48)
    picture, layers = view.render().astype(int), view.render_layers(frozenset(hidden))
    untouched = layers.coverage == 0
    assert (layers.rgb[untouched] == picture[untouched]).all()
    assert (layers.rgb[layers.coverage == 1] == 0).all()
    env.set_state({**env.get_state(), "scene": np.array((9.0, 9, 9, 9))})  # nobody in the picture
    background = view.render()
    share = layers.coverage[..., None]
    recomposed = (1 - share) * layers.rgb + share * background
    assert np.abs(recomposed - picture).max() <= 1
    assert layers.coverage.dtype == np.float32
    assert (layers.coverage.max() == 1) == bool({"sky", "floor"} & set(hidden))


def test_colors_are_repainted_and_given_back() -> None:
    env = Reach()
    env.reset(seed=0)
    view = env.view(24, 24)
    plain = view.render()
    view.set_colors({"sky": np.array((1.0, 0, 0)), "self": np.array((0, 1.0, 0))})
    assert view.render()[0, 0].tolist() == [255, 0, 0]
    view.set_colors({"sky": np.array((0.0, 0, 1))})
    assert view.render()[0, 0].tolist() == [0, 0, 255]
    assert [0, 255, 0] not in view.render().reshape(-1, 3).tolist(), "the body's own color is back"
    view.set_colors({})
    assert (view.render() == plain).all()
    view.colors()["sky"][:] = 0
    assert view.colors()["sky"].tolist() == [0.4, 0.6, 0.8]
    with pytest.raises(UserError, match=r"did you mean self"):
        view.set_colors({"selv": np.zeros(3)})


def test_the_floor_drifts_and_bodies_do_not() -> None:
    env = Reach(drift=0.1)
    env.reset(seed=0)
    view = env.view(24, 24)
    before, mask = view.render(), view.foreground()
    for _ in range(2):
        env.step(np.zeros(2))
    after = view.render()
    assert (before[-1] != after[-1]).any()
    solid = mask & (view.render_layers(view.parts).coverage == 0)
    assert (before[solid] == after[solid]).all()


def test_an_unknown_camera_is_named() -> None:
    with pytest.raises(UserError, match="unknown camera 'fron'; did you mean front"):
        Reach().view(24, 24, camera="fron")
