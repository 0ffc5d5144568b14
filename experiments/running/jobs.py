"""Processes of a grid: some at a time, each with a log, all asked to save and leave when the grid is stopped."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

Job = TypeVar("Job")

STOPPED = 130
"""Exit code of a run that was stopped: it has saved, and the same command goes on."""


class _Processes:
    """Processes under way.

    A process starts and becomes known in one step, so that none escapes a stop; after it, none starts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], None] = {}
        self._stopping = False

    def start(self, command: Sequence[str], output: IO[str]) -> subprocess.Popen[bytes] | None:
        """Start one, or return None while all are being stopped."""
        with self._lock:
            if self._stopping:
                return None
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            self._running[process] = None
            return process

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """Take out one that has ended."""
        with self._lock:
            del self._running[process]

    def stop(self) -> None:
        """Ask all to save and leave, and let no other start."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def allow(self) -> None:
        """Let processes start again."""
        with self._lock:
            self._stopping = False


_processes = _Processes()


def run_jobs(jobs: Sequence[Job], run: Callable[[Job], int], workers: int) -> list[Job]:
    """Run jobs, in order, and return those whose exit code is not 0.

    Args:
        jobs: what `run` takes.
        run: does one of them and returns its exit code; it starts processes by `run_logged`.
        workers: jobs at a time.

    Raises:
        KeyboardInterrupt: after processes under way were asked to stop, and have.
    """
    pool = ThreadPoolExecutor(workers)
    try:  # an interrupt may come while jobs are still being handed in
        return [job for job, code in zip(jobs, pool.map(run, jobs), strict=True) if code]
    except KeyboardInterrupt:
        # First: who is done takes no other job.
        pool.shutdown(wait=False, cancel_futures=True)
        _processes.stop()
        raise
    finally:
        pool.shutdown()
        _processes.allow()  # all have ended


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a process whose output goes to the end of a file, and return its exit code.

    Where `run_jobs` is being stopped, the process is not started, and the code is `STOPPED`.
    """
    with log.open("a") as handle:
        process = _processes.start(command, handle)
    if process is None:
        return STOPPED
    try:
        return process.wait()
    finally:
        _processes.forget(process)
