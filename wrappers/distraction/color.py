"""Repainted scenes: `color_easy` and `color_hard` of DMC-GB, drawn anew instead of from its files.

Hansen and Wang (2021), "Generalization in Reinforcement Learning by Soft Data Augmentation"
(DMC-GB) ship 100 color sets per difficulty and draw one per episode. Measured on these files,
every channel is the simulator's default plus a draw from N(0, 0.10) (easy) or N(0, 0.19) (hard),
clipped to [0, 1], and the floor's second color follows its first.

Differences: a new set in every episode instead of one of 100, and sets of a split that no other
split can draw (DMC-GB selects and tests on the same 100). Scenes that DMC-GB does not have get the
same change of what they have: a floor or walls with a picture on them are tinted, which can only
darken a picture that is shown as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wrappers.distraction.base import Split, draw_seed
from wrappers.view import View

EASY, HARD = 0.10, 0.19
"""Standard deviations of the published color sets."""


class RandomColors:
    """Repaints every slot of the view once per episode.

    Args:
        deviation: standard deviation of the change of each channel, in units of the full range.
        split: whose color sets to draw.
    """

    def __init__(self, deviation: float, split: Split = "train") -> None:
        self.deviation = deviation
        self.split: Split = split
        self._colors: dict[str, np.ndarray] = {}

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw a color set and repaint the view with it."""
        self._colors = color_set(view.colors(), self.deviation, draw_seed(rng, self.split))
        view.set_colors(self._colors)

    def advance(self, view: View) -> None:
        """Change nothing: an episode keeps its colors."""

    def frame(self, view: View) -> np.ndarray:
        """Return the repainted picture, uint8 [H, W, 3]."""
        return view.render()

    def get_state(self) -> dict[str, Any]:
        """Return the episode's colors by slot."""
        return {"colors": {slot: color.copy() for slot, color in self._colors.items()}}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Repaint the view with the colors of `state`."""
        self._colors = {slot: np.array(color) for slot, color in state["colors"].items()}
        view.set_colors(self._colors)


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
