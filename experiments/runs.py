"""Run folders: what they hold, how they are begun, found and read."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from agents.core.errors import UserError
from envs.rendering import gl_renderer
from experiments.hardware import cpu_name

SCHEMA = 1
"""Version of config.json's layout."""

_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "dm_control", "metaworld", "safetensors")


def default_run_dir(agent: str, env: str, seed: int, root: Path = Path("runs")) -> Path:
    """Return a clear, free folder name: runs/<task>/<agent>-seed<seed>, numbered when taken."""
    base = root / env.replace("/", "-") / f"{agent}-seed{seed}"
    folder, number = base, 2
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def begin_run(folder: Path, config: dict[str, Any]) -> None:
    """Create a run folder with config.json, command.txt and system.json.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"run folder '{folder}' exists; choose another --run-dir, or go on with --resume {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create run folder '{folder}': {error.strerror}") from error
    task = config["env"]
    draws = task["observation"] != "state" and not task["id"].startswith("toy/")
    write_json(folder / "system.json", describe_system(gl=draws))
    (folder / "command.txt").write_text(command_line() + "\n")
    write_json(folder / "config.json", config)


def abandon_run(folder: Path) -> None:
    """Remove the folder of a run that could not start, so that its name is free again."""
    shutil.rmtree(folder, ignore_errors=True)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically, into a folder that is made when it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w") as handle:
        json.dump(content, handle, indent=2)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def command_line() -> str:
    """Return the command as it can be typed again."""
    main = sys.modules["__main__"]
    module = getattr(getattr(main, "__spec__", None), "name", None)
    program = ["python", "-m", module] if module else ["python", Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


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
    home = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=home, capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
