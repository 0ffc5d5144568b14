"""An episode's state trees as columns: what never changes is kept once, arrays that change are stacked.

A simulator's state has dozens of leaves, of which few change in an episode. A thousand trees in one file would be tens
of thousands of small tensors; their columns are as many as one tree has leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_KINDS = ("same", "array", "dict", "list", "each")
"""What a column can be: one value, a stack [T, ...], columns by key or by place, or a list of T values."""


def to_columns(trees: Sequence[Any]) -> dict[str, Any]:
    """Return trees of one episode as a tree of columns, which `agents.core.trees.save_tree` can write.

    Args:
        trees: at least one; dicts with string keys, lists, tuples, arrays, numbers, strings and None.
    """
    first = trees[0]
    if all(_equal(first, tree) for tree in trees[1:]):
        return {"same": first}
    kinds = {type(tree) for tree in trees}
    if kinds == {dict} and all(tree.keys() == first.keys() for tree in trees):
        return {"dict": {key: to_columns([tree[key] for tree in trees]) for key in first}}
    if kinds == {list} and all(len(tree) == len(first) for tree in trees):
        return {"list": [to_columns(list(parts)) for parts in zip(*trees, strict=True)]}
    if kinds == {np.ndarray} and len({(tree.dtype, tree.shape) for tree in trees}) == 1:
        return {"array": np.stack(trees)}
    return {"each": list(trees)}


def from_columns(columns: dict[str, Any], index: int) -> Any:
    """Return the tree number `index` that `to_columns` was given; arrays are copies."""
    ((kind, value),) = columns.items()
    if kind == "same":
        return _copied(value)
    if kind == "array":
        return value[index].copy()
    if kind == "dict":
        return {key: from_columns(column, index) for key, column in value.items()}
    if kind == "list":
        return [from_columns(column, index) for column in value]
    assert kind == "each", f"a column is one of {_KINDS}"
    return _copied(value[index])


def _equal(left: Any, right: Any) -> bool:
    """Return whether two trees are the same to the bit, types included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, np.ndarray | np.generic):
        alike = left.dtype == right.dtype and left.shape == right.shape
        return alike and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return repr(left) == repr(right)  # -0.0 is not 0.0, and NaN is NaN
    return bool(left == right)


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree.copy() if isinstance(tree, np.ndarray) else tree
