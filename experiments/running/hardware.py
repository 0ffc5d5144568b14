"""What a machine has to compute with. Nothing but the standard library, so that it can be told where all else fails."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def cpu_name() -> str:
    """Return the processor's name as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def usable_cores(limit: Path = _CPU_LIMIT) -> float:
    """Return how many cores this process may use: those that it may run on, or a container's share if that is less.

    Args:
        limit: the control group's file, `<microseconds> <period>` or `max <period>`.
    """
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = limit.read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no control group, or no limit in it
        return cores
