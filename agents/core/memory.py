"""Memory that does not suffice, said in one line that names what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from agents.core.errors import UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed; on the CPU torch says so by a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def memory_errors_named(advice: str) -> Iterator[None]:
    """Turn the error of an allocation that failed into one line; every other error passes.

    Args:
        advice: what to do, such as "lower --batch-size".

    Raises:
        UserError: memory did not suffice while the context lasted.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}") from error
