"""Pixels against its definition; no needless render, no mixed random streams."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.toy import TASKS, Balance, Catch, Reach
from wrappers.distraction.presets import DISTRACTIONS, make_distraction
from wrappers.distraction.textures import ProceduralVideos
from wrappers.errors import UserError
from wrappers.pixels import Pixels

# One level of the suite stands for the others.
KINDS = [name for name in DISTRACTIONS if not name.startswith("dcs") or name == "dcs_hard"]


class Counter(gymnasium.Env):
    """Pays t at its t-th step and shows t in every pixel; ends after `length` steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length: int, terminates: bool = False, success_at: int = -1) -> None:
        self.length, self.terminates, self.success_at = length, terminates, success_at
        self.time = self.renders = self.views = 0
        self.actions: list[int] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.time, self.actions = 0, []
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.time < self.length, "stepped after the end"
        self.time += 1
        self.actions.append(action)
        done = self.time == self.length
        info = {"success": float(self.time == self.success_at)}
        state = np.full(1, self.time, np.float32)
        return state, float(self.time), done and self.terminates, done and not self.terminates, info

    def view(self, height: int, width: int, camera: Any = None, quality: str = "") -> "Counter":
        self.views += 1
        self.shape = (height, width, 3)
        return self

    def render(self) -> np.ndarray:
        self.renders += 1
        return (np.arange(3) + 3 * self.time + np.zeros(self.shape)).astype(np.uint8)


def channels(*times: int) -> list[int]:
    """The value of every channel of a stack that shows `times`."""
    return [3 * time + channel for time in times for channel in range(3)]


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 12),
    terminates=st.booleans(),
    repeat=st.integers(1, 5),
    stack=st.integers(1, 4),
    actions=st.lists(st.integers(0, 1), min_size=12, max_size=12),
)
def test_repeat_and_stack_follow_their_definition(
    length: int, terminates: bool, repeat: int, stack: int, actions: list[int]
) -> None:
    counter = Counter(length, terminates)
    env = Pixels(counter, observation="both", size=2, frame_stack=stack, action_repeat=repeat)
    observation, _ = env.reset(seed=0)
    seen, time, returns, naive_actions = [0] * stack, 0, 0.0, []
    for action in actions:
        assert observation["pixels"][:, 0, 0].tolist() == channels(*seen[-stack:])
        assert observation["state"].tolist() == [time]
        assert (env.render() == channels(time)).all()
        observation, reward, terminated, truncated, _ = env.step(action)

        begun = time
        time = min(time + repeat, length)
        naive_actions += [action] * (time - begun)
        seen.append(time)
        returns += reward
        assert reward == sum(range(begun + 1, time + 1))
        assert (terminated, truncated) == (
            time == length and terminates,
            time == length and not terminates,
        )
        if terminated or truncated:
            break
    assert counter.actions == naive_actions
    assert returns == time * (time + 1) / 2
    assert counter.renders == len(seen) - stack + 1, "one render per agent step and one at reset"


@pytest.mark.parametrize("distraction", [None, "video_hard"])
def test_a_chunk_is_its_actions_one_after_the_other(distraction: str | None) -> None:
    chunked = make("reach", distraction, action_chunk=4, frame_stack=2)
    single = make("reach", distraction, frame_stack=1)
    length = -(-chunked.unwrapped.episode_length // 2)  # two control steps an action
    assert chunked.action_space.shape == (4, 2)
    assert length % 4, "the last chunk must be cut short"
    frames = [chunked.reset(seed=3)[0]["pixels"][:3]]
    single.reset(seed=3)
    rng, taken, ended = np.random.default_rng(0), 0, False
    while not ended:
        actions = rng.uniform(-1, 1, (4, 2)).astype(np.float32)
        observation, reward, terminated, truncated, _ = chunked.step(actions)
        rewards = []
        for action in actions[: length - taken]:
            one, paid, *ends, _ = single.step(action)
            rewards.append(paid)
        taken, ended = taken + len(rewards), terminated or truncated
        assert [terminated, truncated] == ends
        assert reward == pytest.approx(sum(rewards))
        assert (observation["state"] == one["state"]).all()
        assert (observation["pixels"] == np.concatenate([frames[-1], one["pixels"]])).all()
        frames.append(one["pixels"])
    assert taken == length


def test_only_continuous_actions_come_in_chunks() -> None:
    with pytest.raises(UserError, match="only Box actions come in chunks"):
        make("catch", None, action_chunk=2)


def test_success_in_the_middle_of_a_repeat_is_kept() -> None:
    env = Pixels(Counter(8, success_at=2), size=2, action_repeat=4)
    env.reset(seed=0)
    assert [env.step(0)[4]["success"] for _ in range(2)] == [1.0, 0.0]


@pytest.mark.parametrize(("success_at", "taken"), [(2, 2), (6, 6), (-1, 8)])
def test_an_episode_may_end_with_the_step_that_solves_it(success_at: int, taken: int) -> None:
    """In the middle of a repeat: no action is taken beyond, and it counts as an end, not as a time limit."""
    task = Counter(8, success_at=success_at)
    env = Pixels(task, size=2, action_repeat=4, end_at_success=True)
    env.reset(seed=0)
    for _ in range(2):
        _, _, terminated, truncated, info = env.step(0)
        if terminated or truncated:
            break
    assert task.time == taken
    assert (terminated, truncated) == (success_at > 0, success_at < 0)
    assert info["success"] == (success_at > 0)
    assert info["control_steps"] == (taken - 1) % 4 + 1
    env.reset()
    env.step(0)
    assert task.time == min(taken, 4), "another episode begins"


def test_nothing_is_rendered_in_the_constructor_nor_for_states() -> None:
    pixels, counter = Counter(4), Counter(4)
    Pixels(pixels, size=2)
    assert pixels.views == 0
    env = Pixels(counter, observation="state", size=2)
    env.reset(seed=0)
    env.step(0)
    assert counter.renders == 0
    assert (env.render() == channels(1)).all(), "a picture can still be asked for"


def test_observations_are_not_aliased() -> None:
    env = Pixels(Counter(9), size=2)
    first, _ = env.reset(seed=0)
    first[:] = 255
    second, *_ = env.step(0)
    env.render()[:] = 255
    assert second[:, 0, 0].tolist() == channels(0, 0, 1)
    assert env.step(0)[0][:, 0, 0].tolist() == channels(0, 1, 2)


def make(task: str, distraction: str | None, **settings: Any) -> Pixels:
    settings = {"observation": "both", "size": 24, "action_repeat": 2, **settings}
    return Pixels(TASKS[task](), distraction=make_distraction(distraction), **settings)


def rollout(env: Pixels, steps: int, seed: int) -> list[tuple[bytes, bytes, float, bool, bytes]]:
    rng, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        space = env.action_space
        is_discrete = isinstance(space, gymnasium.spaces.Discrete)
        action = rng.integers(space.n) if is_discrete else rng.uniform(-1, 1, space.shape)
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()  # goes on with the generators as they are
        arrays = observation["pixels"].tobytes(), observation["state"].tobytes()
        seen.append((*arrays, reward, terminated, env.render().tobytes()))
    return seen


@pytest.mark.parametrize("distraction", [None, *KINDS])
@pytest.mark.parametrize("task", TASKS)
def test_a_state_taken_in_mid_episode_goes_on_exactly_in_a_fresh_environment(
    task: str, distraction: str | None
) -> None:
    env = make(task, distraction)
    env.reset(seed=3)
    rollout(env, 5, seed=1)
    state, observation = env.get_state(), env.observe()
    expected = rollout(env, 60, seed=2)

    fresh = make(task, distraction)
    fresh.reset(seed=99)
    fresh.set_state(state)
    assert all((fresh.observe()[key] == observation[key]).all() for key in observation)
    assert rollout(fresh, 60, seed=2) == expected
    env.set_state(state)  # the state was not eaten by its first use
    assert rollout(env, 60, seed=2) == expected


@pytest.mark.parametrize("distraction", KINDS)
def test_a_seed_begins_the_same_episodes_whatever_is_seen(distraction: str) -> None:
    clean, distracted, again = (
        make("reach", None),
        make("reach", distraction),
        make("reach", distraction),
    )
    appearances = []
    for seed in (5, None, None):
        states = [env.reset(seed=seed)[0] for env in (clean, distracted, again)]
        assert (states[0]["state"] == states[1]["state"]).all()
        assert (states[1]["pixels"] == states[2]["pixels"]).all(), "a seed repeats the appearance"
        assert (states[0]["pixels"] != states[1]["pixels"]).any()
        appearances.append(repr(distracted.get_state()["distraction"]))
    assert len(set(appearances)) == 3, "every episode has its own appearance"


@pytest.mark.parametrize("distraction", KINDS)
def test_the_appearance_does_not_depend_on_whether_it_is_looked_at(distraction: str) -> None:
    seeing, blind = make("reach", distraction), make("reach", distraction, observation="state")
    for env in (seeing, blind):
        env.reset(seed=1)
        for _ in range(7):
            env.step(np.zeros(2, np.float32))
    assert (seeing.render() == blind.render()).all()


def test_a_video_goes_on_by_one_frame_per_agent_step_whatever_the_repeat() -> None:
    for repeat in (1, 4):
        env = make("reach", "video_hard", action_repeat=repeat, observation="pixels")
        env.reset(seed=0)
        state = env.get_state()["distraction"]
        video = ProceduralVideos().open(state["name"], 24, 24)
        start = int(state["start"] * video.length)
        for step in range(5):
            background = env.view.render_layers(env.view.parts).coverage == 1
            expected = video.frame(start + step)
            assert (env.render()[background] == expected[background]).all()
            env.step(np.zeros(2))


def test_the_foreground_mask_is_given_on_request() -> None:
    env = Pixels(Reach(), size=24, foreground_mask=True)
    _, info = env.reset(seed=0)
    assert info["foreground"].shape == (24, 24)
    assert info["foreground"].dtype == bool
    *_, info = env.step(np.zeros(2))
    assert 0 < info["foreground"].mean() < 0.2
    assert "foreground" not in Pixels(Reach(), size=24).reset(seed=0)[1]


@pytest.mark.filterwarnings("error", "ignore:.*different from the unwrapped version")
@pytest.mark.parametrize("observation", ["pixels", "state", "both"])
@pytest.mark.parametrize("distraction", [None, "color_hard", "video_hard"])
@pytest.mark.parametrize("task", [Reach, Balance, Catch])
def test_gymnasiums_checker_passes(task: type, distraction: str | None, observation: Any) -> None:
    env = Pixels(
        task(), observation=observation, size=24, distraction=make_distraction(distraction)
    )
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize("distraction", [None, "video_hard", "color_hard"])
def test_nothing_is_shown_or_done_before_the_first_reset(distraction: str | None) -> None:
    env = make("reach", distraction)
    for call in (env.render, lambda: env.step(np.zeros(2))):
        with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\) first"):
            call()
    begun = make("reach", distraction)
    begun.reset(seed=0)
    env.set_state(begun.get_state())  # as good as a reset
    assert (env.render() == begun.render()).all()
