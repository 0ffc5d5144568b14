"""What the rows of a store are made of, and where they are kept: on the device, in RAM, on disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import psutil
import torch
from torch import Tensor

from agents.core.errors import UserError, full_disk_named

Storage = Literal["auto", "device", "ram", "mmap"]


@dataclass(frozen=True)
class Field:
    """What one entry of a row looks like."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes that the field takes in one row."""
        return math.prod(self.shape) * self.dtype.itemsize


def observation_boxes(space: gym.Space) -> dict[str, gym.spaces.Box]:
    """Return the parts of an observation space by name; a lone Box is `pixels` or `state`."""
    if isinstance(space, gym.spaces.Dict):
        parts = dict(space.spaces)
    else:
        parts = {"pixels" if is_image(space) else "state": space}
    boxes = {}
    for name, part in parts.items():
        if not isinstance(part, gym.spaces.Box):
            raise UserError(f"the replay stores Box observations; '{name}' is {part}")
        boxes[name] = part
    return boxes


def refuse_other_parts(boxes: Mapping[str, gym.spaces.Box], agent: str) -> None:
    """Refuse parts of an observation beside `pixels` and `state`, which an agent would not look at.

    Args:
        boxes: of `observation_boxes`.
        agent: what it is called.

    Raises:
        UserError: names them.
    """
    others = sorted(set(boxes) - {"pixels", "state"})
    if others:
        joined = any(is_image(boxes[name]) for name in others)
        raise UserError(
            f"{agent} learns from 'pixels' and 'state', and has no use for {', '.join(map(repr, others))}; leave these "
            "parts out of the observation, or give another agent"
            + ("; several cameras must be side by side in 'pixels' (side_by_side=True)" * joined)
        )


def is_image(space: gym.Space) -> bool:
    """Return whether a space holds pixels: uint8 with three axes."""
    return space.dtype == np.uint8 and space.shape is not None and len(space.shape) == 3


def count_views(shape: Sequence[int]) -> int:
    """Return how many cameras' pictures, squares, stand side by side in one of `shape` [..., H, W]; 1 for any other."""
    height, width = shape[-2:]
    return 1 if width % height else width // height


def camera_names(task: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the pictures of a task's cameras are called, in the order in which agents see them; () of one.

    Args:
        task: its settings, as config.json and data sets hold them: their list of cameras is the one place that keeps
            the order (`gym.spaces.Dict` sorts its parts).
    """
    cameras = task.get("camera")
    if not isinstance(cameras, list | tuple) or task.get("observation") == "state":
        return ()
    return tuple(map(str, cameras))


def join_cameras(observation: Any, cameras: Sequence[str]) -> Any:
    """Put pictures that are parts of an observation side by side into one part `pixels`, the first on the left.

    The one place where that is done. Environments that a command makes draw them so in the first place: only what
    comes from elsewhere, a data set or the caller of a loaded policy, is copied here.

    Args:
        observation: as an environment or a data set gave it: an array, or arrays [..., H, W] by name.
        cameras: the parts, see `camera_names`. Without any, and where `pixels` is there already, nothing is done.

    Raises:
        UserError: a camera is missing.

    Example:
        >>> parts = {"front": np.zeros((2, 2)), "arm": np.ones((2, 2)), "state": np.zeros(1)}
        >>> join_cameras(parts, ["front", "arm"])["pixels"][0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    if not cameras or not isinstance(observation, Mapping) or "pixels" in observation:
        return observation
    missing = [name for name in cameras if name not in observation]
    if missing:
        raise UserError(
            f"the observation shows {', '.join(sorted(observation))}, and nothing from camera {', '.join(missing)}; "
            f"give an environment with the cameras {', '.join(cameras)}"
        )
    pixels = np.concatenate([np.asarray(observation[name]) for name in cameras], axis=-1)
    others = {name: part for name, part in observation.items() if name not in cameras}
    return {"pixels": pixels, **others}


def observation_fields(space: gym.Space, frame_stack: int) -> dict[str, Field]:
    """Return the fields that keep an observation: of a stack of frames, one frame."""
    fields = {}
    for name, part in observation_boxes(space).items():
        shape = part.shape
        if is_image(part):
            if shape[0] % frame_stack:
                raise UserError(
                    f"'{name}' has {shape[0]} channels, which are no stack of {frame_stack} "
                    "frames; give the replay the environment's frame_stack"
                )
            shape = (shape[0] // frame_stack, *shape[1:])
        fields[name] = Field(shape, torch.uint8 if part.dtype == np.uint8 else torch.float32)
    return fields


def step_fields(action_space: gym.Space) -> dict[str, Field]:
    """Return the fields that keep an action and what came of it."""
    if isinstance(action_space, gym.spaces.Discrete):
        action = Field((), torch.int64)
    elif isinstance(action_space, gym.spaces.Box):
        action = Field(action_space.shape)
    else:
        raise UserError(f"the replay stores Box and Discrete actions, not {action_space}")
    return {"action": action, "reward": Field(), "terminated": Field((), torch.bool)}


def choose_storage(
    storage: Storage,
    nbytes: int,
    device: torch.device,
    directory: str | Path | None,
    *,
    what: str = "the replay needs",
    remedy: str = "lower --replay-capacity or --size",
) -> tuple[Storage, str]:
    """Return the storage that has room and a line that says so.

    Args:
        storage: that is asked for; `auto` is the first that has room.
        nbytes: that are needed.
        device: of the learner.
        directory: for files, where there may be some.
        what: is to be stored, with its verb, in messages.
        remedy: what makes it smaller, of the flags that the command at hand has.

    Raises:
        UserError: there is not enough room; nothing was allocated.
    """
    candidates: list[Storage] = [storage]
    if storage == "auto":
        candidates = ["ram"] if directory is None else ["ram", "mmap"]
        if device.type == "cuda":
            candidates.insert(0, "device")
    if "mmap" in candidates and directory is None:
        raise UserError("replay storage 'mmap' needs a directory for its files")
    tried = []
    for candidate in candidates:
        free = free_bytes(candidate, device, directory)
        # On a GPU, networks and batches need room too: TD-MPC2 keeps its buffer there only when
        # it fits 2.5 times. Elsewhere a tenth is left to everybody else.
        share = 0.4 if candidate == "device" and device.type == "cuda" else 0.9
        if nbytes <= share * free:
            return candidate, f"{nbytes / 1e9:.2f} GB in {candidate} ({free / 1e9:.1f} GB free)"
        tried.append(f"{candidate} has {free / 1e9:.2f} GB free, of which it may use {share:.0%}")
    raise UserError(
        f"{what} {nbytes / 1e9:.2f} GB, but {' and '.join(tried)}; {remedy}"
        + ("" if "mmap" in candidates else ", or use --replay-storage mmap")
    )


def free_bytes(storage: Storage, device: torch.device, directory: str | Path | None) -> int:
    """Return what a storage has free."""
    if storage == "mmap" and directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free
    if storage == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:  # in a container psutil sees the host's memory, not the container's limit
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(n) for name, n in entries if name in ("active_file", "inactive_file"))
        return min(free, limit - used + cached)  # files in the cache make room when asked
    except (OSError, ValueError):
        return free


def allocate(
    name: str,
    rows: int,
    field: Field,
    storage: Storage,
    device: torch.device,
    directory: str | Path | None,
) -> Tensor:
    """Return zeros [rows, *field.shape] in a storage; RAM is touched lazily, files have their blocks at once."""
    shape = (rows, *field.shape)
    if storage == "device":
        return torch.zeros(shape, dtype=field.dtype, device=device)
    nbytes = rows * field.nbytes
    if storage == "mmap" and directory is not None:
        file = Path(directory) / f"{name}.bin"
        try:
            _reserve(file, nbytes)
            column: np.ndarray = np.memmap(file, np.uint8, "r+", shape=(nbytes,))
        finally:
            file.unlink()  # the mapping keeps it alive as long as the process, and no longer
    else:  # NumPy's zeros are touched lazily, torch's at once
        column = np.zeros(nbytes, np.uint8)
    return torch.from_numpy(column).view(field.dtype).view(shape)


def _reserve(file: Path, nbytes: int) -> None:
    """Make a file of zeros that owns its blocks.

    Storing into a mapped file without them, on a disk that became full, ends the process by SIGBUS, without a word.
    """
    with full_disk_named(file.parent), file.open("wb") as handle:
        handle.truncate(nbytes)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(handle.fileno(), 0, nbytes)
