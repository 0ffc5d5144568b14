"""What the doctor looks at, a function each. They import what they need themselves: any of it may be broken."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments.running import pins
from experiments.running.hardware import cpu_name, usable_cores
from experiments.running.packages import PACKAGES, check_packages

Level = Literal["ok", "warning", "problem"]

TASKS = ("toy/reach", "dmc/cartpole-swingup")
"""Whose pictures are timed: one without a simulator, one with."""
APPEARANCES = ("clean", "video_hard")
"""How they are timed."""
SECONDS = 0.4
"""Of each timing."""

LITTLE_MEMORY = 1e9, 4e9
"""Bytes: below the first nothing trains, below the second large replays do not fit (a CPU preset takes 1.5 GB)."""
LITTLE_DISK = 1e9, 5e9
"""Bytes: below the first a checkpoint may fail, below the second a second run may."""

_GPU_DEVICE = Path("/dev/nvidiactl")
"""There where a driver of NVIDIA's is loaded and visible, in a container too."""

_INSTALL = "install with 'python -m pip install --constraint constraints.txt --editable .'"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        level: `problem` where something will fail, `warning` where something is worse than it could be.
        name: of the check.
        text: one line; unless all is well, it says what to do.
        details: the numbers behind it, as JSON can hold them.
    """

    level: Level
    name: str
    text: str
    details: dict[str, Any] = field(default_factory=dict)


def examine(*, quick: bool = False) -> Iterator[Finding]:
    """Yield every finding as it is made.

    Args:
        quick: leave out what draws: it takes some seconds.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "packages": packages,
        "python": python,
        "versions": versions,
        "pins": constraints,
        "gl": gl,
        "cpu": cpu,
        "gpu": gpu,
        "memory": memory,
        "disk": disk,
    }
    if not quick:
        checks |= {f"frames {task}": partial(frames, task) for task in TASKS}
    for name, check in checks.items():
        yield _guarded(name, check)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Return a check's finding; what it raises is one too."""
    try:
        return check()
    except ImportError as error:
        return Finding("problem", name, f"cannot import it: {_one_line(error)}; {_INSTALL}")
    except Exception as error:
        if hasattr(error, "exit_code"):  # a user's error says what to do
            return Finding("problem", name, _one_line(error))
        text = f"failed with {type(error).__name__}: {_one_line(error)}; report it with this output"
        return Finding("problem", name, text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def packages() -> Finding:
    """Tell where the four packages come from; the same check has stopped every command before it began."""
    check_packages()
    names = f"{', '.join(PACKAGES[:-1])} and {PACKAGES[-1]}"
    return Finding("ok", "packages", f"{names} come from {pins.HOME}", {"home": str(pins.HOME)})


def python() -> Finding:
    """Tell Python's version and the system."""
    version, system = platform.python_version(), platform.platform()
    details = {"version": version, "system": system, "executable": sys.executable}
    return Finding("ok", "python", f"{version} on {system}", details)


def versions() -> Finding:
    """Tell the versions of what Sightline needs, and what of it is missing or does not work."""
    have, needs = pins.installed(), pins.required()
    details = {name: have.get(name) for name in needs}
    lacking = pins.unmet(needs, have)
    if lacking:
        return Finding("problem", "versions", f"{'; '.join(lacking)}; {_INSTALL}", details)
    return Finding("ok", "versions", ", ".join(f"{name} {have[name]}" for name in needs), details)


def constraints() -> Finding:
    """Tell which packages differ from the set that the tests passed with."""
    pinned = pins.pinned()
    if pinned is None:
        text = "not compared: constraints.txt lies in a checkout and is not shipped with a package"
        return Finding("ok", "pins", text)
    have = pins.installed()
    different = pins.differing(pinned, have)
    details = {name: {"installed": own, "pinned": pin} for name, (own, pin) in different.items()}
    if different:
        listed = ", ".join(f"{name} {own} ({pin})" for name, (own, pin) in different.items())
        text = (
            f"{len(different)} of {len(pinned)} differ from constraints.txt: {listed}; {_INSTALL}"
        )
        return Finding("warning", "pins", text, details)
    present = sum(name in have for name in pinned)
    text = f"{present} packages as constraints.txt has them, {len(pinned) - present} others absent"
    return Finding("ok", "pins", text, details)


def gl() -> Finding:
    """Tell what draws the pictures."""
    from envs.rendering import choose_backend, gl_renderer, resolve_quality

    renderer, backend = gl_renderer(), choose_backend()
    software = resolve_quality("auto") == "fast"
    details = {"backend": backend, "renderer": renderer, "software": software}
    text = f"{backend}: {renderer}, {'in software' if software else 'on a GPU'}"
    if software and _GPU_DEVICE.exists():
        advice = (
            "install the driver's EGL library, in a container NVIDIA_DRIVER_CAPABILITIES=graphics"
        )
        return Finding("warning", "gl", f"{text} although a GPU is here; {advice}", details)
    return Finding("ok", "gl", text, details)


def cpu() -> Finding:
    """Tell the processor and how much of it this process may use."""
    name, cores = cpu_name(), usable_cores()
    details = {"model": name, "usable_cores": cores}
    return Finding("ok", "cpu", f"{name}, {cores:g} of {os.cpu_count()} cores usable", details)


def gpu() -> Finding:
    """Tell which GPU PyTorch can use."""
    import torch

    build = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        text = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, CUDA {torch.version.cuda}"
        return Finding("ok", "gpu", text, {**build, "name": name, "free_bytes": free})
    if _GPU_DEVICE.exists():
        reason = "is built without CUDA" if torch.version.cuda is None else "cannot use it"
        text = (
            f"a GPU is here, but torch {torch.__version__} {reason}; "
            "install a build for its driver, which nvidia-smi names"
        )
        return Finding("warning", "gpu", text, build)
    return Finding("ok", "gpu", "none; agents learn on the CPU", build)


def memory() -> Finding:
    """Tell how much memory is free, within a container's limit."""
    import torch

    from agents.core.fields import free_bytes

    free = free_bytes("ram", torch.device("cpu"), None)
    text = f"{free / 1e9:.1f} GB free"
    return _enough("memory", free, LITTLE_MEMORY, text, "end other programs, or raise the limit")


def disk() -> Finding:
    """Tell how much room the current folder's disk has, where runs are kept by default."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        text = f"cannot write in {folder}; start elsewhere, or give commands a --run-dir"
        return Finding("warning", "disk", text, {"folder": str(folder), "free_bytes": free})
    text = f"{free / 1e9:.1f} GB free in {folder}"
    return _enough("disk", free, LITTLE_DISK, text, "remove old runs, or use another disk")


def _enough(name: str, free: int, limits: tuple[float, float], text: str, advice: str) -> Finding:
    level: Level = "problem" if free < limits[0] else "warning" if free < limits[1] else "ok"
    words = text if level == "ok" else f"{text}, which is little; {advice}"
    return Finding(level, name, words, {"free_bytes": free})


def frames(task: str) -> Finding:
    """Time agent steps with their pictures, clean and distracted; the settings are the environments' defaults."""
    from envs.settings import Settings

    settings = Settings(task).resolved()
    rates = {appearance: frame_rate(task, appearance, SECONDS) for appearance in APPEARANCES}
    listed = ", ".join(f"{rate:,.0f} {appearance}" for appearance, rate in rates.items())
    text = f"frames/s at {settings.size} x {settings.size}, {settings.quality}: {listed}"
    return Finding("ok", f"frames {task}", text, {**rates, "quality": settings.quality})


def frame_rate(task: str, distraction: str, seconds: float) -> float:
    """Return how many agent steps with a picture, by the environments' defaults, one process takes in a second."""
    import envs

    with closing(envs.make(task, distraction=distraction, seed=0)) as env:
        env.action_space.seed(0)
        env.reset()
        env.step(env.action_space.sample())
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
            count += 1
        return count / (time.perf_counter() - start)
