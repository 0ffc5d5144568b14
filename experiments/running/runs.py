"""Run folders: what they hold, how they are begun, found and read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from agents.core.errors import UserError, full_disk_named
from envs.rendering import gl_renderer
from experiments.running.hardware import cpu_name

LOCK = ".lock"
"""File of a run folder that a training process holds locked."""

BEGINNINGS = {"system.json", "command.txt", "system.json.tmp", "config.json.tmp"}
"""What a process that is killed while it begins a run leaves behind."""

LONGEST_STEM = 100
"""Characters: file systems take 255 bytes, of which suffixes and temporary names need some."""

_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "dm_control", "metaworld", "safetensors")


def file_stem(distraction: str) -> str:
    """Return what files of a distraction are called: its name; one too long for a file is cut and told by a digest."""
    if len(distraction) <= LONGEST_STEM:
        return distraction
    digest = hashlib.sha256(distraction.encode()).hexdigest()[:12]
    return f"{distraction[: LONGEST_STEM - len(digest) - 1]}-{digest}"


def check_label(label: str) -> str:
    """Return a method's name that can be a folder's, or raise a UserError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w+.-]*", label):
        raise UserError(f"a method cannot be called '{label}'; use letters, digits, -, +, . and _")
    return label


def default_run_dir(agent: str, env: str, seed: int, root: Path = Path("runs")) -> Path:
    """Return a clear, free folder name: runs/<task>/<agent>-seed<seed>, numbered when taken."""
    base = root / env.replace("/", "-") / f"{agent}-seed{seed}"
    folder, number = base, 2
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def make_run_dir(folder: Path) -> bool:
    """Create a folder for a new run, and tell whether there was none.

    Raises:
        UserError: the folder exists and is not empty, or cannot be created.
    """
    check_free(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create run folder '{folder}': {error.strerror}") from error
    return is_new


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something else than the first files of a run that never began.

    Raises:
        UserError: says so.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or {file.name for file in folder.iterdir()} - BEGINNINGS - {LOCK}:
        raise UserError(
            f"run folder '{folder}' exists; choose another --run-dir, or go on with --resume {folder}"
        )


@contextmanager
def lock_folder(folder: Path, *, busy: str, what: str = "folder") -> Iterator[None]:
    """Be the only process that writes in a folder; others may read it.

    The kernel holds the lock, and lets go of it however the process ends: a kill leaves nothing that would have to be
    removed by hand. The file stays.

    Args:
        folder: it exists.
        busy: what to say where another process holds the lock.
        what: the folder is.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write into {what} '{folder}': {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:  # some network file systems know no locks; writing there is no mistake
            pass
        yield


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a run folder; see `lock_folder`.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    busy = f"run folder '{folder}' is in use: another process trains in it; stop that one, or wait until it ends"
    with lock_folder(folder, busy=busy, what="run folder"):
        yield


def begin_run(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, command.txt and system.json into a locked run folder.

    Raises:
        UserError: another run was begun in it meanwhile.
    """
    check_free(folder)
    task = config.get("env")  # image generators have none
    draws = task is not None and uses_gl(task)
    write_json(folder / "system.json", describe_system(gl=draws))
    (folder / "command.txt").write_text(command_line() + "\n")
    write_json(folder / "config.json", config)


def uses_gl(task: Mapping[str, Any]) -> bool:
    """Whether pictures of a task, by its settings, are drawn with GL."""
    return task["observation"] != "state" and not task["id"].startswith("toy/")


def abandon_run(folder: Path, *, is_new: bool) -> None:
    """Remove what a run that could not start has written, so that its name is free again.

    Args:
        folder: of the run.
        is_new: whether the run made it; one that a person made stays, empty as it was.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if is_new:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically, into a folder that is made when it is missing."""
    temporary = file.with_name(file.name + ".tmp")
    with full_disk_named(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, content)
        temporary.replace(file)


def _write_synced(file: Path, content: Any) -> None:
    with file.open("w") as handle:
        json.dump(content, handle, indent=2)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())


def command_line() -> str:
    """Return the command as it can be typed again."""
    main = sys.modules["__main__"]
    module = getattr(getattr(main, "__spec__", None), "name", None)
    program = ["-m", module] if module else [Path(sys.argv[0]).name]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun
    start = ["python"] if processes == "1" else ["torchrun", "--nproc-per-node", processes]
    return shlex.join([*start, *program, *sys.argv[1:]])


def describe_system(*, gl: bool = False) -> dict[str, Any]:
    """Return commit, versions and hardware, for system.json; with `gl`, who draws the pictures."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpu": gpu,
        },
        "threads": torch.get_num_threads(),
        "gl_backend": os.environ.get("MUJOCO_GL") if gl else None,
        "gl_renderer": gl_renderer() if gl else None,
    }


def git_commit() -> str | None:
    """Return the source's commit, marked `-dirty` when files differ from it; None outside git."""
    home = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=home, capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
