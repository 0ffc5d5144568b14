"""Pictures of scenes: antialiased shapes and letters on a dark background, drawn by NumPy, and a data set of them.

Everything scales with the side S of the picture; numbers below are shares of it. A shape fills a square of twice its
radius. Shapes keep a gap between them, so that the picture says unambiguously what it shows: `shapes_eval` reads every
one of them correctly. What a scene leaves open (size, place, shade, background) is random.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from agents.core.errors import UserError, full_disk_named
from agents.core.settings import to_dict
from agents.generative_models.font import CHARACTERS, GLYPHS
from agents.generative_models.scenes import (
    COLORS,
    KINDS,
    SHAPES,
    Group,
    Kind,
    Scene,
    draw_scenes,
)

VERSION = 1
"""Raised when the same settings draw other pictures: older files are then left alone."""
RADII = {"small": (0.094, 0.119), "large": (0.169, 0.2)}
"""Ranges of a shape's radius: 3 to 3.8 and 5.4 to 6.4 of 32 pixels."""
SIDE, MIDDLE = 0.36, (0.44, 0.56)
"""A thing on the left has its center in the first 36 %, one in the center of the picture within 44 and 56 %."""
APART, GAP, MARGIN = 0.22, 0.07, 0.03
"""Centers of things in a relation along its axis; between two shapes; between shape and edge."""
BRIGHTEST_BACKGROUND, SHADE = 0.08, 0.05
"""A gray of at most 8 %; every channel of a color varies by 5 %."""
CHUNK = 256
"""Pictures that are drawn at once."""


@dataclass(frozen=True)
class DrawingSettings:
    """What a data set of drawings holds."""

    size: int = 32
    """Side of a picture in pixels."""
    kinds: tuple[str, ...] = ("single", "mixture", "relation")
    """Kinds of scenes: single, mixture, relation, text."""
    pictures: int = 40_000
    """How many."""
    held_out_share: float = 0.15
    """Share of the combinations that no picture shows."""
    seed: int = 0
    """Of the scenes and of what they leave open."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be drawn of."""
        if self.size < 16 or self.pictures < 1:
            raise UserError(
                f"{self.pictures} pictures of {self.size} pixels; give at least 1 of 16 or more"
            )
        if not 0 < self.held_out_share < 1:
            raise UserError(f"a share of {self.held_out_share} is held out; give one in (0, 1)")
        if not self.kinds:
            raise UserError(f"no kinds of drawings; give some of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError.unknown("kind of drawing", kind, KINDS)

    @property
    def longest_text(self) -> int:
        """Characters that fit into a picture."""
        return longest_text(self.size)

    def scenes(self, count: int, rng: np.random.Generator, *, held_out: bool) -> list[Scene]:
        """Return random scenes of one side of the split, see `scenes.draw_scenes`."""
        kinds: list[Kind] = [kind for kind in KINDS if kind in self.kinds]
        share, longest = self.held_out_share, self.longest_text
        return draw_scenes(kinds, count, rng, held_out=held_out, share=share, longest_text=longest)


def glyph_scale(size: int) -> int:
    """Return the pixels of a dot of a letter."""
    return max(size // 16, 1)


def longest_text(size: int) -> int:
    """Return how many letters fit beside each other."""
    return (size - 2) // (6 * glyph_scale(size))


# ------------------------------------------------------------------------------------- shapes


def shape_distance(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray, shape: str) -> np.ndarray:
    """Return how far points lie outside a shape around 0 (negative inside), in pixels; y points down.

    Args:
        dx: of the points.
        dy: of the points.
        radius: half of the shape's width and height.
        shape: one of `SHAPES`.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - radius
    # Base at the bottom; the sides run from (0, -radius) to (+-radius, radius).
    return np.maximum(dy - radius, (2 * abs(dx) - dy - radius) / np.sqrt(5))


def render_shapes(
    size: int,
    background: np.ndarray,
    picture: np.ndarray,
    shape: np.ndarray,
    center: np.ndarray,
    radius: np.ndarray,
    color: np.ndarray,
) -> np.ndarray:
    """Draw shapes that do not overlap.

    Args:
        size: S.
        background: RGB [B, 3] in [0, 1].
        picture: which picture each shape is in, ascending, [N].
        shape: index into `SHAPES`, [N].
        center: (x, y) in pixels, [N, 2]; pixel i covers [i, i + 1].
        radius: in pixels, [N].
        color: RGB [N, 3].

    Returns:
        float32 [B, 3, S, S] in [0, 1].
    """
    out = np.empty((len(background), 3, size, size), np.float32)
    out[:] = background[:, :, None, None]
    axis = np.arange(size, dtype=np.float32) + 0.5
    dx = axis[None, None] - center[:, 0, None, None].astype(np.float32)
    dy = axis[None, :, None] - center[:, 1, None, None].astype(np.float32)
    radius = radius.astype(np.float32)
    distance = np.empty((len(dx), size, size), np.float32)
    for index, name in enumerate(SHAPES):
        chosen = shape == index
        distance[chosen] = shape_distance(dx[chosen], dy[chosen], radius[chosen, None, None], name)
    covered = np.clip(0.5 - distance, 0, 1)[:, None]
    added = covered * (color - background[picture])[:, :, None, None].astype(np.float32)
    rank = np.arange(len(picture)) - np.searchsorted(picture, picture)
    for nth in range(rank.max(initial=-1) + 1):  # a picture's first things, its second ones, ...
        out[picture[rank == nth]] += added[rank == nth]
    return out


def draw(scenes: Sequence[Scene], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw scenes.

    Args:
        scenes: N of them.
        size: S.
        rng: of what they leave open.

    Returns:
        uint8 [N, 3, S, S].
    """
    parts = [
        _draw(scenes[first : first + CHUNK], size, rng) for first in range(0, len(scenes), CHUNK)
    ]
    return np.concatenate(parts) if parts else np.empty((0, 3, size, size), np.uint8)


def _draw(scenes: Sequence[Scene], size: int, rng: np.random.Generator) -> np.ndarray:
    background = np.repeat(rng.uniform(0, BRIGHTEST_BACKGROUND, (len(scenes), 1)), 3, axis=1)
    things = [(index, group) for index, scene in enumerate(scenes) for group in _things(scene)]
    picture = np.array([index for index, _ in things], np.int64)
    radius = _radii(scenes, things, rng) * size
    center = _centers(scenes, picture, things, radius, size, rng)
    color = np.array([COLORS[group.color] for _, group in things]).reshape(-1, 3)
    color = np.clip(color + rng.uniform(-SHADE, SHADE, color.shape), 0, 1)
    shape = np.array([SHAPES.index(group.shape) for _, group in things], np.int64)
    images = render_shapes(size, background, picture, shape, center, radius, color)
    for index, scene in enumerate(scenes):
        if scene.text is not None:
            images[index] = _write(scene.text, images[index], rng)
    return (images * 255).round().astype(np.uint8)


def _things(scene: Scene) -> list[Group]:
    """Return the group of every single thing, first group first."""
    return [group for group in scene.groups for _ in range(group.count)]


def _radii(
    scenes: Sequence[Scene], things: Sequence[tuple[int, Group]], rng: np.random.Generator
) -> np.ndarray:
    """Return radii as shares of the side; where more than two things must fit, an open size is small."""
    large = rng.random(len(things)) < 0.5
    share = rng.random(len(things))
    radii = np.empty(len(things))
    for index, (picture, group) in enumerate(things):
        open_size = "large" if large[index] and scenes[picture].count <= 2 else "small"
        least, most = RADII[group.size or open_size]
        radii[index] = least + share[index] * (most - least)
    return radii


def _centers(
    scenes: Sequence[Scene],
    picture: np.ndarray,
    things: Sequence[tuple[int, Group]],
    radius: np.ndarray,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return centers in pixels, [N, 2]: drawn in their places until shapes are apart and relations hold."""
    low = np.repeat(radius[:, None] + MARGIN * size, 2, axis=1)
    high = size - low
    for index, (_, group) in enumerate(things):
        if group.place == "center":
            low[index], high[index] = MIDDLE[0] * size, MIDDLE[1] * size
        elif group.place in ("left", "top"):
            high[index, int(group.place == "top")] = SIDE * size
        elif group.place in ("right", "bottom"):
            low[index, int(group.place == "bottom")] = (1 - SIDE) * size
    center = np.empty((len(things), 2))
    # Pairs of things in one picture, and how far apart along a relation's axis they must be.
    first, second = _pairs(picture)
    towards = np.zeros((len(first), 2))
    for pair, index in enumerate(picture[first]):
        relation = scenes[index].relation
        if relation is not None:
            sign = 1 if relation in ("left", "top") else -1
            towards[pair, int(relation in ("top", "bottom"))] = sign
    todo = np.ones(len(scenes), bool)
    while todo.any():
        drawn = todo[picture]
        center[drawn] = rng.uniform(low[drawn], high[drawn])
        step = center[second] - center[first]
        needed = (radius[first] + radius[second] + GAP * size)[:, None]
        good = (abs(step) >= needed).any(1)
        related = towards.any(1)
        good &= ~related | ((step * towards).sum(1) >= APART * size)
        todo[:] = False
        todo[picture[first[~good]]] = True
    return center


def _pairs(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of all pairs of neighbors in `picture` (ascending) that are equal, each as (first, second)."""
    firsts, seconds = [], []
    for distance in range(1, 4):  # at most four things a picture
        same = np.nonzero(picture[distance:] == picture[: len(picture) - distance])[0]
        firsts.append(same)
        seconds.append(same + distance)
    return np.concatenate(firsts), np.concatenate(seconds)


def _write(text: str, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return `image` [3, S, S] with letters in a random color at a random place."""
    size = image.shape[-1]
    if len(text) > longest_text(size) or not set(text) <= set(CHARACTERS):
        raise UserError(
            f"the text '{text}' cannot be written into {size} pixels; give up to {longest_text(size)} of "
            f"{''.join(CHARACTERS)}"
        )
    dots = np.zeros((7, 6 * len(text) - 1), bool)
    for place, character in enumerate(text):
        dots[:, 6 * place : 6 * place + 5] = GLYPHS[CHARACTERS.index(character)]
    scale = glyph_scale(size)
    ink = np.kron(dots, np.ones((scale, scale), bool))
    height, width = ink.shape
    top = rng.integers(1, size - height)
    left = rng.integers(1, size - width)
    names = list(COLORS)
    color = np.array(COLORS[names[rng.integers(len(names))]]) + rng.uniform(-SHADE, SHADE, 3)
    out = image.copy()
    out[:, top : top + height, left : left + width][:, ink] = np.clip(color, 0, 1)[:, None]
    return out


# ----------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Drawings:
    """Pictures with their prompts.

    Attributes:
        images: uint8 [N, 3, S, S].
        prompts: each different one once.
        prompt: index of every image's prompt, int64 [N].
    """

    images: np.ndarray
    prompts: tuple[str, ...]
    prompt: np.ndarray


def cache_folder() -> Path:
    """Return where drawings are kept: `$SIGHTLINE_CACHE`, else `~/.cache/sightline`, in its folder `drawings`."""
    root = os.environ.get("SIGHTLINE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "sightline") / "drawings"


def make_drawings(settings: DrawingSettings) -> Drawings:
    """Draw the training pictures of some settings."""
    rng = np.random.default_rng(settings.seed)
    chosen = settings.scenes(settings.pictures, rng, held_out=False)
    images = draw(chosen, settings.size, rng)
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(scene.prompt for scene in chosen))}
    index = np.array([place[scene.prompt] for scene in chosen], np.int64)
    return Drawings(images, tuple(place), index)


def load_drawings(settings: DrawingSettings, folder: Path | None = None) -> Drawings:
    """Return the drawings of some settings, from the cache if they are there.

    A file appears whole or not at all; one that is damaged is drawn anew.

    Args:
        settings: what to draw.
        folder: of the cache; see `cache_folder`.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = folder or cache_folder()
    about = json.dumps({"version": VERSION, **to_dict(settings)}, sort_keys=True)
    file = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    if file.exists():
        try:
            with safetensors.safe_open(file, "numpy") as stored:
                if (stored.metadata() or {}).get("settings") == about:
                    prompts = json.loads(stored.metadata()["prompts"])
                    images, index = stored.get_tensor("images"), stored.get_tensor("prompt")
                    return Drawings(images, tuple(prompts), index)
        except safetensors.SafetensorError:
            pass  # cut short or altered: drawn anew below
    drawings = make_drawings(settings)
    metadata = {"settings": about, "prompts": json.dumps(drawings.prompts)}
    data = safetensors.numpy.save(
        {"images": drawings.images, "prompt": drawings.prompt}, metadata=metadata
    )
    try:
        with full_disk_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
                temporary.write(data)
            os.replace(temporary.name, file)
    except OSError as error:
        raise UserError(
            f"cannot keep drawings in '{folder}': {error.strerror}; set SIGHTLINE_CACHE to a folder that can be written"
        ) from error
    return drawings
