"""Rows of N environments in rings: stored by column, found by ids that stay what they are.

A *row* is one observation, with what was done in it once that is known. The id of a row is
`counter * num_envs + environment`, where `counter` numbers the rows that the environment ever
wrote: it stays valid until the row is overwritten and is never used again.

Rows in RAM are gathered by NumPy's `take`, in one thread. On two cores it makes 128 stacks of
(9, 84, 84) in 0.5 ms, where torch's `index_select` takes 0.3 ms and indexing with a tensor 1.7 ms;
but while environments keep the cores busy, it takes 3 ms, and `index_select` 8 to 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.core.errors import NotFiniteError, UserError
from agents.core.fields import Field, Storage, allocate

OLDEST_AGE = 255
"""Ages (steps since the episode's first row) stop here: stacks need no more, and it is a byte."""


class Rows:
    """A ring of rows for each of N environments.

    Args:
        fields: what a row holds.
        num_envs: N.
        ring: rows of each environment.
        device: where gathered rows are needed.
        storage: where the columns are: `device`, `ram` or `mmap`.
        directory: for the files of `mmap`.
        frozen: fields that `write` must leave alone.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        num_envs: int,
        ring: int,
        *,
        device: torch.device,
        storage: Storage,
        directory: str | Path | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        self.num_envs, self.ring = num_envs, ring
        self.device, self.storage = device, storage
        self._fields = dict(fields)
        self._writable = [name for name in fields if name not in frozen]
        self._columns = {
            name: allocate(name, num_envs * ring, field, storage, device, directory)
            for name, field in fields.items()
        }
        # What NumPy reads and writes of columns in RAM or in a file; views of them.
        self._arrays = {
            name: _array(column, fields[name].nbytes)
            for name, column in self._columns.items()
            if not column.is_cuda
        }
        # What decides about validity stays on the CPU in NumPy: indices are made there.
        self._taken = np.zeros(num_envs * ring, bool)
        self._age = np.zeros(num_envs * ring, np.uint8)
        self._count = np.zeros(num_envs, np.int64)  # rows that each environment ever wrote
        self._length = 0
        self._written: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """Taken rows that are stored: transitions."""
        return self._length

    def _append(self, envs: np.ndarray, rows: dict[str, Tensor], age: np.ndarray) -> None:
        """Open the next row of `envs`; an untaken row has zeros where its step will be."""
        slots = envs * self.ring + self._count[envs] % self.ring
        self._length -= int(self._taken[slots].sum())
        self._taken[slots] = False
        self._age[slots] = age
        for written in self._written.values():
            written[slots] = False
        self._put(slots, rows)
        self._clear(slots, [name for name in self._fields if name not in rows])
        self._count[envs] += 1

    def _put(self, slots: np.ndarray, rows: Mapping[str, Tensor]) -> None:
        for name, values in rows.items():
            column = self._columns[name]
            if column.is_cuda:
                index = torch.from_numpy(slots).to(column.device)
                column.index_copy_(0, index, values.to(column.device))
            else:  # NumPy: torch would wake all threads for a few rows, 12 ms on a busy machine
                self._arrays[name][slots] = _array(values, self._fields[name].nbytes)

    def _clear(self, slots: np.ndarray, names: Sequence[str]) -> None:
        for name in names:
            column = self._columns[name]
            if column.is_cuda:
                column.index_fill_(0, torch.from_numpy(slots).to(column.device), 0)
            else:
                self._arrays[name][slots] = 0

    def _as_column(self, name: str, values: Any) -> Tensor:
        tensor = torch.as_tensor(values, dtype=self._fields[name].dtype, device="cpu")
        if tensor.shape[1:] != self._fields[name].shape:
            raise ValueError(
                f"'{name}' has shape {tuple(tensor.shape[1:])} in each environment; the replay was "
                f"built for {self._fields[name].shape}"
            )
        return tensor

    def _slots(self, counter: np.ndarray, env: np.ndarray | None = None) -> np.ndarray:
        envs = np.arange(self.num_envs) if env is None else env
        return envs * self.ring + counter % self.ring

    def _gather(self, name: str, slots: np.ndarray) -> Tensor:
        column, field = self._columns[name], self._fields[name]
        shape = (*slots.shape, *field.shape)
        if column.is_cuda:
            index = torch.from_numpy(slots.reshape(-1)).to(column.device, non_blocking=True)
            return column.index_select(0, index).view(shape)
        # Pinned, so that a copy to the GPU overlaps; its allocator keeps it until that is done.
        rows = torch.empty(shape, dtype=field.dtype, pin_memory=self.device.type == "cuda")
        out = _array(rows.view(-1, *field.shape), field.nbytes)
        # "raise" would copy twice
        np.take(self._arrays[name], slots.reshape(-1), axis=0, out=out, mode="clip")
        return rows.to(self.device, non_blocking=True)

    # ------------------------------------------------------------------------------ rows by id

    def alive(self, ids: Any) -> np.ndarray:
        """Return bool [M]: which ids are still stored."""
        ids = np.asarray(ids, np.int64)
        counter, env = np.divmod(ids, self.num_envs)
        return (ids >= 0) & (counter < self._count[env]) & (counter >= self._count[env] - self.ring)

    def write(self, ids: Any, field: str, values: Any) -> np.ndarray:
        """Overwrite a field of stored rows (a relabeled reward, a latent).

        Args:
            ids: int64 [M], without repetitions.
            field: `action`, `reward`, an extra field or an unstacked part of the observation.
            values: [M, ...].

        Returns:
            bool [M]: the row was still there and is written.
        """
        if field not in self._writable:
            raise UserError.unknown("replay field to write", field, self._writable)
        alive = self.alive(ids)
        slots = self._slots_of(np.asarray(ids, np.int64)[alive])
        rows = {field: self._as_column(field, values)[torch.from_numpy(alive)]}
        check_finite(rows)
        self._put(slots, rows)
        self._written.setdefault(field, np.zeros(len(self._taken), bool))[slots] = True
        return alive

    def read(self, ids: Any, field: str) -> Tensor:
        """Return a field of stored rows, [M, ...] on the learner's device; of frames the newest.

        Raises:
            ValueError: when an id is no longer stored (ask `alive` first).
        """
        if field not in self._fields:
            raise UserError.unknown("replay field", field, self._fields)
        alive = self.alive(ids)
        if not alive.all():
            gone = np.asarray(ids)[~alive]
            raise ValueError(f"{len(gone)} of {len(alive)} rows are gone, the first is {gone[0]}")
        return self._gather(field, self._slots_of(np.asarray(ids, np.int64)))

    def _slots_of(self, ids: np.ndarray) -> np.ndarray:
        counter, env = np.divmod(ids, self.num_envs)
        return self._slots(counter, env)

    # ----------------------------------------------------------------------------- checkpoints
    #
    # Closed rows (all but the newest of each environment) change only by `write`, so checkpoints
    # can append them to a common store; what is left is small and travels in `get_state`.

    @property
    def closed(self) -> np.ndarray:
        """int64 [N]: how many rows of each environment are closed (overwritten ones included)."""
        return np.maximum(self._count - 1, 0)

    def closed_ids(self, since: np.ndarray) -> np.ndarray:
        """Return the ids of stored closed rows from the counters `since` [N] on, oldest first."""
        oldest = np.maximum(since, self._count - self.ring)
        ids = [
            np.arange(oldest[env], self.closed[env]) * self.num_envs + env
            for env in range(self.num_envs)
        ]
        return np.sort(np.concatenate(ids))

    def written_ids(self, field: str) -> np.ndarray:
        """Return the ids of stored rows whose `field` was overwritten by `write`."""
        if field not in self._written:
            return np.zeros(0, np.int64)
        env, place = np.divmod(np.flatnonzero(self._written[field]), self.ring)
        newest = self._count[env] - 1
        counter = newest - (newest - place) % self.ring
        return counter * self.num_envs + env

    @property
    def written_fields(self) -> tuple[str, ...]:
        """The fields that `write` ever touched."""
        return tuple(self._written)

    def forget_written(self, ids: np.ndarray) -> None:
        """Take rows out of `written_ids`: they are stored as they are now."""
        slots = self._slots_of(ids[self.alive(ids)])
        for written in self._written.values():
            written[slots] = False

    def export_rows(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Return whole rows, as `import_rows` takes them, on the CPU."""
        slots = self._slots_of(ids)
        rows = {name: self._gather(name, slots).cpu() for name in self._fields}
        bookkeeping = {"taken": self._taken[slots], "age": self._age[slots]}
        return rows | {f"row.{name}": torch.from_numpy(v) for name, v in bookkeeping.items()}

    def import_rows(self, ids: np.ndarray, rows: Mapping[str, Tensor]) -> None:
        """Put exported rows back; ids that `set_state` says are overwritten are left out."""
        alive = self.alive(ids)
        slots = self._slots_of(ids[alive])
        keep = torch.from_numpy(alive)
        self._put(slots, {name: rows[name][keep] for name in self._fields})
        self._length -= int(self._taken[slots].sum())
        self._taken[slots] = rows["row.taken"][keep].numpy()
        self._length += int(self._taken[slots].sum())
        self._age[slots] = rows["row.age"][keep].numpy()

    def get_state(self) -> dict[str, Any]:
        """Return counters and the open rows; closed rows travel by `export_rows`."""
        envs = np.flatnonzero(self._count)
        heads = (self._count[envs] - 1) * self.num_envs + envs
        return {
            "layout": self._layout(),
            "count": self._count.copy(),
            "head_ids": heads,
            "heads": self.export_rows(heads),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore `get_state`; the closed rows must then be given to `import_rows`."""
        ours, theirs = self._layout(), state["layout"]
        if different := [name for name in ours if ours[name] != theirs.get(name)]:
            what = ", ".join(f"{name} {theirs.get(name)} (now {ours[name]})" for name in different)
            raise UserError(f"the stored replay has {what}; resume with the run's own settings")
        self._taken[:] = False
        self._age[:] = 0
        self._length = 0
        self._written = {}
        self._count[:] = state["count"]
        self.import_rows(np.asarray(state["head_ids"]), state["heads"])

    def _layout(self) -> dict[str, Any]:
        fields = {n: f"{f.dtype} {list(f.shape)}" for n, f in self._fields.items()}
        return {"num_envs": self.num_envs, "rows_per_env": self.ring, **fields}


def _array(values: Tensor, row_bytes: int) -> np.ndarray:
    """Return a view [rows, ...]; of a dtype of torch that NumPy does not know, of its bytes [rows, row_bytes]."""
    if values.dtype in _KNOWN:
        return values.numpy()
    return values.contiguous().view(-1).view(torch.uint8).view(-1, row_bytes).numpy()


_KNOWN = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.float32, torch.float64,
}  # fmt: skip
"""Dtypes that NumPy has too."""


def check_finite(rows: Mapping[str, Tensor], envs: np.ndarray | None = None) -> None:
    """Refuse what is not finite, by name, where it enters.

    Args:
        rows: name -> [M, ...].
        envs: int64 [M], the environment of each row, to be named too.

    Raises:
        NotFiniteError: names field, value and environment.
    """
    for name, values in rows.items():
        if values.is_floating_point() and not _is_finite(values):
            finite = torch.isfinite(values)
            bad = values[~finite][0].item()
            row = int((~finite).nonzero()[0, 0])
            where = "" if envs is None else f" in environment {envs[row]}"
            raise NotFiniteError(f"'{name}' is {bad}{where}")


def _is_finite(values: Tensor) -> bool:
    """Whether all of it is; a few numbers take NumPy a fifth of torch's time."""
    if values.is_cpu and values.dtype in _KNOWN:
        return bool(np.isfinite(values.numpy()).all())
    return bool(torch.isfinite(values).all())
