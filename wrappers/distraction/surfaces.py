"""Other materials: what objects and the table look like, and what floor and walls are made of.

The textures are those of `wrappers.distraction.textures`, drawn anew in each episode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from wrappers.distraction.base import Aspect, SceneChange, Split, draw_seed
from wrappers.distraction.color import color_set
from wrappers.distraction.textures import texture
from wrappers.view import View

SIDE = 128
"""Texels along the side of a texture."""

ROOM = frozenset(("floor", "walls", "table"))
"""Surfaces that are no objects; the table is both."""

DEVIATION = 0.19
"""Of the colors of `objects_easy`: what `color_hard` changes the scene by."""


class RandomTextures(SceneChange):
    """Covers floor, walls and table with textures, where they show a picture of any kind.

    Args:
        split: whose textures to draw.
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("textures",))

    def __init__(self, split: Split = "train") -> None:
        self.split: Split = split
        self._seed = 0

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw the episode's textures."""
        self._seed = draw_seed(rng, self.split)
        self._apply(view)

    def get_state(self) -> dict[str, Any]:
        """Return the seed of the episode's textures."""
        return {"seed": self._seed}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Show the textures of `state`."""
        self._seed = state["seed"]
        self._apply(view)

    def _apply(self, view: View) -> None:
        view.set_textures(draw_textures(view, self._seed, ROOM.__contains__))


class RandomObjects(SceneChange):
    """Repaints objects and the table; other parts of the scene keep their look.

    Args:
        is_hard: any color, and other textures for what has one, instead of nearby colors.
        split: whose colors and textures to draw.
    """

    def __init__(self, *, is_hard: bool, split: Split = "train") -> None:
        self.is_hard = is_hard
        self.split: Split = split
        self._seed = 0

    @property
    def writes(self) -> frozenset[Aspect]:  # type: ignore[override]  # the harder one writes more
        """What of the picture it decides over."""
        return frozenset(("objects", "textures") if self.is_hard else ("objects",))

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw the episode's objects."""
        self._seed = draw_seed(rng, self.split)
        self._apply(view)

    def get_state(self) -> dict[str, Any]:
        """Return the seed of the episode's objects."""
        return {"seed": self._seed}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Show the objects of `state`."""
        self._seed = state["seed"]
        self._apply(view)

    def _apply(self, view: View) -> None:
        own = view.colors("objects")
        if not self.is_hard:
            view.set_colors(color_set(own, DEVIATION, self._seed), "objects")
            return
        rng = np.random.default_rng(self._seed)
        view.set_colors({slot: rng.uniform(size=3) for slot in sorted(own)}, "objects")
        view.set_textures(draw_textures(view, self._seed, own.__contains__))


def draw_textures(view: View, seed: int, is_meant: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Return textures, uint8 [128, 128, 3], for those of the view's surfaces that are meant."""
    rng = np.random.default_rng((seed, SIDE))
    surfaces = sorted(filter(is_meant, view.surfaces()))
    return {slot: texture(rng, SIDE).reshape(SIDE, SIDE, 3) for slot in surfaces}
