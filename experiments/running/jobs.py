"""Processes of a grid: some at a time, each with a log, all asked to save and leave when the grid is stopped."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")

STOPPED = 130
"""Exit code of a run that was stopped: it has saved, and the same command goes on."""

_running: dict[subprocess.Popen[bytes], None] = {}
"""Processes under way."""


def run_jobs(jobs: Sequence[Job], run: Callable[[Job], int], workers: int) -> list[Job]:
    """Run jobs, in order, and return those whose exit code is not 0.

    Args:
        jobs: what `run` takes.
        run: does one of them and returns its exit code; it starts processes by `run_logged`.
        workers: jobs at a time.

    Raises:
        KeyboardInterrupt: after processes under way were asked to stop, and have.
    """
    with ThreadPoolExecutor(workers) as pool:
        codes = pool.map(run, jobs)
        try:
            return [job for job, code in zip(jobs, codes, strict=True) if code]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # first: who is done takes no other job
            for process in list(_running):
                process.terminate()  # it saves and leaves
            raise


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a process whose output goes to the end of a file, and return its exit code."""
    with log.open("a") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT)
    _running[process] = None
    try:
        return process.wait()
    finally:
        del _running[process]
