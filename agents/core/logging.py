"""TensorBoard and one CSV; both go on without a gap or a double line after a resume."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from agents.core.errors import full_disk_named

COLUMNS = ("agent_steps", "env_frames", "gradient_updates", "wall_seconds", "tag", "value")


@dataclass
class Progress:
    """How far a run is; written beside every number, so that "500k" is never ambiguous.

    Attributes:
        agent_steps: decisions taken, over all environments.
        env_frames: control steps of the simulator: agent steps times action repeat, less what ends of episodes cut off.
        gradient_updates: calls of `agent.update`.
        wall_seconds: time spent, earlier sessions included.
    """

    agent_steps: int = 0
    env_frames: int = 0
    gradient_updates: int = 0
    wall_seconds: float = 0.0


class Logger:
    """Writes scalars to `metrics.csv` and TensorBoard, pictures and videos to TensorBoard.

    Args:
        folder: the run folder.
        resume_from: drop what was logged after this many agent steps (the run was killed and goes on from there).

    Raises:
        UserError: here and in every method, when the disk is full.
    """

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        self.file = folder / "metrics.csv"
        with full_disk_named(folder):
            if resume_from is not None and self.file.exists():
                _truncate(self.file, resume_from)
            self._handle = self.file.open("a", newline="")
            self._csv = csv.writer(self._handle)
            if not self._handle.tell():  # new, or of a run that was killed before its first line
                self._csv.writerow(COLUMNS)
            purge = None if resume_from is None else resume_from + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None:
        """Write scalars by tag."""
        counters = (progress.agent_steps, progress.env_frames, progress.gradient_updates)
        wall = f"{progress.wall_seconds:.2f}"
        with full_disk_named(self.file):
            for tag, value in values.items():
                self._csv.writerow([*counters, wall, tag, f"{value:.8g}"])
                self._board.add_scalar(tag, value, progress.agent_steps)

    def images(self, pictures: Mapping[str, np.ndarray], progress: Progress) -> None:
        """Write pictures, uint8 [H, W, 3] by tag."""
        with full_disk_named(self.file):
            for tag, picture in pictures.items():
                self._board.add_image(tag, picture, progress.agent_steps, dataformats="HWC")

    def video(self, tag: str, frames: np.ndarray, progress: Progress, fps: int = 25) -> None:
        """Write a video, uint8 [T, H, W, 3], as an animated image."""
        summary = _gif_summary(tag, frames, fps)
        assert self._board.file_writer is not None
        with full_disk_named(self.file):
            self._board.file_writer.add_summary(summary, progress.agent_steps, time.time())

    def text(self, tag: str, text: str) -> None:
        """Write markdown to TensorBoard."""
        with full_disk_named(self.file):
            self._board.add_text(tag, text)

    def flush(self) -> None:
        """Bring everything to disk."""
        with full_disk_named(self.file):
            self._handle.flush()
            self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        with full_disk_named(self.file):
            try:
                self._handle.close()
            finally:
                self._board.close()


def _truncate(file: Path, agent_steps: int) -> None:
    """Drop rows after `agent_steps`, and a last line that a kill cut short; replaced atomically."""
    with file.open(newline="") as handle:
        rows = [row for row in csv.reader(handle) if len(row) == len(COLUMNS)]
    kept = rows[:1] + [row for row in rows[1:] if int(row[0]) <= agent_steps]
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="") as handle:
        csv.writer(handle).writerows(kept)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def _gif_summary(tag: str, frames: np.ndarray, fps: int) -> object:
    """Encode frames as a GIF in a TensorBoard summary.

    `SummaryWriter.add_video` needs moviepy, prints a warning and skips the video where it is absent.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0
    )
    image = Summary.Image(
        height=frames.shape[1],
        width=frames.shape[2],
        colorspace=3,
        encoded_image_string=buffer.getvalue(),
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])
