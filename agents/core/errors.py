"""What a user can get wrong about an agent or a run, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
