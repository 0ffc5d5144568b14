"""The processes that torchrun started, as `ranks`: NCCL between GPUs, gloo between CPUs and for small things.

A process that is gone without a word is noticed by its closed connection, one that hangs after `PATIENCE`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from agents.core.errors import UserError
from agents.core.ranks import LostRankError, Ranks

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: longer than one of them evaluates alone."""


class ProcessRanks(Ranks):
    """One of several processes; see the module.

    Raises:
        UserError: the others cannot be reached.
    """

    def __init__(self) -> None:
        super().__init__()
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot join the other processes ({_first_line(error)}); start all of them with torchrun "
                "--nproc-per-node N -m ..."
            ) from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def device(self, name: str) -> str:
        """Return the GPU of this process's number on its machine; see `Ranks.device`.

        Raises:
            UserError: one GPU is named for all, or there are fewer than processes.
        """
        if not name.startswith("cuda"):
            return name
        if ":" in name:
            raise UserError(
                f"device is {name} for {self.size} processes; give cuda: each takes its own"
            )
        place, count = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if place >= count:
            raise UserError(
                f"{count} GPUs are too few for the processes; give --nproc-per-node {count}"
            )
        torch.cuda.set_device(place)
        return f"cuda:{place}"

    def _gather(self, own: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with _lost_ranks_named():
            dist.all_gather(rows, own)
        return rows

    def _add(self, own: Tensor) -> None:
        with _lost_ranks_named():
            dist.all_reduce(own)

    def leave_last(self) -> None:
        """Let the first rank save and speak: torchrun kills the others as soon as one has ended with an error."""
        with suppress(Exception):
            self._gather(torch.zeros(2, dtype=torch.int64))
        if not self.is_first:
            time.sleep(1)


@contextmanager
def _lost_ranks_named() -> Iterator[None]:
    """Say in one line that an exchange has failed."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            "another process of this run has ended or does not answer; what has been saved is kept "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Lend the processes that torchrun started beside this one; without it, this one alone.

    Only the first rank prints: an error that has an exit code ends others silently, with that code, for the first one
    has it too (see `Ranks.one_fate`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    ranks = ProcessRanks()
    try:
        with ExitStack() as stack:
            if not ranks.is_first:
                nothing = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nothing))
                stack.enter_context(redirect_stderr(nothing))
            yield ranks
    except Exception as error:
        if not isinstance(error, LostRankError):
            ranks.leave_last()
        code = getattr(error, "exit_code", None)
        if ranks.is_first or code is None:
            raise
        raise SystemExit(code) from None
    finally:
        with suppress(Exception):
            dist.destroy_process_group()
