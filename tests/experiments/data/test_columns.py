"""State trees come back from their columns as they were, and what does not change is kept once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from agents.core.trees import load_tree, save_tree
from experiments.data.columns import from_columns, to_columns
from tests.experiments.helpers import difference

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**130), 2**130),
    st.floats(allow_nan=False),
    st.sampled_from(["", "PCG64", "same"]),
    st.sampled_from([np.arange(3), np.arange(3.0), np.zeros((2, 2), np.uint8), np.array(7)]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from(["same", "array", "a", "b"]), inner, max_size=3),
    ),
    max_leaves=8,
)


def assert_comes_back(trees: list[Any], columns: dict[str, Any]) -> None:
    for index, tree in enumerate(trees):
        assert difference(from_columns(columns, index), tree) is None


@settings(max_examples=80, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=4))
def test_any_trees_come_back(trees: list[Any]) -> None:
    assert_comes_back(trees, to_columns(trees))


@settings(max_examples=30, deadline=None)
@given(
    TREES, st.lists(st.tuples(st.floats(allow_nan=False), st.integers()), min_size=1, max_size=4)
)
def test_trees_of_one_shape_come_back(tree: Any, changes: list[tuple[float, int]]) -> None:
    trees = [{"tree": tree, "place": np.array([x, 1.0]), "steps": n} for x, n in changes]
    assert_comes_back(trees, to_columns(trees))


def test_zeros_and_nans_are_told_apart() -> None:
    columns = to_columns([0.0, -0.0])
    assert [repr(from_columns(columns, i)) for i in range(2)] == ["0.0", "-0.0"]
    assert to_columns([float("nan")] * 2).keys() == {"same"}
    arrays = [np.array([0.0]), np.array([-0.0])]
    assert np.signbit(from_columns(to_columns(arrays), 1)[0])
    assert to_columns([1, True, 1.0]).keys() == {"each"}


def test_an_episode_is_a_few_arrays_and_survives_the_disk(tmp_path: Path) -> None:
    env = envs.make("dmc/cartpole-swingup", observation="state", seed=1)
    env.reset()
    env.action_space.seed(0)
    trees = [env.get_scene()]
    for _ in range(9):
        env.step(env.action_space.sample())
        trees.append(env.get_scene())
    columns = to_columns(trees)
    save_tree(tmp_path, "scenes", columns)
    assert_comes_back(trees, load_tree(tmp_path, "scenes"))
    alone = 0
    for number, tree in enumerate(trees):
        save_tree(tmp_path, f"tree-{number}", tree)
        alone += sum(file.stat().st_size for file in tmp_path.glob(f"tree-{number}.*"))
    together = sum(file.stat().st_size for file in tmp_path.glob("scenes.*"))
    assert together < alone / 4


def test_what_comes_back_is_a_copy() -> None:
    trees = [{"kept": np.zeros(2), "moved": np.array([i])} for i in range(2)]
    columns = to_columns(trees)
    assert columns["dict"]["kept"].keys() == {"same"}
    assert columns["dict"]["moved"].keys() == {"array"}
    first = from_columns(columns, 0)
    first["kept"] += 1
    first["moved"] += 1
    assert_comes_back(trees, columns)
