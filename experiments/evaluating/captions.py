"""A line of text below pictures of one size."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LONGEST = "video_hard  step 1000  reward -10.00  return -1000.0  solved"
"""A line that should fit; longer ones are cut."""
_SIZES = range(16, 7, -1)
"""Font sizes in pixels, the largest that fits is taken."""
_MARGIN = 4


class Caption:
    """Draws lines in one font, so that they do not jump from frame to frame.

    Args:
        width: of the pictures, in pixels.

    Attributes:
        height: of the bar below, in pixels.
    """

    def __init__(self, width: int) -> None:
        fonts = (ImageFont.load_default(size) for size in _SIZES)
        for font in fonts:
            if font.getlength(LONGEST) <= width - 2 * _MARGIN:
                break
        self._font = font  # the smallest where none fits
        self.height = int(font.getbbox("Ag")[3]) + 2 * _MARGIN

    def below(self, picture: np.ndarray, text: str) -> np.ndarray:
        """Return the picture above a black bar with the text, padded to even sides, as films need.

        Args:
            picture: uint8 [H, W, 3].
            text: one line.
        """
        height, width = picture.shape[0] + self.height, picture.shape[1]
        canvas = Image.new("RGB", (width + width % 2, height + height % 2))
        canvas.paste(Image.fromarray(picture))
        where = (_MARGIN, picture.shape[0] + _MARGIN)
        ImageDraw.Draw(canvas).text(where, text, font=self._font, fill="white")
        return np.asarray(canvas)
