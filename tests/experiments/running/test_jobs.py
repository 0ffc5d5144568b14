"""Processes of a grid: their exit codes, their logs, and what becomes of them when the grid is stopped."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from experiments.running.jobs import run_jobs, run_logged


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_output_goes_behind_what_a_log_holds_and_codes_say_what_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")

    def run(code: int) -> int:
        return run_logged(
            python(f"print('code {code}', flush=True); raise SystemExit({code})"), log
        )

    assert run_jobs([0, 3, 0, 1], run, 1) == [3, 1]
    assert log.read_text().split("\n") == ["before", "code 0", "code 3", "code 0", "code 1", ""]


def test_a_grid_that_is_stopped_asks_its_processes_to_save_and_begins_no_others(
    tmp_path: Path,
) -> None:
    """The first one waits for the signal and says that it came; nobody starts the second."""
    ready, log = tmp_path / "ready", tmp_path / "log"
    os.mkfifo(ready)
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "signal.pause()\n"
    )
    began: list[int] = []

    def run(job: int) -> int:
        began.append(job)
        return run_logged(python(code), log)

    def interrupt() -> None:
        ready.read_bytes()  # returns when the process has opened it
        os.kill(os.getpid(), signal.SIGINT)

    waiter = threading.Thread(target=interrupt)
    waiter.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([1, 2], run, 1)
    waiter.join()
    assert log.read_text().split() == ["saved"]
    assert began == [1]
