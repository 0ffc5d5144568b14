"""Many small pictures on one sheet, each with its prompt below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from agents.core.errors import full_disk_named

LINE = 12
"""Height of a line of text in pixels."""
CHARACTER = 6
"""Width of a character, about."""


def contact_sheet(
    images: Tensor, prompts: Sequence[str] | None = None, *, columns: int = 8, side: int = 96
) -> np.ndarray:
    """Return a sheet, uint8 [H, W, 3].

    Args:
        images: float [N, 3, S, S] in [0, 1].
        prompts: N of them, written below the pictures.
        columns: pictures beside each other.
        side: of a picture on the sheet in pixels; pixels are enlarged without smoothing.
    """
    columns = min(columns, max(len(images), 1))
    wrapped = [textwrap.wrap(p, side // CHARACTER) for p in prompts or [""] * len(images)]
    below = LINE * max(map(len, wrapped), default=0) + 2
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + below + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, (picture, lines) in enumerate(zip(pixels, wrapped, strict=True)):
        x, y = (index % columns) * (side + 4) + 2, (index // columns) * (side + below + 4) + 2
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        pen.multiline_text((x, y + side), "\n".join(lines), fill="black", spacing=1)
    return np.asarray(sheet)


def save_picture(file: Path, picture: np.ndarray) -> None:
    """Write a PNG that appears whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with full_disk_named(file.parent):
        Image.fromarray(picture).save(temporary, "PNG")
        temporary.replace(file)
