"""Which background videos an evaluation or a film plays: `--videos`, the same in every command that plays a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

PROCEDURAL = "procedural"
"""What stands for no folder of videos."""


def add_videos_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--videos`; see `videos_of`."""
    parser.add_argument(
        "--videos", metavar="DIR",
        help=f"folder of videos or image folders, or {PROCEDURAL} for generated ones [the run's own]",
    )  # fmt: skip


def videos_of(given: str | None, task: Mapping[str, Any]) -> str | None:
    """Return the folder of the videos to play, None for generated ones.

    Args:
        given: the flag's value.
        task: settings of the run's task.
    """
    if given is None:
        return task["videos"]
    return None if given == PROCEDURAL else given
