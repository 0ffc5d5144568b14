"""Exact snapshots of a simulator in mid-episode, as trees of arrays, numbers and strings.

Two things have to be caught. MuJoCo's integration state alone is not enough: Gymnasium's tasks read
quantities that `mj_step` left behind *before* it integrated (`xpos` of the previous substep,
contact forces), so every derived array is kept beside it (33 kB for Humanoid-v5). And Python
attributes of a task change during an episode (start positions, stages of a reward, time limits), so
every plain attribute is kept.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mujoco
import numpy as np

_INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION

_TUPLE, _PAIRS, _GENERATOR = "__tuple__", "__pairs__", "__generator__"
"""Keys that mark what a tree cannot hold as it is: tuples, dicts with other keys than strings,
generators."""

_INERT_PACKAGES = {"gymnasium", "mujoco", "pygame"}
"""Objects from here (spaces, specifications, models, windows) hold no state of an episode of their
own."""

_INERT_ATTRIBUTES = {"_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs", "metadata"}


class NotPlainError(TypeError):
    """An object holds state that a tree of arrays and numbers cannot express."""


def physics_state(model: mujoco.MjModel, data: mujoco.MjData) -> dict[str, Any]:
    """Return the integration state of `data` and every derived array of fixed size."""
    integration = np.empty(mujoco.mj_stateSize(model, _INTEGRATION))
    mujoco.mj_getState(model, data, integration, _INTEGRATION)
    derived = {name: value.copy() for name, value in _fixed_arrays(data).items()}
    return {"integration": integration, "derived": derived}


def set_physics_state(model: mujoco.MjModel, data: mujoco.MjData, state: dict[str, Any]) -> None:
    """Put `data` where `physics_state` was taken; the model's own arrays must be there already."""
    mujoco.mj_setState(model, data, state["integration"], _INTEGRATION)
    mujoco.mj_forward(model, data)  # for what has no fixed size: contacts and constraints
    for name, value in _fixed_arrays(data).items():
        value[:] = state["derived"][name]


def _fixed_arrays(data: mujoco.MjData) -> dict[str, np.ndarray]:
    """Return MjData's arrays whose size the model alone decides, by name.

    These are the ones in its buffer, which begins with `qpos`. Others live in an arena that every
    step lays out anew, or are not allocated at all, for which the bindings show whatever memory
    there is.
    """
    start = data.qpos.ctypes.data
    values = ((name, getattr(data, name)) for name in dir(data) if not name.startswith("_"))
    arrays = {name: value for name, value in values if isinstance(value, np.ndarray) and value.size}
    return {
        name: value
        for name, value in arrays.items()
        if 0 <= value.ctypes.data - start < data.nbuffer
    }


def attributes(instance: object, skip: Collection[str] = ()) -> dict[str, Any]:
    """Return the plain attributes of `instance`: numbers, strings, arrays, containers, generators.

    Args:
        instance: what to look into.
        skip: names of attributes that are kept in another way.

    Raises:
        NotPlainError: if an attribute may hold state that would be lost.
    """
    tree = {}
    for name, value in vars(instance).items():
        if name in _INERT_ATTRIBUTES or name in skip:
            continue
        if _is_inert(value) or _is_simulators(value):
            continue
        try:
            tree[name] = _encode(value)
        except NotPlainError as error:
            raise NotPlainError(f"its attribute '{name}' is a {error}") from None
    return tree


def set_attributes(instance: object, tree: dict[str, Any]) -> None:
    """Restore what `attributes` returned; attributes that the tree lacks stay as they are."""
    for name, value in tree.items():
        setattr(instance, name, _decode(value))


def _is_simulators(value: Any) -> bool:
    """Tell whether an array is a window onto MuJoCo's memory, which follows the physics by itself.

    Meta-World keeps such windows as attributes (`init_left_pad`, at times `obj_init_pos`): what
    looks like a start position moves with the body, and a copy in its place would change the
    reward.
    """
    while isinstance(value, np.ndarray):
        value = value.base
    return type(value).__name__ == "PyCapsule"


def _is_inert(value: Any) -> bool:
    """Tell whether a value is a function, or made of objects that an episode does not change."""
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        return len(value) > 0 and all(_is_inert(item) for item in items)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "SU"  # the maps of Gymnasium's text tasks
    return callable(value) or type(value).__module__.partition(".")[0] in _INERT_PACKAGES


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return np.array(value)
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(item) for key, item in value.items()}
        return {_PAIRS: [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, np.random.Generator):
        return {_GENERATOR: value.bit_generator.state}
    raise NotPlainError(type(value).__name__)


def _decode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy() if value.ndim else value[()]
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TUPLE in value:
        return tuple(_decode(item) for item in value[_TUPLE])
    if _PAIRS in value:
        return {_decode(key): _decode(item) for key, item in value[_PAIRS]}
    if _GENERATOR in value:
        generator = np.random.default_rng()
        generator.bit_generator.state = value[_GENERATOR]
        return generator
    return {key: _decode(item) for key, item in value.items()}
