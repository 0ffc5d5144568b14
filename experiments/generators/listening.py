"""What the other processes of a run have in place of files: they read checkpoints, and write nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.core.checkpoints import CheckpointStore
from agents.core.logging import Logger, Progress
from agents.core.replay import Replay


class ReadCheckpoints(CheckpointStore):
    """The checkpoints of a run that another process writes."""

    def save(self, step: int, parts: Mapping[str, Any], replay: Replay | None = None) -> Path:
        """Return where the first process saves this."""
        return self.folder / f"step-{step:09d}"

    def save_best(self, step: int, parts: Mapping[str, Any]) -> Path:
        """Return where the first process saves this."""
        return self.folder / "best"


class NoLogger(Logger):
    """Takes what the first process writes, and forgets it."""

    def __init__(self) -> None:
        """Open nothing."""

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None:
        """Forget scalars."""

    def images(self, pictures: Mapping[str, np.ndarray], progress: Progress) -> None:
        """Forget pictures."""

    def video(self, tag: str, frames: np.ndarray, progress: Progress, fps: int = 25) -> None:
        """Forget a video."""

    def text(self, tag: str, text: str) -> None:
        """Forget a text."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
