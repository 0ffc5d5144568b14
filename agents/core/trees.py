"""Nested dicts and lists of tensors, arrays and plain values as two files: safetensors and JSON.

`<name>.safetensors` holds every tensor and array with its exact dtype, `<name>.json` the tree
around them and the checksum of the former. Nothing is pickled, so loading runs no code. Tensors
that are the same memory are stored once and come back as one tensor; channels_last tensors come
back contiguous, as safetensors knows no strides (the memory format is the agent's business).
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from agents.core.errors import UserError

SCHEMA = 1
"""Raised when files that were written so far can no longer be read."""


class DamagedFileError(UserError):
    """A file is missing, truncated or altered."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"'{path}' is damaged ({what}); resume from an earlier checkpoint or copy it again"
        )


def save_tree(folder: str | Path, name: str, tree: Any) -> None:
    """Write `<name>.safetensors` and `<name>.json`, both flushed to the disk.

    Args:
        folder: an existing folder.
        name: of the files, without a suffix.
        tree: dicts, lists and tuples of tensors, arrays, NumPy scalars, int (of any size), float,
            bool, str and None. Keys may be of any of the plain kinds.

    Raises:
        TypeError: for a leaf of another kind; the message gives its place.
    """
    tensors = _Tensors()
    root = _encode(tree, name, tensors)
    data = safetensors.torch.save(tensors.by_key)
    write_file(Path(folder) / f"{name}.safetensors", data)
    head = {"schema": SCHEMA, "nbytes": len(data), "crc32": zlib.crc32(data), "tree": root}
    write_file(Path(folder) / f"{name}.json", json.dumps(head).encode())


def load_tree(folder: str | Path, name: str) -> Any:
    """Return what `save_tree` wrote; tensors are on the CPU.

    Raises:
        DamagedFileError: when a file is not whole.
        UserError: when the files are of another version.
    """
    head_path = Path(folder) / f"{name}.json"
    head = read_json(head_path)
    path = Path(folder) / f"{name}.safetensors"
    tensors = load_tensors(path, head.get("nbytes"), head.get("crc32"))
    try:
        return _decode(head["tree"], tensors)
    except KeyError as error:
        raise DamagedFileError(head_path, f"{error} is missing") from None


# --------------------------------------------------------------------------------------- files


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path, nbytes: int | None, crc32: int | None) -> bytes:
    """Read a file and compare it with what was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFileError(path, "it is missing") from None
    if nbytes is not None and len(data) != nbytes:
        raise DamagedFileError(path, f"{len(data)} bytes instead of {nbytes}")
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise DamagedFileError(path, "its checksum differs")
    return data


def load_tensors(path: Path, nbytes: int | None, crc32: int | None) -> dict[str, Tensor]:
    """Read a safetensors file and compare it with what was written."""
    try:
        return safetensors.torch.load(read_file(path, nbytes, crc32))
    except SafetensorError as error:
        raise DamagedFileError(path, str(error)) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read one of our JSON files: an object that says its schema version."""
    try:
        head = json.loads(read_file(path, None, None))
        schema = int(head["schema"])
    except (ValueError, KeyError, TypeError):
        raise DamagedFileError(path, "it is no whole JSON object") from None
    check_schema(path, schema, SCHEMA)
    return head


def check_schema(path: Path, schema: Any, ours: int) -> None:
    """Refuse a file of another layout than this version reads.

    Raises:
        UserError: says whether the file is older or newer, and what to do.
    """
    if schema == ours:
        return
    if isinstance(schema, int) and schema < ours:
        what = "use the version that wrote it (system.json of the run names its commit)"
    else:
        what = "upgrade"
    raise UserError(f"'{path}' has schema {schema}, this version reads {ours}: {what}")


# ------------------------------------------------------------------------------------- encoding


class _Tensors:
    """Tensors by readable keys; the same memory is kept once, overlapping memory is copied."""

    def __init__(self) -> None:
        self.by_key: dict[str, Tensor] = {}
        self._keys: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()
        self._alive: list[Tensor] = []  # an address means something only while its tensor lives

    def add(self, place: str, tensor: Tensor) -> str:
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        identity = (storage, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in self._keys:
            return self._keys[identity]
        self._alive.append(tensor)
        stored = tensor.cpu().contiguous()
        if storage in self._storages:
            stored = stored.clone()
        self._storages.add(storage)
        key = place if place not in self.by_key else f"{place}#{len(self.by_key)}"
        self.by_key[key] = stored
        self._keys[identity] = key
        return key


def _encode(node: Any, place: str, tensors: _Tensors) -> Any:
    if isinstance(node, Tensor):
        return {"$tensor": tensors.add(place, node)}
    if isinstance(node, np.ndarray | np.generic):
        try:
            array = torch.from_numpy(np.array(node, order="C"))
        except TypeError as error:
            raise TypeError(f"'{place}' cannot be saved: {error}") from None
        return {"$array" if isinstance(node, np.ndarray) else "$scalar": tensors.add(place, array)}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, list):
        return [_encode(child, f"{place}/{i}", tensors) for i, child in enumerate(node)]
    if isinstance(node, tuple):
        return {"$tuple": _encode(list(node), place, tensors)}
    if isinstance(node, dict):
        children = {key: _encode(child, f"{place}/{key}", tensors) for key, child in node.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in children):
            return children
        items = [[_encode(key, place, tensors), child] for key, child in children.items()]
        return {"$items": items}
    raise TypeError(
        f"'{place}' is a {type(node).__name__}; checkpoints hold tensors, arrays, numbers, "
        "strings, None, and dicts, lists and tuples of them"
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(child, tensors) for child in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        ((kind, value),) = node.items()
        if kind == "$tensor":
            return tensors[value]
        if kind == "$array":
            return tensors[value].numpy()
        if kind == "$scalar":
            return tensors[value].numpy()[()]
        if kind == "$tuple":
            return tuple(_decode(value, tensors))
        if kind == "$items":
            return {_decode(key, tensors): _decode(child, tensors) for key, child in value}
    return {key: _decode(child, tensors) for key, child in node.items()}
