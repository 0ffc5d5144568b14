"""ShapesEval: does a picture show what its prompt asks for? A program looks, no model.

Things are connected pieces of one color that are bright against a dark background; each is compared with ideal shapes
of its own area and center of mass. The answer is strict (0 or 1, as GenEval's: Ghosh et al. 2023, arXiv:2310.11513), or
graded: the mean over what the prompt asks for (number, colors, shapes, sizes, places, relation, and that each thing has
its *own* color, shape and size). The graded answer is 1 exactly where the strict one is.

**Differences from GenEval**, which asks a detector: nothing is learned, so nothing can be fooled that way; more things
than asked for count as wrong; pieces too small to be things count as one more thing when together they would be one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from agents.core.errors import UserError
from agents.generative_models.drawings import RADII, shape_distance
from agents.generative_models.scenes import COLORS, SHAPES, Scene, parse_prompt

BRIGHT = 0.45
"""Brightest channel of a pixel that belongs to a thing: about half covered by the darkest color (green, .8)."""
FARTHEST_COLOR = 0.35
"""Distance in RGB, scaled to a brightest channel of 1, at which a pixel is of none of the colors."""
LEAST_AREA = 0.008
"""Share of the picture that the smallest thing covers (8 of 1024 pixels; the smallest drawn triangle covers 18)."""
LEAST_OVERLAP = 0.7
"""Intersection over union with the ideal shape, weighted by how much of a pixel is covered (drawn: above .85)."""
LARGE = 0.5 * (RADII["small"][1] + RADII["large"][0])
"""Radius as a share of the side from which on a thing is large."""
SIDE, APART = 0.4, 0.1
"""Left is the first 40 %, the center the middle 20 %; a relation needs a distance of 10 % (drawn: 36, 12 and 22 %)."""
AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}
"""Of a shape of radius 1."""
OTHER = "other"
"""A color or a shape that is none of ours."""


@dataclass(frozen=True)
class Thing:
    """What was seen."""

    color: str
    shape: str
    size: str
    x: float
    """Center, as a share of the side."""
    y: float


@dataclass(frozen=True)
class Verdict:
    """Of one picture."""

    aspects: dict[str, float]
    """In [0, 1], by what the prompt asks for."""

    @property
    def strict(self) -> float:
        """1 where everything is as asked for, else 0."""
        return float(all(value == 1 for value in self.aspects.values()))

    @property
    def graded(self) -> float:
        """Mean of the aspects."""
        return sum(self.aspects.values()) / len(self.aspects)


# -------------------------------------------------------------------------------------- looking


def find_things(images: np.ndarray) -> list[list[Thing]]:
    """Return the things in pictures.

    Args:
        images: float [B, 3, S, S] in [0, 1].

    Returns:
        For each picture its things, from the left to the right.
    """
    count, _, size, _ = images.shape
    value = images.max(1)
    # One layer a color, and one for all others: pieces of different color are different things even where they touch.
    layers = len(COLORS) + 1
    classes = np.where(value >= BRIGHT, _nearest_color(images, value), layers)
    stacked = (classes[:, None] == np.arange(layers)[:, None, None]).reshape(-1, size, size)
    structure = np.zeros((3, 3, 3), int)
    structure[1] = 1  # neighbors on eight sides, within one layer of one picture
    labels, _ = ndimage.label(stacked, structure)
    area = np.bincount(labels.ravel())
    large = area >= LEAST_AREA * size * size
    names = [*COLORS, OTHER]
    owner = labels.reshape(count, layers, size, size).sum(1)  # layers do not overlap
    pieces = _pieces(labels, large, layers)
    shape, radius, x, y = _fit(value, owner, pieces)
    things: list[list[Thing]] = [[] for _ in range(count)]
    for index in np.argsort(x, kind="stable"):
        things[pieces.picture[index]].append(
            Thing(
                names[pieces.color[index]],
                SHAPES[shape[index]] if shape[index] >= 0 else OTHER,
                "large" if radius[index] > LARGE * size else "small",
                float(x[index] / size),
                float(y[index] / size),
            )
        )
    crumbs = ((owner > 0) & ~large[owner]).sum((1, 2))
    for picture in np.nonzero(crumbs >= LEAST_AREA * size * size)[0]:
        things[picture].append(Thing(OTHER, OTHER, "small", 0.5, 0.5))
    return things


class _Pieces(NamedTuple):
    """Connected pieces of one color, [N] each."""

    label: np.ndarray
    picture: np.ndarray
    color: np.ndarray
    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def _pieces(labels: np.ndarray, large: np.ndarray, layers: int) -> _Pieces:
    """Return the large ones of the labeled pieces in planes [B * layers, S, S]."""
    boxes = ndimage.find_objects(labels)
    rows = [
        (label, *divmod(plane.start, layers), *_extent(row), *_extent(column))
        for label, (plane, row, column) in enumerate(boxes, 1)
        if large[label]
    ]
    table = np.array(rows, np.int64).reshape(-1, 7)
    label, picture, color, top, height, left, width = table.T
    return _Pieces(label, picture, color, top, left, height, width)


def _extent(interval: slice) -> tuple[int, int]:
    return interval.start, interval.stop - interval.start


def _fit(
    value: np.ndarray, owner: np.ndarray, pieces: _Pieces
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compare pieces with ideal shapes of the same area and center of mass.

    Args:
        value: brightest channel [B, S, S].
        owner: label of the piece that each pixel is in, 0 for none, [B, S, S].
        pieces: N of them.

    Returns:
        Index of the shape (-1 where it is like none), radius, x and y of its center in pixels, [N] each.
    """
    count, size = len(pieces.label), value.shape[-1]
    # All pixels of all boxes, one pixel wider on every side, where a shape's edge covers them in part.
    width, height = pieces.width + 2, pieces.height + 2
    piece = np.repeat(np.arange(count), width * height)
    offset = np.arange(len(piece)) - np.repeat(
        np.cumsum(width * height) - width * height, width * height
    )
    row = pieces.top[piece] - 1 + offset // width[piece]
    column = pieces.left[piece] - 1 + offset % width[piece]
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    piece, row, column = piece[inside], row[inside], column[inside]
    place = pieces.picture[piece], row, column
    own = (owner[place] == 0) | (owner[place] == pieces.label[piece])
    background = np.median(value.reshape(len(value), -1), axis=1)[pieces.picture[piece]]
    full = np.array([*(max(color) for color in COLORS.values()), 1.0])[pieces.color[piece]]
    covered = np.clip((value[place] - background) / np.maximum(full - background, 0.1), 0, 1) * own

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(piece, weights, minlength=count)

    area = np.maximum(total(covered), 1e-6)
    x, y = total(covered * (column + 0.5)) / area, total(covered * (row + 0.5)) / area
    overlap, radius, center_y = [], [], []
    for shape in SHAPES:
        r = np.sqrt(area / AREAS[shape])
        up = r / 3 if shape == "triangle" else 0 * r  # from the center of mass to that of the box
        dx, dy = column + 0.5 - x[piece], row + 0.5 - (y - up)[piece]
        ideal = np.clip(0.5 - shape_distance(dx, dy, r[piece], shape), 0, 1)
        union = np.maximum(total(np.maximum(covered, ideal)), 1e-6)
        overlap.append(total(np.minimum(covered, ideal)) / union)
        radius.append(r)
        center_y.append(y - up)
    best = np.argmax(overlap, axis=0)
    chosen = best, np.arange(count)
    alike = np.array(overlap)[chosen] >= LEAST_OVERLAP
    return np.where(alike, best, -1), np.array(radius)[chosen], x, np.array(center_y)[chosen]


def _nearest_color(images: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the index of every pixel's color [B, S, S]; the last one is none of ours."""
    hue = images / np.maximum(value, 1e-6)[:, None]
    palette = np.array(list(COLORS.values()), images.dtype)
    palette /= palette.max(1, keepdims=True)
    distance = np.stack([((hue - c[:, None, None]) ** 2).sum(1) for c in palette], axis=1)
    return np.where(distance.min(1) <= FARTHEST_COLOR**2, distance.argmin(1), len(COLORS))


# -------------------------------------------------------------------------------------- judging


def judge(scene: Scene, things: Sequence[Thing]) -> Verdict:
    """Return what is right in a picture with these things.

    Raises:
        UserError: the scene is a text, which has no things.
    """
    if scene.text is not None:
        raise UserError(
            f"ShapesEval cannot read '{scene.prompt}'; use the reward glyphs for prompts with text"
        )
    asked = [group for group in scene.groups for _ in range(group.count)]
    most = max(len(asked), len(things))
    aspects = {"number": max(0.0, 1 - abs(len(asked) - len(things)) / len(asked))}
    for name in ("color", "shape", "size"):
        wanted = Counter(getattr(group, name) for group in asked)
        if None not in wanted:
            aspects[name] = (wanted & Counter(getattr(t, name) for t in things)).total() / most
    sized = None not in [group.size for group in asked]
    wanted_things = Counter((g.color, g.shape, g.size) for g in asked)
    seen = Counter((t.color, t.shape, t.size if sized else None) for t in things)
    aspects["binding"] = (wanted_things & seen).total() / most
    group = scene.groups[0]
    if group.place is not None:
        aspects["place"] = sum(_is_at(thing, group.place) for thing in things) / most
    if scene.relation is not None:
        pairs = [
            _holds(one, other, scene.relation)
            for one in things
            for other in things
            if (one.color, one.shape) == (group.color, group.shape)
            and (other.color, other.shape) == (scene.groups[1].color, scene.groups[1].shape)
        ]
        aspects["relation"] = float(any(pairs))
    return Verdict(aspects)


def _is_at(thing: Thing, place: str) -> bool:
    if place == "center":
        return all(SIDE <= p <= 1 - SIDE for p in (thing.x, thing.y))
    position = thing.x if place in ("left", "right") else thing.y
    return position < SIDE if place in ("left", "top") else position > 1 - SIDE


def _holds(one: Thing, other: Thing, relation: str) -> bool:
    step = other.x - one.x if relation in ("left", "right") else other.y - one.y
    return (step if relation in ("left", "top") else -step) >= APART


def evaluate(images: np.ndarray, prompts: Sequence[str]) -> list[Verdict]:
    """Return a verdict for every picture.

    Args:
        images: float [B, 3, S, S] in [0, 1].
        prompts: B of them.

    Raises:
        UserError: a prompt is not about shapes.
    """
    scenes = [parse_prompt(prompt) for prompt in prompts]
    seen = find_things(images)
    return [judge(scene, things) for scene, things in zip(scenes, seen, strict=True)]
