"""Images to lay over observations: procedural textures by default, or a folder (Places365, one's own).

The procedural bank stands in for Places365 (24 GB): it is drawn once per run from a seed and held as uint8. Its
generator shares nothing with the evaluation videos', so training never sees a test background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agents.core.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class OverlayImages:
    """A bank of square RGB images, drawn with random crops and flips.

    Args:
        folder: images are searched in it recursively; None draws procedural textures.
        count: how many images the bank holds.
        size: side of the stored images; larger than the observation, so that crops differ.
        seed: of the textures, or of the choice among more than `count` files.

    Raises:
        UserError: the folder is missing, holds no image, or an image is broken.
    """

    def __init__(self, folder: str | None, *, size: int, seed: int, count: int = 512) -> None:
        rng = np.random.default_rng(seed)
        if folder is None:
            images = procedural_textures(count, size, rng)
        else:
            images = _load_folder(Path(folder), count, size, rng)
        self.images = torch.from_numpy(images)

    def sample(
        self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device
    ) -> Tensor:
        """Return `count` random crops, each perhaps mirrored, uint8 [count, 3, *size]."""
        if self.images.device != device:
            self.images = self.images.to(device)
        n, _, side, _ = self.images.shape
        h, w = size

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, generator=generator, device=device)

        which = draw(n, count)
        rows = torch.arange(h, device=device) + draw(side - h + 1, count, 1)
        columns = torch.arange(w, device=device) + draw(side - w + 1, count, 1)
        columns = torch.where(draw(2, count, 1).bool(), columns.flip(1), columns)
        index = (rows[:, :, None] * side + columns[:, None, :]).view(count, 1, h * w)
        flat = self.images[which].flatten(2)
        return flat.gather(2, index.expand(count, 3, h * w)).view(count, 3, h, w)


def procedural_textures(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw textures from noise of many scales, warped stripes and flat mosaics, uint8 [count, 3, size, size].

    Each image is a color map of three random colors over a random height field; spectra fall like natural
    images' (amplitude about 1 / frequency), and a third of the images has sharp edges.
    """
    frequency = np.fft.fftfreq(size)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    radius[0, 0] = 1.0
    batch: list[np.ndarray] = []
    for start in range(0, count, 64):
        n = min(64, count - start)
        slope = rng.uniform(0.8, 2.2, (n, 1, 1))
        white = np.fft.fft2(rng.standard_normal((n, 2, size, size)))
        fields = np.fft.ifft2(white / radius ** slope[:, None]).real
        fields /= np.abs(fields).max(axis=(2, 3), keepdims=True)
        height, second = fields[:, 0], fields[:, 1]
        stripes = np.sin(rng.uniform(4, 40, (n, 1, 1)) * height + 3 * second)
        mosaic = np.round(height * rng.uniform(2, 5, (n, 1, 1))) / 3
        kind = rng.integers(0, 3, (n, 1, 1))
        value = np.where(kind == 0, height, np.where(kind == 1, stripes, mosaic))
        colors = rng.uniform(0, 255, (n, 3, 3, 1, 1))
        t = np.clip(value * 0.5 + 0.5, 0, 1)[:, None]
        s = np.clip(second * 0.5 + 0.5, 0, 1)[:, None]
        image = (1 - t) * colors[:, 0] + t * ((1 - s) * colors[:, 1] + s * colors[:, 2])
        batch.append(image.astype(np.uint8))
    return np.concatenate(batch)


def _load_folder(folder: Path, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    if not folder.is_dir():
        raise UserError(f"overlay folder '{folder}' does not exist; give a folder of images")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"overlay folder '{folder}' holds no image ({', '.join(IMAGE_SUFFIXES)})")
    if len(files) > count:
        files = [files[i] for i in sorted(rng.choice(len(files), count, replace=False))]
    return np.stack([_load_image(file, size) for file in files])


def _load_image(file: Path, size: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            short = min(image.size)
            left, top = (image.width - short) // 2, (image.height - short) // 2
            square = image.convert("RGB").crop((left, top, left + short, top + short))
            resized = square.resize((size, size), Image.Resampling.BOX)
    except OSError as error:
        raise UserError(f"overlay image '{file}' cannot be read ({error}); remove it") from error
    return np.asarray(resized).transpose(2, 0, 1)
