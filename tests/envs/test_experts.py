"""What a script would do in the steps to come: the same as step by step, and nothing that follows differs."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

import envs
from envs.experts import scripted_expert
from wrappers.errors import UserError


@pytest.mark.parametrize(
    ("id", "repeat", "seen"),
    [
        ("toy/reach", 2, "pixels"),
        ("toy/balance", 1, "state"),
        ("metaworld/drawer-open", 2, "state"),
    ],
)
def test_a_chunk_is_what_the_script_does_action_by_action(id: str, repeat: int, seen: str) -> None:
    """Until the episode ends, in the second chunk; the rest of it repeats the last action."""
    chunk, taken = 4, 6
    settings = {
        "observation": seen, "size": 24, "action_repeat": repeat, "episode_length": taken * repeat,
        "distraction": "color_hard" if seen == "pixels" else None, "seed": 3,
    }  # fmt: skip
    script = scripted_expert(id)
    with closing(envs.make(id, **{**settings, "observation": "state", "distraction": None})) as env:
        state, _ = env.reset()
        alone = []
        for _ in range(taken):
            alone.append(script(state))
            np.testing.assert_array_equal(env.scripted_action(), alone[-1])
            state, *_ = env.step(alone[-1])
    with (
        closing(envs.make(id, action_chunk=chunk, **settings)) as asked,
        closing(envs.make(id, action_chunk=chunk, **settings)) as plain,
    ):
        np.testing.assert_array_equal(asked.reset()[0], plain.reset()[0])
        for start in (0, chunk):
            actions = asked.scripted_action()
            assert actions.shape == asked.action_space.shape
            wanted = [alone[min(start + i, taken - 1)] for i in range(chunk)]
            np.testing.assert_array_equal(actions, wanted)
            ours, theirs = asked.step(actions), plain.step(actions)
            np.testing.assert_array_equal(ours[0], theirs[0])
            assert ours[1:4] == theirs[1:4]
        assert ours[3], "truncated"


def test_a_vector_environment_asks_every_script() -> None:
    alone = envs.make_vec("toy/reach", 3, observation="state", action_chunk=2, seed=5)
    both = envs.make_vec("toy/reach", 3, observation="pixels", size=24, action_chunk=2, seed=5, workers=2)  # fmt: skip
    try:
        states, _ = alone.reset()
        both.reset()
        actions = np.stack(both.call("scripted_action"))
        np.testing.assert_array_equal(actions, np.repeat(states[:, None, 2:], 2, axis=1))
    finally:
        alone.close()
        both.close()


def test_tasks_without_a_script_say_so() -> None:
    for id, said in (
        ("dmc/walker-walk", "dmc/walker-walk has no script"),
        ("toy/recall", "toy/recall has no scripted expert"),
        ("toy/reech", "did you mean reach"),
    ):
        with pytest.raises(UserError, match=said):
            scripted_expert(id)
