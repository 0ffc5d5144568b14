"""Moving pictures out of nothing: backgrounds that need no download and that no agent can memorize.

A video is drawn from its seed alone: one of four kinds of scene (a textured plane under a moving
camera, two patterns flowing through each other, a warped space flown through, a landscape with
parallax), filled with one of six patterns, colored by a palette, and in half of the videos crossed
by things. The patterns follow what is known of natural pictures: 1/f spectra, and the dead leaves
model (overlapping objects whose sizes follow a power law; Lee, Mumford and Huang, 2001). All heavy
work is done once per video; a frame is a gather from a periodic texture.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from wrappers.distraction.base import Split, draw_seed

Generator = np.random.Generator


class ProceduralVideos:
    """The source of procedural videos; a video's name is its seed."""

    def draw(self, rng: Generator, split: Split, count: int | None = None) -> str:
        """Draw a seed from the split's own range, or one of its first `count` videos."""
        if count is not None:
            rng = np.random.default_rng(rng.integers(count))
        return str(draw_seed(rng, split))

    def open(self, name: str, height: int, width: int) -> ProceduralVideo:
        """Return the video with that seed."""
        return ProceduralVideo(int(name), height, width)


class ProceduralVideo:
    """A video without end that `seed` and size determine.

    Under 1 MB for pictures of up to 128 x 128. At another size the same seed shows another scene.
    """

    length = 10_000

    def __init__(self, seed: int, height: int, width: int) -> None:
        rng = np.random.default_rng(seed)
        scene = SCENES[rng.integers(len(SCENES))]
        self._scene = scene(rng, height, width)
        self._things = Things(rng, height, width) if rng.random() < 0.5 else None

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, uint8 [H, W, 3]."""
        picture = self._scene.frame(t)
        if self._things is not None:
            self._things.draw(picture, t)
        return picture


# ------------------------------------------------------------------ patterns: float32 [S, S] in
# [0, 1], periodic


def clouds(rng: Generator, side: int) -> np.ndarray:
    """Noise with a 1/f^a spectrum, stretched along one axis: clouds, grass, water, bark."""
    stretch = math.exp(rng.normal(0, 0.5))
    frequency = np.hypot(
        np.fft.fftfreq(side)[:, None] * stretch, np.fft.rfftfreq(side)[None] / stretch
    )
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * frequency ** -rng.uniform(1.1, 2)
    return _full_range(np.fft.irfft2(spectrum, (side, side)))


def waves(rng: Generator, side: int) -> np.ndarray:
    """A sum of a few long waves: soft light."""
    x = np.linspace(0, 2 * np.pi, side, endpoint=False)
    total = np.zeros((side, side))
    for _ in range(rng.integers(2, 6)):
        k, m = rng.integers(-3, 4, 2)
        total += np.sin(k * x[:, None] + m * x[None] + rng.uniform(0, 6.3)) / (1 + abs(k) + abs(m))
    return _full_range(total)


def marble(rng: Generator, side: int) -> np.ndarray:
    """Veins: the level lines of clouds."""
    return (0.5 + 0.5 * np.sin(rng.uniform(6, 25) * clouds(rng, side))).astype(np.float32)


def cells(rng: Generator, side: int) -> np.ndarray:
    """A Voronoi mosaic, with or without joints: stones, scales, windows seen from afar."""
    nearest = np.full((side, side), np.inf, np.float32)
    second, shade = nearest.copy(), nearest.copy()
    pixel = np.arange(side, dtype=np.float32)
    stretch = rng.uniform(1, 2.5)
    for row, column in rng.uniform(0, side, (int(rng.integers(15, 70)), 2)):
        down, right = np.abs(pixel - np.float32(row)), np.abs(pixel - np.float32(column))
        down, right = np.minimum(down, side - down), np.minimum(right, side - right)
        distance = np.hypot(stretch * down[:, None], right[None])
        np.copyto(shade, np.float32(rng.random()), where=distance < nearest)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    joint = np.clip((second - nearest) / (side * rng.uniform(0.005, 0.06)), 0, 1)
    return shade * (joint if rng.random() < 0.5 else 0.7 + 0.3 * joint)


def leaves(rng: Generator, side: int) -> np.ndarray:
    """Dead leaves: overlapping discs and boxes of all sizes."""
    canvas = waves(rng, side)
    boxes = rng.random()
    for _ in range(250):
        radius = min(side / 4, side * 0.015 / math.sqrt(1 - rng.random()))  # density ~ radius^-3
        aspect = math.exp(rng.normal(0, 0.4))
        y = np.arange(-int(radius * aspect), int(radius * aspect) + 1)
        x = np.arange(-int(radius / aspect), int(radius / aspect) + 1)
        where = np.ix_((y + rng.integers(side)) % side, (x + rng.integers(side)) % side)
        shade = rng.random() + 0.15 * x / (radius / aspect)  # lit from one side
        if rng.random() < boxes:
            canvas[where] = shade
        else:
            disc = np.hypot(y[:, None] / aspect, x[None] * aspect) <= radius
            canvas[where] = np.where(disc, shade, canvas[where])
    return canvas.clip(0, 1)


def bands(rng: Generator, side: int) -> np.ndarray:
    """Stripes and checks, soft or hard, a little bent."""
    x = np.linspace(0, 2 * np.pi, side, endpoint=False)
    k, m = rng.integers(-5, 6), rng.integers(1, 6)
    bend = rng.uniform(0, 3) * waves(rng, side)
    pattern = np.sin(k * x[:, None] + m * x[None] + bend)
    if rng.random() < 0.4:
        pattern = pattern * np.sin(m * x[:, None] - k * x[None] + bend)
    return (0.5 + 0.5 * np.clip(rng.uniform(0.8, 5) * pattern, -1, 1)).astype(np.float32)


PATTERNS: tuple[Callable[[Generator, int], np.ndarray], ...] = (
    clouds,
    clouds,  # twice: the commonest of natural textures
    marble,
    cells,
    leaves,
    leaves,
    bands,
)


def _full_range(field: np.ndarray) -> np.ndarray:
    """Stretch to [0, 1], cutting off one percent at both ends."""
    low, high = np.percentile(field[::2, ::2], (1, 99))
    return np.clip((field - low) / (high - low + 1e-9), 0, 1).astype(np.float32)


# ------------------------------------------------------------------ color


def palette(rng: Generator, size: int = 256) -> np.ndarray:
    """Draw `size` colors from dark to bright, uint8 [size, 3]: few hues, mostly unsaturated."""
    # Natural pictures are earth, leaf and sky before they are anything else.
    center, deviation = ((0.08, 0.04), (0.28, 0.07), (0.58, 0.06), (0.5, 0.5))[rng.integers(4)]
    hue, spread = rng.normal(center, deviation), rng.uniform(0.02, 0.1)
    strength, darkest = rng.beta(1.6, 2.4), rng.uniform(0, 0.3)
    anchors = int(rng.integers(3, 7))
    values = np.sort(np.append(rng.random(anchors - 2), (0, 1))) * rng.uniform(0.4, 0.7) + darkest
    colors = []
    for value in values:
        other_side = 0.5 if rng.random() < 0.2 else 0.0
        saturation = strength * rng.uniform(0.4, 1)
        hue_here = (hue + other_side + rng.normal(0, spread)) % 1
        colors.append(colorsys.hsv_to_rgb(hue_here, saturation, value))
    place = np.linspace(0, 1, anchors)
    ramp = [np.interp(np.linspace(0, 1, size), place, channel) for channel in np.transpose(colors)]
    return np.rint(255 * np.transpose(ramp)).astype(np.uint8)


def texture(rng: Generator, side: int) -> np.ndarray:
    """Draw a periodic colored texture, uint8 [side * side, 3]: pattern, light and grain."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))](rng, side)
    colors = palette(rng)[(255 * pattern).astype(np.uint8)]
    darkest = rng.uniform(0.6, 0.95)
    light = darkest + (1 - darkest) * (clouds if rng.random() < 0.5 else waves)(rng, side)
    grain = rng.normal(0, rng.uniform(0, 8), (side, side, 1)).astype(np.float32)
    lit = colors * light[..., None] + grain
    return lit.clip(0, 255).astype(np.uint8).reshape(-1, 3)


# ------------------------------------------------------------------ scenes


class Scene(Protocol):
    """What fills the picture behind everything else."""

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, a fresh uint8 [H, W, 3]."""
        ...


def _side(height: int, width: int) -> int:
    """Return the side of a periodic texture: a power of two, at least twice the picture."""
    return 1 << (2 * max(height, width, 16) - 1).bit_length()


def _velocity(rng: Generator, side: int) -> tuple[float, float]:
    """Draw a velocity in texels per frame: the picture is crossed in 30 to 200 frames."""
    angle, speed = rng.uniform(0, 2 * np.pi), side / 2 / math.exp(rng.uniform(3.4, 5.3))
    return speed * math.sin(angle), speed * math.cos(angle)


class Plane:
    """A texture under a camera that pans, sways, turns and zooms."""

    def __init__(self, rng: Generator, height: int, width: int) -> None:
        self._side = _side(height, width)
        self._texels = texture(rng, self._side)
        self._y = np.arange(height) - height / 2
        self._x = np.arange(width) - width / 2
        self._velocity = _velocity(rng, self._side)
        self._turn = rng.normal(0, 0.008) if rng.random() < 0.5 else 0.0  # radians per frame
        self._angle = rng.uniform(0, 2 * np.pi)
        self._zoom = rng.uniform(0, 0.5)
        self._sway = rng.uniform(0, 0.1) * self._side
        self._rate = 2 * np.pi / rng.uniform(60, 400)

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, uint8 [H, W, 3]."""
        swing = math.sin(self._rate * t)
        angle, scale = self._angle + self._turn * t, 0.8 * math.exp(self._zoom * swing)
        # Coordinates in texels as 16-bit fixed point: only sums, shifts and masks per pixel.
        sine, cosine = 65536 * scale * math.sin(angle), 65536 * scale * math.cos(angle)
        down = 65536 * ((self._velocity[0] * t + self._sway * swing) % self._side)
        right = 65536 * ((self._velocity[1] * t - self._sway * swing) % self._side)
        row = (self._y * cosine + down).astype(np.int32)[:, None]
        row = row + (self._x * sine).astype(np.int32)
        column = (self._x * cosine + right).astype(np.int32)
        column = column - (self._y * sine).astype(np.int32)[:, None]
        mask = self._side - 1
        return self._texels.take(
            ((row >> 16) & mask) * self._side + ((column >> 16) & mask), axis=0
        )


class Warp:
    """A flight through warped space: a tunnel, a hall of floor and ceiling, or rippled glass."""

    def __init__(self, rng: Generator, height: int, width: int) -> None:
        self._side = side = _side(height, width)
        self._texels = texture(rng, side)
        y = np.linspace(-1, 1, height)[:, None] + rng.uniform(-0.5, 0.5)
        x = np.linspace(-1, 1, width)[None] + rng.uniform(-0.5, 0.5)
        kind = rng.integers(3)
        clear: np.ndarray = np.ones((height, width))
        if kind == 0:
            clear = np.hypot(x, y) + 0.05
            row = -side / 3 * np.log(clear)
            column = side * np.arctan2(y, x) / (2 * np.pi)
        elif kind == 1:
            clear = np.abs(y) + 0.05 + 0 * x
            row, column = side / 12 / clear, side / 8 * x / clear
        else:
            swing = side * rng.uniform(0.01, 0.06)
            row = side / 4 * y + swing * np.sin(rng.uniform(2, 9) * x + rng.uniform(0, 6.3))
            column = side / 4 * x + swing * np.sin(rng.uniform(2, 9) * y + rng.uniform(0, 6.3))
        self._row, self._column = row.astype(np.int32), column.astype(np.int32)
        self._velocity = _velocity(rng, side)
        # What is far lies in mist: there the texture would only flicker.
        weight = np.repeat(256 * (3 * clear).clip(0, 1), 3).reshape(height, width, 3)
        self._clear = weight.astype(np.uint16)
        self._mist = ((256 - self._clear) * palette(rng)[rng.integers(256)].astype(np.uint16)) >> 8

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, uint8 [H, W, 3]."""
        row = (self._row + int(self._velocity[0] * t)) & (self._side - 1)
        column = (self._column + int(self._velocity[1] * t)) & (self._side - 1)
        texels = self._texels.take(row * self._side + column, axis=0)
        return ((texels * self._clear >> 8) + self._mist).astype(np.uint8)


class Flow:
    """Two patterns that move through each other, colored by their sum: water, smoke, fire."""

    def __init__(self, rng: Generator, height: int, width: int) -> None:
        self._side, self._height, self._width = _side(height, width), height, width
        first = PATTERNS[rng.integers(len(PATTERNS))]
        self._levels = [self._padded(pattern(rng, self._side)) for pattern in (first, clouds)]
        self._velocities = [_velocity(rng, self._side) for _ in self._levels]
        ramp = palette(rng, 128)
        self._colors = np.concatenate((ramp, ramp[::-1]))  # a ring: levels may run over its end
        self._cycle = rng.uniform(-1.5, 1.5) if rng.random() < 0.3 else 0.0  # levels per frame

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, uint8 [H, W, 3]."""
        level = np.full((self._height, self._width), int(self._cycle * t) & 255, np.uint8)
        for levels, velocity in zip(self._levels, self._velocities, strict=True):
            row, column = (int(v * t) % self._side for v in velocity)
            level += levels[row : row + self._height, column : column + self._width]
        return self._colors.take(level, axis=0)

    def _padded(self, pattern: np.ndarray) -> np.ndarray:
        """Return half of the levels a byte has, padded so that no window has to wrap around."""
        return np.pad(
            (127 * pattern).astype(np.uint8), ((0, self._height), (0, self._width)), mode="wrap"
        )


class Landscape:
    """A sky and ridges that pass by, the near ones faster."""

    def __init__(self, rng: Generator, height: int, width: int) -> None:
        self._side, self._width = _side(height, width), width
        ridges = int(rng.integers(2, 6))
        harmonics = np.arange(1, self._side // 4)
        phase = rng.uniform(0, 2 * np.pi, (ridges, harmonics.size, 1))
        x = np.arange(self._side + width) * (2 * np.pi / self._side)
        amplitude = harmonics[:, None] ** -rng.uniform(1.1, 2.0)
        outline = (amplitude * np.sin(harmonics[:, None] * x + phase)).sum(1)
        levels = np.linspace(rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.95), ridges)[:, None]
        self._tops = height * (levels + rng.uniform(0.03, 0.12) * outline)
        speed = abs(_velocity(rng, self._side)[1]) + 0.2
        self._speeds = rng.choice((-1, 1)) * speed * np.linspace(0.3, 1.5, ridges)
        self._rows = np.arange(height)[:, None]
        # Colors by layer, row and roughness, so that a frame is one gather.
        haze, sky, near = palette(rng)[220], palette(rng), palette(rng)
        rows = np.linspace(0, 1, height)
        tables = [sky[(255 - 200 * rows * rng.uniform(0.3, 1)).astype(int)]]
        for nearness in np.linspace(0.25, 1, ridges):
            ground = near[(rng.uniform(50, 250) * (1 - 0.5 * rows)).astype(int)]
            tables.append((1 - nearness) * haze + nearness * ground)
        rough = np.linspace(rng.uniform(0.5, 0.9), 1.1, 8)[:, None]
        self._colors = (np.array(tables)[:, :, None] * rough).clip(0, 255).astype(np.uint8)
        self._colors = self._colors.reshape(-1, 3)
        pattern = (8 * clouds(rng, self._side)).astype(np.intp).clip(0, 7)
        self._roughness = np.pad(pattern, ((0, 0), (0, width)), mode="wrap")[:height]

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, uint8 [H, W, 3]."""
        layer = np.zeros((self._rows.size, self._width), np.intp)
        for tops, speed in zip(self._tops, self._speeds, strict=True):
            start = int(speed * t) % self._side
            layer += self._rows >= tops[start : start + self._width]
        roughness = self._roughness[:, start : start + self._width]
        return self._colors.take((layer * self._rows.size + self._rows) * 8 + roughness, axis=0)


class Things:
    """Discs and boxes that cross the picture in front of a scene."""

    def __init__(self, rng: Generator, height: int, width: int) -> None:
        self._height, self._width = height, width
        colors = palette(rng)
        self._things = []
        for _ in range(rng.integers(2, 9)):
            rows, columns = (max(height, width) * rng.uniform(0.05, 0.3, 2)).astype(int) + 2
            y, x = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, columns)[None]
            is_box = rng.random() < 0.5
            mask = np.ones((rows, columns, 1), bool) if is_box else (y * y + x * x <= 1)[..., None]
            origin = rng.uniform(0, 4 * max(height, width), 2)
            velocity = _velocity(rng, _side(height, width))
            self._things.append((mask, colors[rng.integers(256)], origin, velocity))

    def draw(self, picture: np.ndarray, t: int) -> None:
        """Draw frame `t` into `picture`, uint8 [H, W, 3]."""
        for mask, color, origin, velocity in self._things:
            rows, columns = mask.shape[:2]
            # A thing that leaves on one side comes back on the other after it has been out of
            # sight.
            top = int(origin[0] + velocity[0] * t) % (self._height + rows) - rows
            left = int(origin[1] + velocity[1] * t) % (self._width + columns) - columns
            inside = picture[max(top, 0) : top + rows, max(left, 0) : left + columns]
            seen = mask[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]]
            np.copyto(inside, color, where=seen)


SCENES: tuple[Callable[[Generator, int, int], Scene], ...] = (Plane, Plane, Warp, Flow, Landscape)
