"""Processes of a grid: their exit codes, their logs, and what becomes of them when the grid is stopped."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.running import jobs as jobs_module
from experiments.running.jobs import STOPPED, run_jobs, run_logged


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """SIGINT interrupts, also where tests run side by side: there it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def saver(ready: Path) -> list[str]:
    """A process that says when it is ready, and whether it was asked to save within some seconds."""
    return python(
        "import signal, sys\n"
        "signal.alarm(20)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "signal.pause()\n"
    )


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
    began: list[int] = []

    def run(job: int) -> int:
        began.append(job)
        return run_logged(saver(ready), log)

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


def test_a_process_that_starts_while_a_grid_is_stopped_is_asked_to_save_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes when the process is there, and those who stop the grid may not know it yet."""
    ready, log, stopping = tmp_path / "ready", tmp_path / "log", threading.Event()
    os.mkfifo(ready)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            stopping.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    class SlowToTell(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            ready.read_bytes()
            os.kill(os.getpid(), signal.SIGINT)
            stopping.wait()
            threading.Event().wait(
                0.2
            )  # those who stop the grid are done by now, unless a lock holds them back

    monkeypatch.setattr(jobs_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(subprocess, "Popen", SlowToTell)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([1], lambda job: run_logged(saver(ready), log), 1)
    assert log.read_text().split() == ["saved"]


def test_no_process_starts_when_a_grid_is_being_stopped_but_in_the_next_one(tmp_path: Path) -> None:
    ready, log, ended = tmp_path / "ready", tmp_path / "log", threading.Event()
    os.mkfifo(ready)
    codes: list[int] = []

    def run(job: int) -> int:
        if job == 0:
            try:
                return run_logged(saver(ready), log)
            finally:
                ended.set()
        ready.read_bytes()
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait()
        codes.append(run_logged(python("print('began', flush=True)"), log))
        return codes[0]

    with pytest.raises(KeyboardInterrupt):
        run_jobs([0, 1], run, 2)
    assert codes == [STOPPED]
    assert log.read_text().split() == ["saved"]
    assert run_jobs([2], lambda job: run_logged(python("print('began')"), log), 1) == []
    assert log.read_text().split() == ["saved", "began"]
