"""Videos behind the scene: `video_easy` replaces the sky, `video_hard` floor and walls as well.

The modes of DMC-GB (Hansen and Wang, 2021), without its color key: where the background would be
seen comes from the renderer, so that no pixel of the body is ever taken for background and no edge
keeps a rim of the key's color. As there, one frame of the video per agent step. Differences: an
episode begins anywhere in its video and plays it forth and back instead of from its start in a
loop; splits are disjoint.

The background of the Distracting Control Suite (Stone et al., 2021) is the same with other settings:
one of few videos instead of the sky, before which the floor is transparent in part, a frame per
*control* step, or one that stands still. Differences there: the published code paints the video
onto the skybox, where it turns and rolls with the displaced camera; here it stands still on the
screen, as in DMC-GB, and always begins forward. DMC-GB's copy of the suite moves the video every
*second* control step only; here it moves with every one, as in the original, at DMC-GB's
intensities too. Do not compare `dcs_*` with published numbers.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np

from wrappers.distraction.base import Aspect, Split
from wrappers.view import Layers, Part, View

SKY: frozenset[Part] = frozenset(("sky",))
FLOOR: frozenset[Part] = frozenset(("floor",))
SURROUNDINGS: frozenset[Part] = frozenset(("sky", "floor", "walls"))


class Video(Protocol):
    """A moving picture of one size.

    Attributes:
        length: frames from which an episode may start.
    """

    length: int

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t` >= 0, uint8 [H, W, 3], not to be written to; there is no last one."""
        ...


class VideoSource(Protocol):
    """Where videos come from. The same name always opens the same video."""

    def draw(self, rng: np.random.Generator, split: Split, count: int | None = None) -> str:
        """Draw the name of a video of the split, of its first `count` ones only if that is given."""
        ...

    def open(self, name: str, height: int, width: int) -> Video:
        """Return the video of that name at the given size."""
        ...


class VideoBackground:
    """Shows a video in place of parts of the background, a new one in every episode.

    The video is opened at the first picture only, so that an agent that reads the state pays
    nothing.

    Args:
        source: where videos come from.
        hidden: parts of the scene to replace, as far as it has them.
        split: whose videos to draw.
        count: draw from the split's first so many videos only.
        steps: frames of the video per agent step; 0 shows a still.
        floor_opacity: what of the floor remains where it is not replaced, in [0, 1].
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("background",))

    def __init__(
        self,
        source: VideoSource,
        hidden: frozenset[Part],
        split: Split = "train",
        *,
        count: int | None = None,
        steps: int = 1,
        floor_opacity: float = 1.0,
    ) -> None:
        self.source = source
        self.hidden = hidden | FLOOR if floor_opacity == 0 else hidden
        self.split: Split = split
        self.count = count
        self.steps = steps
        self.floor_opacity = floor_opacity
        self._name = ""
        self._start = 0.0  # in [0, 1), as part of the video's length
        self._step = 0
        self._video: Video | None = None

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw a video and the frame that the episode begins at."""
        self._name = self.source.draw(rng, self.split, self.count)
        self._start = float(rng.random())
        self._step = 0
        self._video = None

    def advance(self, view: View) -> None:
        """Go on to the video's next frame."""
        self._step += self.steps

    def frame(self, view: View) -> np.ndarray:
        """Return the picture with the video's current frame in the background, uint8 [H, W, 3]."""
        if self._video is None:
            self._video = self.source.open(self._name, view.height, view.width)
        start = int(self._start * self._video.length)
        behind = self._video.frame(start + self._step)
        picture = composite(view.render_layers(self.hidden & view.parts), behind)
        if self.floor_opacity < 1 and FLOOR <= view.parts - self.hidden:
            through = composite(view.render_layers((self.hidden | FLOOR) & view.parts), behind)
            return _mix(picture, through, self.floor_opacity)
        return picture

    def get_state(self) -> dict[str, Any]:
        """Return the video's name and the place in it."""
        return {"name": self._name, "start": self._start, "step": self._step}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Go on with the video and at the place of `state`."""
        self._name, self._start, self._step = state["name"], state["start"], state["step"]
        self._video = None


def composite(layers: Layers, background: np.ndarray) -> np.ndarray:
    """Put `background` behind the foreground of `layers`; all are uint8 [H, W, 3].

    Foreground pixels are returned as they are, background pixels are the video's, and silhouettes are
    a blend of both by coverage, rounded to the nearest gray level.
    """
    coverage = layers.coverage
    # np.repeat first: a condition that broadcasts over the channels takes np.where twice as long.
    is_background = np.repeat(coverage == 1, 3).reshape(background.shape)
    picture = np.where(is_background, background, layers.rgb)
    edges = np.nonzero((coverage > 0) & (coverage < 1))  # few, and none without multisampling
    if edges[0].size:
        share = np.rint(coverage[edges] * 255).astype(np.uint16)[:, None]
        blend = layers.rgb[edges] * (255 - share) + background[edges] * share
        picture[edges] = (blend + 127) // 255
    return picture


def _mix(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Return share * first + (1 - share) * second, uint8, rounded; equal pixels stay as they are."""
    weight = round(256 * share)
    mixed = first.astype(np.uint16) * np.uint16(weight)
    mixed += second * np.uint16(256 - weight) + np.uint16(127)
    return (mixed >> 8).astype(np.uint8)
