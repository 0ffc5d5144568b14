"""Reading the letters in a picture, by comparing every place with every letter of the font.

A letter is where the correlation of brightness with its bitmap is high and no other letter correlates better nearby.
Correlation does not depend on color or contrast, and the bitmaps carry a dot of background on every side, so that a
part of one letter is not taken for another.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.generative_models.drawings import glyph_scale, longest_text
from agents.generative_models.font import CHARACTERS, GLYPHS

LEAST_CORRELATION = 0.65
"""Of a letter: below it a place is empty or unreadable."""
LEAST_CONTRAST = 0.1
"""Standard deviation of brightness that counts as contrast: less is treated as this much, so that noise is no text."""


@lru_cache(maxsize=8)
def _templates(scale: int) -> Tensor:
    """Return the letters with a dot around them, of mean 0 and norm 1, [36, 1, 9 * scale, 7 * scale]."""
    dots = F.pad(torch.from_numpy(GLYPHS).float(), (1, 1, 1, 1))
    ink = dots.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    ink = ink - ink.mean((1, 2), keepdim=True)
    return (ink / ink.flatten(1).norm(dim=1)[:, None, None])[:, None]


@torch.no_grad()
def read_text(images: Tensor) -> list[str]:
    """Return what is written in pictures, from the left to the right; unreadable ones say nothing.

    Args:
        images: float [B, 3, S, S] in [0, 1].
    """
    size = images.shape[-1]
    scale = glyph_scale(size)
    templates = _templates(scale).to(images.device)
    value = F.pad(images.float().amax(1, keepdim=True), (scale,) * 4)
    ones = torch.ones_like(templates[:1])
    dots = ones.numel()
    mean = F.conv2d(value, ones) / dots
    variance = F.conv2d(value.square(), ones) / dots - mean.square()
    spread = variance.clamp(min=LEAST_CONTRAST**2).sqrt() * dots**0.5
    best, letter = (F.conv2d(value, templates) / spread).max(1)
    rows = torch.arange(best.shape[1], device=best.device)[:, None]
    columns = torch.arange(best.shape[2], device=best.device)
    found: list[list[tuple[int, str]]] = [[] for _ in images]
    for _ in range(
        longest_text(size) + 1
    ):  # one more than fits beside each other: a picture may be crowded
        score, place = best.flatten(1).max(1)
        row, column = place // best.shape[2], place % best.shape[2]
        names = letter.flatten(1).gather(1, place[:, None])[:, 0].tolist()
        for index, (s, x, name) in enumerate(
            zip(score.tolist(), column.tolist(), names, strict=True)
        ):
            if s >= LEAST_CORRELATION:
                found[index].append((x, CHARACTERS[name]))
        near = ((columns - column[:, None]).abs() < 5 * scale)[:, None] & (
            (rows - row[:, None, None]).abs() < 7 * scale
        )
        best = best.masked_fill(near, -1.0)
    return ["".join(name for _, name in sorted(letters)) for letters in found]


def edit_distance(one: str, other: str) -> int:
    """Return how many characters must be inserted, left out or replaced to turn one text into the other."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        now = [i]
        for j, b in enumerate(other, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (a != b)))
        before = now
    return before[-1]
