"""What a report is made of, before it is HTML, Markdown or LaTeX; and how its numbers look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    aside: str = ""
    """Behind the text, less prominent: an interval."""
    below: tuple[str, ...] = ()
    """Lines under it, small."""
    flag: str = ""
    """A warning that nobody may overlook."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    name: str
    """For references: lowercase words and hyphens."""
    caption: str
    head: list[str]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()
    wide: bool = False
    """Whether cells hold long texts, which may wrap."""


@dataclass(frozen=True)
class Heading:
    """A heading; the page's title has level 1."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `**text**` is bold."""

    text: str


@dataclass(frozen=True)
class Notes:
    """What a reader must know before the numbers."""

    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: tuple[tuple[str, str], ...]
    summary: str = ""
    """A line to unfold them with; empty shows them at once."""
    unfolded: bool = True
    code: bool = False
    """Whether values are commands."""


@dataclass(frozen=True)
class Figure:
    """A picture that was drawn for the report."""

    file: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Media:
    """Pictures or videos of run folders, side by side."""

    caption: str
    items: tuple[tuple[str, Path], ...]
    """Label and file."""


Block = Heading | Paragraph | Notes | Facts | Figure | Media | Table


def cells(texts: list[str]) -> list[Cell]:
    """Return plain cells."""
    return [Cell(text) for text in texts]


def slug(text: str) -> str:
    """Return a task id as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)


def number(value: float, scale: float | None = None) -> str:
    """Format with the digits that suit `scale` (default: the value): 846, 18.3, 0.52."""
    size = abs(value if scale is None else scale)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    text = f"{value:,.{digits}f}"
    return (text if float(text.replace(",", "")) else text.lstrip("-")).replace("-", "−")


def limits(low: float | np.ndarray, high: float | np.ndarray, scale: float | None = None) -> str:
    """Format an interval: [0.31, 0.52]."""
    return f"[{number(float(low), scale)}, {number(float(high), scale)}]"


def count(amount: int, noun: str) -> str:
    """Format a number of things: 1 seed, 3 seeds."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"
