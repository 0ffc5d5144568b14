"""What an evaluation has done so far, kept in `evaluations/<name>.partial` until the result is whole.

A killed evaluation loses the distraction under way; the same command goes on with the others. Distractions are
independent of each other (each has its own environments and seeds), so the numbers are those of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from agents import Policy
from agents.core.errors import UserError
from experiments.running.runs import LOCK, file_stem, lock_folder, write_json

MEDIA = ("{}.mp4", "{}_saliency.png")
"""Files beside a result, by the distraction's `file_stem`."""

ROWS = "rows.json"
"""The key, and the rows that are done."""


def weights_of(policy: Policy) -> str:
    """Return a checksum of every network, which tells a run from another one in the same folder."""
    checksum = hashlib.sha256()
    for name, network in sorted(policy.agent.networks().items()):
        for key, tensor in sorted(network.state_dict().items()):
            checksum.update(f"{name}.{key}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            checksum.update(flat.view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


@contextmanager
def unfinished(file: Path, key: Mapping[str, Any]) -> Iterator[Unfinished]:
    """Make an evaluation alone: two of one name would take each other's rows and films for their own.

    Args:
        file: the result that it becomes.
        key: everything that decides a row but the distraction; rows of another key are thrown away.

    Raises:
        UserError: another process is at it, or its folder cannot be written or holds what is not ours.
    """
    folder = file.with_name(f"{file.stem}.partial")
    give = "give another name, or --out"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"cannot write into '{folder}': {error.strerror}; {give}") from error
    if found and not found & {LOCK, ROWS}:
        raise UserError(f"'{folder}' holds something else than an evaluation's parts; {give}")
    busy = f"another process is writing '{file}'; wait until it ends, or {give}"
    with lock_folder(folder, busy=busy):
        try:
            yield Unfinished(file, folder, key)
        finally:
            if not (folder / ROWS).is_file():  # nothing to go on with
                shutil.rmtree(folder, ignore_errors=True)


class Unfinished:
    """Rows and media of an evaluation that is under way; see `unfinished`.

    Attributes:
        folder: where media are written.
    """

    def __init__(self, file: Path, folder: Path, key: Mapping[str, Any]) -> None:
        self.file, self.folder = file, folder
        self._key = json.loads(json.dumps(key))
        self._rows: dict[str, Any] = {}
        found: Any = None
        with suppress(OSError, ValueError):  # none, or one that another version wrote
            found = json.loads((folder / ROWS).read_text())
        if isinstance(found, dict) and found.get("key") == self._key:
            self._rows = found["rows"]
            return
        for path in folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def row(self, name: str, *, media: bool) -> dict[str, Any] | None:
        """Return a finished row; None where it, or the video that is asked for, is not there."""
        if media and not (self.folder / MEDIA[0].format(file_stem(name))).is_file():
            return None
        return self._rows.get(name)

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row whose media are written."""
        self._rows[name] = row
        write_json(self.folder / ROWS, {"key": self._key, "rows": self._rows})

    def publish(self, result: Mapping[str, Any]) -> None:
        """Write the result, with its media beside it; those of a result that it replaces go, other files stay."""
        beside = self.file.with_suffix("")
        with suppress(OSError, ValueError, KeyError, TypeError):  # none, or no result of ours
            for file in media_files(beside, json.loads(self.file.read_text())["results"]):
                file.unlink()
        for file in media_files(self.folder, result["results"]):
            beside.mkdir(exist_ok=True)
            file.replace(beside / file.name)
        write_json(self.file, result)
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # it is not there, or holds something
            beside.rmdir()


def media_files(folder: Path, distractions: Iterable[str]) -> list[Path]:
    """Return the media of some distractions that a folder holds."""
    stems = map(file_stem, distractions)
    files = (folder / name.format(stem) for stem in stems for name in MEDIA)
    return [file for file in files if file.is_file()]
