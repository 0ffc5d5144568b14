"""The parent's side of a vector environment's members: this process, or one worker each.

A member is sent a request and asked for the reply later, so that workers compute side by side.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from multiprocessing.util import Finalize
from typing import Any

import numpy as np

from envs.worker import Factory, Group, serve
from wrappers.errors import UserError

# One thread each: N workers with a pool of threads each get in each other's way.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def environment_of(workers: int) -> dict[str, str]:
    """Return the environment variables of each of so many workers, who share the cores.

    Software GL draws reference pictures 1.3 (dm_control) to 1.6 times (Meta-World) faster with a thread
    on each of two idle cores, so it gets a worker's share of them, unless its threads are already
    off (`resolve_quality`) or set by the user.
    """
    variables = dict(os.environ) | THREADS
    if workers > 1:  # one alone has all cores, GL's own default
        share = _cores() // workers
        variables.setdefault("LP_NUM_THREADS", str(share if share > 1 else 0))
    return variables


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerError(RuntimeError):
    """An environment in a worker raised, or a worker could not be replaced."""


class FailureError(Exception):
    """A worker died or hung; the text says how."""


class Memory:
    """Memory that worker processes map too; it has no name, so nothing is left when all are gone."""

    def __init__(self) -> None:
        self.handle = -1
        self.map: mmap.mmap | None = None

    def allocate(self, nbytes: int) -> None:
        """Take the memory; workers are sent its handle."""
        if hasattr(os, "memfd_create"):
            self.handle = os.memfd_create("observations")
        else:
            with tempfile.TemporaryFile() as file:
                self.handle = os.dup(file.fileno())
        os.ftruncate(self.handle, nbytes)
        self.map = mmap.mmap(self.handle, nbytes)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class Local:
    """The environments when there are no workers: requests are answered when the reply is read."""

    name = "this process"

    def __init__(self, factories: Sequence[Factory], number: int, envs: np.ndarray) -> None:
        self.number, self.envs = number, envs
        self.failures = 0  # since the last step that went well
        self._factories = factories
        self._group: Group | None = None
        self._request: tuple[str, tuple[Any, ...]] = ("", ())

    def start(self) -> None:
        """Build the environments; the reply describes them."""
        self._group = Group(self._factories)
        self.send("describe")

    def attach(self, memory: Memory, num_envs: int) -> None:
        """Ask for observations to be written into the memory."""
        self.send("attach", memory.map, 0, num_envs)

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for something."""
        self._request = command, arguments

    def receive(self, deadline: float) -> Any:
        """Do what was asked and return the reply."""
        command, arguments = self._request
        return getattr(self._group, command)(*arguments)

    def kill(self) -> None:
        """Let go of the environments."""
        self._group = None

    def close(self, deadline: float) -> None:
        """Close the environments."""
        if self._group is not None:
            self._group.close()
        self._group = None


class Worker:
    """A worker process, one of so many, and the pipe to it."""

    def __init__(
        self,
        factories: Sequence[Factory],
        number: int,
        envs: np.ndarray,
        *,
        workers: int,
        timeout: float,
    ) -> None:
        self.number, self.envs = number, envs
        self.failures = 0  # since the last step that went well
        self.name = f"worker {number} (environments {envs[0]} to {envs[-1]})"
        self._workers = workers
        self._timeout = timeout
        self._factories = pickle.dumps(list(factories))
        self._command = "build"
        self._process: Any = None
        self._connection: Any = None
        self._at_exit: Finalize | None = None
        self._is_stuck = False  # part of a request lies in the pipe, and nobody takes it

    def start(self) -> None:
        """Start the process and ask it to build its environments."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gymnasium", "numpy"])
        self._connection, theirs = context.Pipe()
        _limit_waits(self._connection, self._timeout)
        self._is_stuck = False
        process = context.Process(
            target=serve,
            args=(theirs, self._factories, environment_of(self._workers)),
            name=self.name,
            daemon=True,
        )
        # The fork server takes its environment from whoever starts it first.
        hidden = _hidden_script(hide=b"__main__" not in self._factories)
        with _environment(THREADS), hidden, _termination_held_back():
            process.start()
        self._process = process  # an interrupt before leaves none that could be waited for
        # At a script's end multiprocessing sends workers that it forgot the SIGTERM that they ignore, and waits.
        self._at_exit = Finalize(None, self._process.kill, exitpriority=0)
        theirs.close()
        self.send("build")

    def attach(self, memory: Memory, num_envs: int) -> None:
        """Ask for observations to be written into the memory."""
        assert memory.map is not None
        self.send("attach", len(memory.map), int(self.envs[0]), num_envs)
        with suppress(OSError):
            send_handle(self._connection, memory.handle, self._process.pid)

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for something."""
        self._command = command
        if self._connection is not None and not self._is_stuck:
            try:
                self._connection.send((command, arguments))
            except BlockingIOError:
                self._is_stuck = True
            except OSError:
                pass  # a dead worker is noticed when its reply is read

    def receive(self, deadline: float) -> Any:
        """Return the reply; raise `FailureError`, or what an environment raised."""
        if self._process is None:
            raise FailureError("failed while another one raised an error")
        if self._is_stuck:
            raise FailureError(f"did not take '{self._command}' within {self._timeout:g} s")
        left = max(deadline - time.monotonic(), 0)
        ready = wait([self._connection, self._process.sentinel], left)
        late = FailureError(f"did not answer '{self._command}' within {self._timeout:g} s")
        if not ready:
            raise late
        try:
            if self._connection not in ready and not self._connection.poll():
                raise EOFError
            error, result = self._connection.recv()
        except BlockingIOError:
            raise late from None
        except (EOFError, OSError):
            raise FailureError(f"{self._end()} during '{self._command}'") from None
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise WorkerError(f"{self.name} raised in '{self._command}':\n{result}") from error
        return result

    def _end(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """End the process by force."""
        if self._at_exit is not None:
            self._at_exit.cancel()
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
            if self._process.exitcode is not None:  # on a starved machine the news may come later
                self._process.close()
        if self._connection is not None:
            self._connection.close()  # a process that was not waited for ends by it
        self._process = self._connection = None

    def close(self, deadline: float) -> None:
        """Give the process until the deadline to end by itself."""
        if self._process is not None:
            self._process.join(max(deadline - time.monotonic(), 0))
        self.kill()


def _limit_waits(connection: Connection, timeout: float) -> None:
    """Let sending and receiving raise `BlockingIOError` where nothing moves for so long.

    States may be larger than the pipe, and a worker may stop in the middle of taking or sending one.
    """
    seconds, fraction = divmod(min(max(timeout, 1e-3), 1e6), 1)
    limit = struct.pack("ll", int(seconds), int(fraction * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as pipe:
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _termination_held_back() -> Iterator[None]:
    """Let what is started here live through a SIGTERM that is sent to all processes of a run.

    Containers, batch systems and `timeout` send it to a whole group. The learner saves and then ends its workers;
    without them, or the fork server that tells when they end, what it saves would lack their episodes.
    """
    resource_tracker.ensure_running()  # its start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _hidden_script(hide: bool) -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in the worker.

    It does so in order to unpickle what the script defines, and imports PyTorch with it.
    """
    script = sys.modules["__main__"]
    if hide:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
