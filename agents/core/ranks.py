"""Several processes that train one thing: who is who, what they exchange, and how they end together.

`torchrun --nproc-per-node N -m ...` starts N of them, each with its rank. All hold the same weights and take the same
gradient steps, each of its own part of the data: gradients are added up, and whatever is compared or averaged is
gathered first. There is no wrapper around networks (DistributedDataParallel), which exchanges gradients in every
backward pass: here a gradient step has many.

Every exchange begins with a round in which each rank says whether it still goes on. So a rank that fails need not know
what the others are about to exchange; it says so in that round (see `Ranks.one_fate`), and all end with its line
instead of waiting for it. Whatever may fail on one rank alone is therefore done before the round, not between it and
the exchange.

`Ranks()` is one process alone: everything is returned as it was given. `processes` has those that torchrun started.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from agents.core.errors import DivergedError, UserError

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another process of the run failed by a defect, ended without a word, or does not answer."""

    exit_code = 1


class Ranks:
    """This process alone; see the module. Subclasses say how tensors reach the others.

    Attributes:
        rank: of this process, from 0; the first one writes files and speaks.
        size: number of processes.
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        self._known: Exception | None = None  # the failure that all ranks have heard of

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return where this rank computes, for a device that was asked for by `name`."""
        return name

    # ------------------------------------------------------------------ how tensors reach the others

    def _gather(self, own: Tensor) -> list[Tensor]:
        """Return every rank's tensor; all are of one shape, dtype and kind of device."""
        return [own]

    def _add(self, own: Tensor) -> None:
        """Replace a tensor by the sum of every rank's, bit for bit the same on all of them."""

    # ------------------------------------------------------------------------------- what is shared

    def span(self, count: int, what: str) -> slice:
        """Return where this rank's are, of things that stand in the same order on all ranks.

        Args:
            count: how many there are.
            what: they are, as the setting of their number is called.

        Raises:
            UserError: they cannot be shared out evenly.
        """
        if count % self.size:
            raise UserError(
                f"{count} {what} cannot be shared out evenly over {self.size} processes; give --{what} a multiple "
                f"of {self.size}"
            )
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def each(self, number: int = 0) -> list[int]:
        """Return every rank's number; without one it is a round in which each says that it goes on.

        Raises:
            Exception: a rank has failed, with its text; see `one_fate`.
        """
        return [number] if self.size == 1 else self._round(int(number))

    def total(self, number: int) -> int:
        """Return the sum of every rank's number."""
        return sum(self.each(number))

    def told(self, value: T) -> T:
        """Return what the first rank says; of the others the value is not read.

        Args:
            value: of what JSON knows.
        """
        if self.size == 1:
            return value
        return json.loads(self._texts(json.dumps(value) if self.is_first else "")[0])

    def gathered(self, values: Tensor) -> Tensor:
        """Return every rank's values, one after the other: [size * N, ...] of [N, ...], without gradient."""
        if self.size == 1:
            return values
        self.each()
        return torch.cat(self._gather(values.detach().contiguous()))

    def combined(
        self, metrics: Mapping[str, Tensor], device: torch.device, largest: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Return every metric over the ranks that have it, the same on all of them.

        Args:
            metrics: 0-d; ranks may have different ones, or none.
            device: where they are.
            largest: names of those whose largest value counts; of others it is the mean.
        """
        if self.size == 1:
            return dict(metrics)
        texts = self._texts(json.dumps(list(metrics)))
        names = sorted({name for text in texts for name in json.loads(text)})
        own = torch.zeros(2, len(names), device=device)
        for place, name in enumerate(names):
            if name in metrics:
                own[0, place], own[1, place] = metrics[name].detach(), 1
        self.each()
        value, has = torch.stack(self._gather(own)).unbind(1)
        mean = value.sum(0) / has.sum(0)
        most = torch.where(has > 0, value, -torch.inf).amax(0)
        return {n: (most if n in largest else mean)[i] for i, n in enumerate(names)}

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in one piece; one that no rank has stays None."""
        if self.size == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
        self.each()
        self._add(has)
        moved = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
        if not moved:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        total = torch.cat([part.flatten() for part in parts])
        self.each()
        self._add(total)
        sums = total.split([p.numel() for p in moved])
        for parameter, gradient in zip(moved, sums, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)

    def check_alike(self, numbers: Tensor) -> None:
        """Refuse to go on where ranks hold different numbers that are to be the same, such as sums of their weights.

        Raises:
            UserError: says what to look at.
        """
        if self.size > 1 and not self.gathered(numbers[None]).eq(numbers).all():
            raise UserError(
                "the processes do not hold the same weights: they read different files; put base and run folder where "
                "all of them see the same"
            )

    # ---------------------------------------------------------------------------------- how it ends

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """End as all ranks end: an error in this context is raised in that of all others, too.

        All ranks enter and leave it together. What is raised for others has the text and the exit code of the error,
        and says which rank it comes from.

        Raises:
            Exception: a rank has failed.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self.each()
        except LostRankError:
            raise
        except Exception as error:
            if error is not self._known:
                self._known = error
                with suppress(Exception):  # who is gone need not be told
                    self._round(failure=_told_as(error))
            raise

    def _round(self, number: int = 0, failure: Mapping[str, str] | None = None) -> list[int]:
        """Exchange numbers, and failures where there are some; see `each`."""
        data = json.dumps(failure).encode() if failure else b""
        said = [row.tolist() for row in self._gather(torch.tensor([number, len(data)]))]
        if any(length for _, length in said):
            texts = self._padded(data, [length for _, length in said])
            if failure is None:
                rank = next(place for place, text in enumerate(texts) if text)
                self._known = self._error_of(rank, json.loads(texts[rank]))
                raise self._known
        return [number for number, _ in said]

    def _texts(self, text: str) -> list[str]:
        """Return every rank's text."""
        data = text.encode()
        return self._padded(data, self.each(len(data)))

    def _padded(self, data: bytes, lengths: Sequence[int]) -> list[str]:
        own = torch.frombuffer(bytearray(data.ljust(max(1, *lengths), b"\0")), dtype=torch.uint8)
        rows = self._gather(own)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]

    def _error_of(self, rank: int, failure: Mapping[str, str]) -> Exception:
        """Return another rank's failure as an error to raise here."""
        where = f"(rank {rank} of {self.size})"
        if failure["kind"] == "user":
            return UserError(f"{failure['what']} {where}")
        if failure["kind"] == "diverged":
            return DivergedError(f"{failure['what']} {where}", failure["remedy"])
        return LostRankError(f"another process failed {where}: {failure['what']}")


def _told_as(error: Exception) -> dict[str, str]:
    """Return what other ranks are told of an error."""
    if isinstance(error, UserError):
        return {"kind": "user", "what": str(error)}
    if isinstance(error, DivergedError):
        return {"kind": "diverged", "what": error.what, "remedy": error.remedy}
    return {"kind": "defect", "what": f"{type(error).__name__}, see its traceback"}
