"""What can go wrong with an agent or a run, said in one line."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: the commands print its one line and exit with code 2.

    The text says what was given, what was expected and what to do.
    """

    exit_code = 2

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str]) -> UserError:
        """Return the error for an unknown `name`, which offers the nearest `known` ones."""
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            hint = f"known: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
        return cls(f"unknown {kind} '{name}'; {hint}")


class NotFiniteError(ValueError):
    """A number that is to be stored is not finite; the text names its field and its environment."""


class DivergedError(RuntimeError):
    """A loss, weight, action, observation or reward is not finite, and training stops.

    The text names it; the commands print its one line and exit with code 1. The loop adds what is kept of the run.

    Args:
        what: is not finite, and where.
        remedy: what may help, in few words.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} ({remedy})" if remedy else what)
        self.what, self.remedy = what, remedy


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_named(place: Path) -> Iterator[None]:
    """Turn the error of a full disk into one line that names the place.

    Raises:
        UserError: the disk is full while the context lasts; every other error passes.
    """
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"the disk of '{place}' is full; free some space and try again (a run goes on from its "
            "last checkpoint with --resume)"
        ) from error
