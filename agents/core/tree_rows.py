"""Trees of tensors [B, ...], such as what agents remember of B episodes: their rows, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rows_of(tree: Any, index: Tensor) -> Any:
    """Return rows of all tensors of a tree, which may be None."""
    if isinstance(tree, Mapping):
        return {name: rows_of(part, index) for name, part in tree.items()}
    return None if tree is None else tree[index]


def with_rows(tree: Any, index: Tensor, rows: Any) -> Any:
    """Return a tree whose tensors have other rows at `index`; the given one stays as it is."""
    if isinstance(tree, Mapping):
        return {name: with_rows(part, index, rows[name]) for name, part in tree.items()}
    return rows if tree is None else tree.index_copy(0, index, rows)


def on_device(tree: Any, device: torch.device) -> Any:
    """Return a tree with its tensors on a device."""
    if isinstance(tree, Mapping):
        return {name: on_device(part, device) for name, part in tree.items()}
    return tree.to(device) if isinstance(tree, Tensor) else tree


def count_rows(tree: Any) -> int | None:
    """Return B; None where there is no tensor."""
    if isinstance(tree, Mapping):
        counts = (count_rows(part) for part in tree.values())
        return next((count for count in counts if count is not None), None)
    return len(tree) if isinstance(tree, Tensor) else None
