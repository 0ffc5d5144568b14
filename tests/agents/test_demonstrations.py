"""Chunks of demonstrations against a naive list of episodes, and what is refused."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.core.demonstrations import Demonstrations
from agents.core.errors import UserError

ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
STATE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)


def space(stack: int) -> gym.spaces.Dict:
    return gym.spaces.Dict(
        {"pixels": gym.spaces.Box(0, 255, (3 * stack, 8, 8), np.uint8), "state": STATE}
    )


def episode(random: np.random.Generator, length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return frames [T + 1, 3, 8, 8], states and actions."""
    seen = {
        "pixels": random.integers(0, 256, (length + 1, 3, 8, 8), dtype=np.uint8),
        "state": random.normal(size=(length + 1, 3)).astype(np.float32),
    }
    return seen, random.uniform(-1, 1, (length, 2)).astype(np.float32)


def store(rows: int, **changes: Any) -> Demonstrations:
    values: dict[str, Any] = {"horizon": 4, "log": lambda _: None, **changes}
    stack = values.get("frame_stack", 1)
    return Demonstrations(values.pop("space", space(stack)), ACTION, rows=rows, **values)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    horizon=st.integers(1, 6),
    stack=st.integers(1, 3),
    stride=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_what_a_loop_over_its_episode_gives(
    lengths: list[int], horizon: int, stack: int, stride: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    data = store(sum(lengths), horizon=horizon, frame_stack=stack, stride=stride)
    expected = []
    for length in lengths:
        seen, actions = episode(random, length)
        data.add(seen, actions)
        for now in range(length):
            frames = [seen["pixels"][max(now - stride * back, 0)] for back in range(stack)][::-1]
            taken = [actions[min(now + ahead, length - 1)] for ahead in range(horizon)]
            mask = [now + ahead < length for ahead in range(horizon)]
            expected.append((np.concatenate(frames), seen["state"][now], np.stack(taken), mask))
    assert (len(data), data.episodes, data.longest) == (sum(lengths), len(lengths), max(lengths))
    index = random.permutation(len(data))
    batch = data.read(index)
    for place, row in enumerate(index):
        pixels, state, chunk, mask = expected[row]
        np.testing.assert_array_equal(batch.observation["pixels"][place], pixels)
        np.testing.assert_array_equal(batch.observation["state"][place], state)
        np.testing.assert_array_equal(batch.chunk[place], chunk)
        np.testing.assert_array_equal(batch.mask[place], mask)
    assert batch.observation["pixels"].dtype == torch.uint8
    whole = [b.chunk for b in data.batches(3)]
    np.testing.assert_array_equal(torch.cat(whole), np.stack([e[2] for e in expected]))


def test_of_stacks_the_newest_picture_is_kept_and_stacked_anew() -> None:
    random = np.random.default_rng(0)
    seen, actions = episode(random, 6)
    frames = seen["pixels"]
    shown = np.stack([np.concatenate([frames[max(t - k, 0)] for k in (2, 1, 0)]) for t in range(7)])
    plain, stacked = store(6, frame_stack=2, stride=2), store(6, frame_stack=2, stride=2)
    plain.add(seen, actions)
    stacked.add({**seen, "pixels": shown}, actions)
    rows = np.arange(6)
    assert torch.equal(
        plain.read(rows).observation["pixels"], stacked.read(rows).observation["pixels"]
    )
    assert plain.digest == stacked.digest


def test_rows_are_drawn_uniformly_and_the_draws_go_on_after_a_restore() -> None:
    random = np.random.default_rng(0)
    episodes = [episode(random, length) for length in (1, 5, 14)]

    def filled(seed: int) -> Demonstrations:
        data = store(20, seed=seed)
        for seen, actions in episodes:
            data.add(seen, actions)
        return data

    data = filled(1)
    first = data.column("action")[0]
    drawn = torch.cat([data.sample(500).chunk[:, 0] for _ in range(20)])
    share = (drawn == first).all(1).float().mean()
    assert abs(float(share) - 1 / 20) < 0.01, "rows count, not episodes"
    saved = data.get_state()
    expected = data.sample(8).chunk
    other = filled(2)
    assert not torch.equal(other.sample(8).chunk, expected)
    other.set_state(saved)
    assert torch.equal(other.sample(8).chunk, expected)
    cut = store(20)
    cut.add(*episodes[0])
    with pytest.raises(UserError, match="are not those that the run began with"):
        cut.set_state(saved)


def broken(**changes: Any) -> tuple[Any, Any]:
    seen, actions = episode(np.random.default_rng(0), 5)
    if "nan" in changes:
        seen["state"][3, 1] = np.nan
    if "large" in changes:
        actions[2, 0] = 1.5
    if "infinite" in changes:
        actions[4, 1] = np.inf
    if "size" in changes:
        seen["pixels"] = seen["pixels"][..., :7]
    if "short" in changes:
        seen["state"] = seen["state"][:3]
    if "blind" in changes:
        del seen["pixels"]
    if "empty" in changes:
        actions = actions[:0]
    if "other" in changes:
        actions = actions[:, :1]
    if "float" in changes:
        seen["pixels"] = seen["pixels"].astype(np.float32)
    return seen, actions


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "episode 1, step 3: 'state' is nan"),
        ("large", r"episode 1, step 2: an action is 1.5, outside \[-1, 1\]"),
        ("infinite", "episode 1, step 4: 'action' is inf"),
        ("size", "episode 1 has 'pixels' of shape"),
        ("short", "episode 1 has 'state' of shape"),
        ("blind", "episode 1 has no 'pixels', only state"),
        ("empty", "episode 1 is empty"),
        ("other", "episode 1 has actions of shape"),
        ("float", "episode 1 has 'pixels' of float32; pictures are uint8"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_name(kind: str, said: str) -> None:
    data = store(10)
    data.add(*broken())
    before = data.digest
    with pytest.raises(UserError, match=said) as error:
        data.add(*broken(**{kind: True}))
    assert "\n" not in str(error.value)
    assert (len(data), data.digest) == (5, before), "nothing of it was kept"
    data.add(*broken())


def test_stores_without_rows_or_of_other_actions_are_refused() -> None:
    with pytest.raises(UserError, match="are empty"):
        store(0)
    with pytest.raises(UserError, match="chunks are of actions"):
        Demonstrations(STATE, gym.spaces.Discrete(3), rows=1, horizon=1)
    with pytest.raises(UserError, match="horizon is 0"):
        store(1, horizon=0)
    data = store(3)
    with pytest.raises(UserError, match="does not fit"):
        data.add(*broken())
