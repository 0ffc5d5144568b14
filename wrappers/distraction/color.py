"""Repainted scenes: `color_easy` and `color_hard` of DMC-GB, drawn anew instead of from its files.

Hansen and Wang (2021), "Generalization in Reinforcement Learning by Soft Data Augmentation"
(DMC-GB) ship 100 color sets per difficulty and draw one per episode. Measured on these files,
every channel is the simulator's default plus a draw from N(0, 0.10) (easy) or N(0, 0.19) (hard),
clipped to [0, 1], and the floor's second color follows its first.

Differences: a new set in every episode instead of one of 100, and sets of a split that no other
split can draw (DMC-GB selects and tests on the same 100). Scenes that DMC-GB does not have get the
same change of what they have: a floor or walls with a picture on them are tinted, which can only
darken a picture that is shown as it is.

`ColorWalk` is the color part of the Distracting Control Suite (Stone et al., 2021, arXiv:2101.02722):
every material, uniformly around its own color, on a random walk.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from wrappers.distraction.base import Aspect, SceneChange, Split, draw_seed
from wrappers.view import View

EASY, HARD = 0.10, 0.19
"""Standard deviations of the published color sets."""

STEP = 0.03
"""Standard deviation of the suite's walk per control step, as part of its scale."""


class RandomColors(SceneChange):
    """Repaints every slot of the view once per episode.

    Args:
        deviation: standard deviation of the change of each channel, in units of the full range.
        split: whose color sets to draw.
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("colors",))

    def __init__(self, deviation: float, split: Split = "train") -> None:
        self.deviation = deviation
        self.split: Split = split
        self._colors: dict[str, np.ndarray] = {}

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw a color set and repaint the view with it."""
        self._colors = color_set(view.colors(), self.deviation, draw_seed(rng, self.split))
        view.set_colors(self._colors)

    def get_state(self) -> dict[str, Any]:
        """Return the episode's colors by slot."""
        return {"colors": {slot: color.copy() for slot, color in self._colors.items()}}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Repaint the view with the colors of `state`."""
        self._colors = {slot: np.array(color) for slot, color in state["colors"].items()}
        view.set_colors(self._colors)


class ColorWalk(SceneChange):
    """Draws the color of every material anew in each episode and lets it walk.

    Colors begin uniformly within `scale` of the material's own, clipped to [0, 1], and change in
    every control step by a draw from N(0, 0.03 * scale) per channel, kept within the same range.
    What has a texture is tinted: white is the brightest that its material can be.

    Difference from the published code: a seed and disjoint splits, which it does not have.

    Args:
        scale: the suite's intensity in [0, 1].
        split: whose colors to draw.
        control_steps: steps of the walk per agent step; 0 stands still.
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("colors",))

    def __init__(self, scale: float, split: Split = "train", control_steps: int = 1) -> None:
        self.scale = scale
        self.split: Split = split
        self.control_steps = control_steps
        self._rng = np.random.default_rng(0)
        self._colors = np.zeros((0, 3))  # in the order of sorted slots

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw the colors that the episode begins with."""
        self._rng = np.random.default_rng(draw_seed(rng, self.split))
        self._find_limits(view)
        self._colors = self._rng.uniform(self._low, self._high)
        self._paint(view)

    def advance(self, view: View) -> None:
        """Walk on by one agent step."""
        if not self.control_steps or not self._slots:
            return
        shape = (self.control_steps, *self._colors.shape)
        for change in self._rng.normal(0, STEP * self.scale, shape):
            self._colors = (self._colors + change).clip(self._low, self._high)
        self._paint(view)

    def get_state(self) -> dict[str, Any]:
        """Return the colors and the generator of the walk."""
        return {"colors": self._colors.copy(), "generator": self._rng.bit_generator.state}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Go on with the walk of `state`."""
        self._rng.bit_generator.state = state["generator"]
        self._find_limits(view)
        self._colors = state["colors"].copy()
        self._paint(view)

    def _find_limits(self, view: View) -> None:
        own = view.colors("materials")
        self._slots = sorted(own)
        colors = np.array([own[slot] for slot in self._slots]).reshape(-1, 3)
        self._low = (colors - self.scale).clip(0, 1)
        self._high = (colors + self.scale).clip(0, 1)

    def _paint(self, view: View) -> None:
        view.set_colors(dict(zip(self._slots, self._colors, strict=True)), "materials")


def color_set(
    defaults: dict[str, np.ndarray], deviation: float, seed: int
) -> dict[str, np.ndarray]:
    """Return the color set number `seed` around `defaults`, float64 [3] in [0, 1] by slot."""
    rng = np.random.default_rng(seed)
    # Sorted, so that a seed means the same colors whatever order a simulator lists its slots in.
    deltas = {slot: rng.normal(0, deviation, 3) for slot in sorted(defaults)}
    if "grid1" in deltas and "grid2" in deltas:
        # The checkers keep their contrast (0.1 in dm_control), as in every published set.
        deltas["grid2"] = np.clip(defaults["grid1"] + deltas["grid1"], 0, 1) - defaults["grid1"]
    return {slot: np.clip(defaults[slot] + delta, 0, 1) for slot, delta in deltas.items()}
