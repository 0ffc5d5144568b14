"""Checkpoints of a run: whole or not there at all, and the replay kept once for all of them.

    run/checkpoints/step-000001000/   manifest.json, and two files for each part (see `trees`)
    run/checkpoints/best/             the same, weights only
    run/replay/segment-*.safetensors  rows of the replay, shared by the checkpoints

A checkpoint is written into a hidden sibling folder, every file is flushed to the disk, and one
rename makes it visible: a process that dies at any point leaves those before it as they were.

The replay grows by what was added since the last checkpoint: each one writes only new rows, as
segments, and lists all the segments that it needs. Rows that `Replay.write` changed after their
segment was written, the newest row of each environment and the generator travel in the checkpoint.
Segments that no checkpoint lists any more go after the new checkpoint is in place.

The manifest names whose checkpoint it is (agent, task, observation), and another's is refused:
names and shapes of tensors alone would let the weights of `sac` into `drq`. Checkpoints from before
the manifest did so are taken for what the run's config says they are.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from agents.core.errors import UserError, is_full_disk
from agents.core.replay import Replay
from agents.core.trees import (
    SCHEMA,
    DamagedFileError,
    load_tensors,
    load_tree,
    read_file,
    read_json,
    save_tree,
    write_file,
)

__all__ = ["CheckpointStore", "DamagedFileError", "load_tree", "save_tree"]

SEGMENT_BYTES = 256_000_000
"""A segment's size at most: it is built in memory, whose peak a checkpoint must not raise."""

_STEP = re.compile(r"step-(\d+)")
_WRITING, _REPLACED = ".writing-", ".replaced-"  # prefixes of folders that are not checkpoints


class CheckpointStore:
    """The checkpoints of one run folder.

    Args:
        run_dir: the run's folder; it is made by the first save.
        keep: how many checkpoints to keep, besides the best.
        identity: what the checkpoints are of, such as {"agent": "drq", "env": "toy/reach"}: written
            into every one, and those of another identity are not loaded.
    """

    def __init__(
        self, run_dir: str | Path, keep: int = 2, *, identity: Mapping[str, str] | None = None
    ) -> None:
        if keep < 1:
            raise UserError(f"cannot keep {keep} checkpoints; keep at least 1")
        self.keep = keep
        self.identity = dict(identity or {})
        self.folder = Path(run_dir) / "checkpoints"
        self.replay_folder = Path(run_dir) / "replay"
        self._damaged: set[int] = set()  # steps
        # What the segments on disk hold, of which replay: rows below `_closed` of each environment.
        self._replay: Replay | None = None
        self._closed = np.zeros(0, np.int64)
        self._segments: list[dict[str, Any]] = []

    # -------------------------------------------------------------------------------- saving

    def save(self, step: int, parts: Mapping[str, Any], replay: Replay | None = None) -> Path:
        """Write a checkpoint and delete what it makes superfluous.

        Args:
            step: the run's step (agent steps); a checkpoint of the same step is replaced, later
                ones belong to an abandoned future and are deleted.
            parts: name of a part -> tree of tensors and plain values (see `save_tree`).
            replay: written incrementally, so always give the same one.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: when the disk is full; the checkpoints before are as they were.
        """
        name = f"step-{step:09d}"
        added: list[Path] = []
        closed, segments = np.zeros(0, np.int64), []
        with self._written(name, step, parts, added) as (folder, manifest):
            if replay is not None:
                if replay is not self._replay:
                    self._closed, self._segments = np.zeros_like(replay.closed), []
                state = {"state": replay.get_state(), "changed": self._changed_rows(replay)}
                save_tree(folder, "replay", state)
                closed = replay.closed
                segments = self._needed_segments(replay)
                new_ids = replay.closed_ids(self._closed)
                segments += self._write_segments(step, replay, new_ids, added)
                manifest["segments"] = segments
        if replay is not None:
            replay.forget_written(new_ids)
            self._replay, self._closed, self._segments = replay, closed, segments
        self._damaged.discard(step)  # it was replaced by a whole one
        self._prune(step)
        return self.folder / name

    def save_best(self, step: int, parts: Mapping[str, Any]) -> Path:
        """Write or replace the best checkpoint: weights only, never a replay."""
        with self._written("best", step, parts, []):
            pass
        return self.folder / "best"

    @contextmanager
    def _written(
        self, name: str, step: int, parts: Mapping[str, Any], added: list[Path]
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Write a folder that appears as `name` at the end, or not at all (nor `added` files)."""
        folder = self.folder / f"{_WRITING}{name}"
        try:
            self._sweep()
            folder.mkdir(parents=True)
            for part, tree in parts.items():
                if not part.isidentifier() or part in ("replay", "manifest"):
                    raise ValueError(f"'{part}' cannot name a part of a checkpoint")
                save_tree(folder, part, tree)
            manifest = {
                "schema": SCHEMA,
                "step": step,
                "identity": self.identity,
                "parts": list(parts),
            }
            yield folder, manifest
            # JSON files hold their tensors' checksums; the manifest holds theirs.
            stamps = {file.name: _stamp(file.read_bytes()) for file in folder.glob("*.json")}
            data = json.dumps(manifest | {"files": stamps}, indent=1).encode()
            write_file(folder / "manifest.json", data)
            _sync_folder(folder)
            self._publish(folder, self.folder / name)
        except BaseException as error:
            if folder.exists():  # else it was published, and owns what was added
                shutil.rmtree(folder, ignore_errors=True)
                for file in added:
                    file.unlink(missing_ok=True)
            if is_full_disk(error):
                before = self.latest()
                raise UserError(
                    f"the disk of '{self.folder}' is full: {name} was not written, the one before "
                    f"({before.name if before else 'none'}) is as it was; free some space"
                ) from error
            raise

    def _publish(self, folder: Path, final: Path) -> None:
        replaced = self.folder / f"{_REPLACED}{final.name}"
        if final.exists():  # folders cannot be exchanged in one go; readers know both names
            os.replace(final, replaced)
        os.replace(folder, final)
        _sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _sweep(self) -> None:
        """Finish or remove what a killed process left."""
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            final = self.folder / replaced.name.removeprefix(_REPLACED)
            if final.exists():
                shutil.rmtree(replaced)
            else:
                os.replace(replaced, final)
        for unfinished in self.folder.glob(f"{_WRITING}*"):
            shutil.rmtree(unfinished)

    def _prune(self, step: int) -> None:
        """Delete old, damaged and abandoned checkpoints, then segments that none lists."""
        good: dict[Path, set[str]] = {}
        for folder in self._folders():
            if _step_of(folder) <= step and _step_of(folder) not in self._damaged:
                with suppress(DamagedFileError):
                    segments = read_json(folder / "manifest.json").get("segments", [])
                    good[folder] = {segment["file"] for segment in segments}
        kept = list(good)[-self.keep :]
        for folder in self._folders():
            if folder not in kept:
                condemned = self.folder / f"{_WRITING}{folder.name}"
                os.replace(folder, condemned)  # no half-deleted folder looks like a checkpoint
                shutil.rmtree(condemned)
        needed = set().union(*(good[folder] for folder in kept))
        for file in self.replay_folder.glob("segment-*"):
            if file.name not in needed:
                file.unlink()

    # -------------------------------------------------------------------------------- loading

    def latest(self) -> Path | None:
        """Return the newest checkpoint's folder, or None."""
        return next(reversed(self._folders()), None)

    def load(
        self, which: int | str | Path | None = None, *, replay: Replay | None = None
    ) -> dict[str, Any]:
        """Return a checkpoint's parts, and fill `replay` from it.

        Args:
            which: a step, a folder's name (`"best"`), a folder, or None: the newest that is whole;
                a warning says so when that is not the newest.
            replay: restored too, bit for bit, with its counters and generator.

        Raises:
            DamagedFileError: when no whole checkpoint was found.
            UserError: when there is none, it is another agent's, or the replay is of other settings.
        """
        if which is not None:
            return self._load(self._find(which), replay)
        folders = self._folders()
        if not folders:
            raise UserError(f"'{self.folder}' holds no checkpoint; start the run anew")
        for folder, before in zip(folders[::-1], [*folders[-2::-1], None], strict=True):
            try:
                return self._load(folder, replay)
            except DamagedFileError as error:
                self._damaged.add(_step_of(folder))
                if before is None:
                    raise
                warnings.warn(f"{error}; falling back to {before.name}", stacklevel=2)
        raise AssertionError("the loop returns or raises")

    def restore_replay(self, replay: Replay, which: int | str | Path | None = None) -> None:
        """Fill `replay` from a checkpoint (the newest by default), bit for bit.

        Prefer `load(replay=...)`, which falls back to an older checkpoint as a whole.
        """
        folder = self.latest() if which is None else self._find(which)
        if folder is None:
            raise UserError(f"'{self.folder}' holds no checkpoint; start the run anew")
        self._restore_replay(replay, folder, self._manifest(folder))

    def _load(self, folder: Path, replay: Replay | None) -> dict[str, Any]:
        manifest = self._manifest(folder)
        parts = {part: load_tree(folder, part) for part in manifest["parts"]}
        if replay is not None:
            self._restore_replay(replay, folder, manifest)
        return parts

    def _manifest(self, folder: Path) -> dict[str, Any]:
        manifest = read_json(folder / "manifest.json")
        for name, stamp in manifest["files"].items():
            read_file(folder / name, **stamp)
        self._check_identity(folder, manifest.get("identity", {}))
        return manifest

    def _check_identity(self, folder: Path, saved: Mapping[str, str]) -> None:
        """Refuse a checkpoint of something else; what only one side names is not compared."""
        names = [name for name in self.identity if name in saved]
        if different := [name for name in names if saved[name] != self.identity[name]]:
            theirs = ", ".join(f"{name} '{saved[name]}'" for name in different)
            ours = ", ".join(f"{name} '{self.identity[name]}'" for name in different)
            raise UserError(
                f"checkpoint '{folder}' was saved with {theirs}, and this run is of {ours}; give a "
                "checkpoint of this run, or put back the config.json that it was trained with"
            )

    def _find(self, which: int | str | Path) -> Path:
        if isinstance(which, int):
            folder = next((f for f in self._folders() if _step_of(f) == which), None)
        else:
            path = self.folder / which if isinstance(which, str) else which
            replaced = path.with_name(f"{_REPLACED}{path.name}")
            folder = next((f for f in (path, replaced) if f.is_dir()), None)
        if folder is None:
            known = [f.name for f in self._folders()]
            raise UserError(f"'{self.folder}' has no checkpoint {which}; it has {known}")
        return folder

    def _folders(self) -> list[Path]:
        """Return the folders of all checkpoints but the best, oldest first."""
        found = {f.name.removeprefix(_REPLACED): f for f in self.folder.glob(f"{_REPLACED}step-*")}
        found |= {f.name: f for f in self.folder.glob("step-*") if _STEP.fullmatch(f.name)}
        return sorted(found.values(), key=_step_of)

    # --------------------------------------------------------------------------------- replay

    def _changed_rows(self, replay: Replay) -> dict[str, Any]:
        """Return what `Replay.write` changed in rows that are in segments already."""
        changed = {}
        for field in replay.written_fields:
            ids = replay.written_ids(field)
            ids = ids[ids // replay.num_envs < self._closed[ids % replay.num_envs]]
            changed[field] = {"ids": ids, "values": replay.read(ids, field).cpu()}
        return changed

    def _needed_segments(self, replay: Replay) -> list[dict[str, Any]]:
        """Return the segments that hold rows which are not overwritten yet."""
        return [
            segment
            for segment in self._segments
            if replay.alive(np.asarray(segment["last_ids"], np.int64)).any()
        ]

    def _write_segments(
        self, step: int, replay: Replay, ids: np.ndarray, added: list[Path]
    ) -> list[dict[str, Any]]:
        self.replay_folder.mkdir(parents=True, exist_ok=True)
        segments = []
        rows = max(SEGMENT_BYTES // (replay.nbytes // (replay.num_envs * replay.ring)), 1)
        for start in range(0, len(ids), rows):
            chunk = ids[start : start + rows]
            data = safetensors.torch.save(
                replay.export_rows(chunk) | {"row.id": torch.from_numpy(chunk)}
            )
            # Unique names: a segment never takes the place of one that a checkpoint lists.
            file = f"segment-{step:09d}-{start:09d}-{secrets.token_hex(4)}.safetensors"
            added.append(self.replay_folder / file)
            write_file(added[-1], data)
            envs = chunk % replay.num_envs
            last = [int(chunk[envs == env][-1]) for env in np.unique(envs)]
            segments.append({"file": file, "last_ids": last, **_stamp(data)})
        _sync_folder(self.replay_folder)
        return segments

    def _restore_replay(self, replay: Replay, folder: Path, manifest: dict[str, Any]) -> None:
        if "segments" not in manifest:
            raise UserError(f"'{folder}' was saved without a replay; it can be evaluated only")
        saved = load_tree(folder, "replay")
        replay.set_state(saved["state"])
        found = 0
        for segment in manifest["segments"]:
            path = self.replay_folder / segment["file"]
            rows = load_tensors(path, segment["nbytes"], segment["crc32"])
            replay.import_rows(rows["row.id"].numpy(), rows)
            found += int(replay.alive(rows["row.id"]).sum())
        if found != len(replay.closed_ids(np.zeros_like(replay.closed))):
            raise DamagedFileError(folder / "manifest.json", "rows of the replay are missing")
        for field, changed in saved["changed"].items():
            replay.write(changed["ids"], field, changed["values"])
        self._replay, self._closed = replay, replay.closed
        self._segments = manifest["segments"]


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _stamp(data: bytes) -> dict[str, int]:
    return {"nbytes": len(data), "crc32": zlib.crc32(data)}


def _sync_folder(folder: Path) -> None:
    """Wait until the disk knows the folder's entries (renames and new files)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
