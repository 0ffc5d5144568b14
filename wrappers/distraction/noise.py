"""Noise of a sensor: every channel of every pixel is off by a draw of its own in every step.

Gaussian noise with the standard deviations of ImageNet-C (Hendrycks and Dietterich, 2019,
arXiv:1903.12261): 0.08 of the full range is its severity 1, 0.18 its severity 3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from wrappers.distraction.base import Aspect, Split, draw_seed
from wrappers.view import View

EASY, HARD = 0.08, 0.18


class RandomNoise:
    """Adds noise to a picture.

    Args:
        low: least standard deviation, in units of the full range; drawn uniformly per episode.
        high: greatest one.
        split: whose noise to draw.
    """

    writes: ClassVar[frozenset[Aspect]] = frozenset(("noise",))

    def __init__(self, low: float, high: float, split: Split = "train") -> None:
        self.low, self.high = low, high
        self.split: Split = split
        self._seed = self._step = 0
        self._deviation = low

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw the episode's noise and how strong it is."""
        self._seed, self._step = draw_seed(rng, self.split), 0
        self._deviation = float(np.random.default_rng(self._seed).uniform(self.low, self.high))

    def advance(self, view: View) -> None:
        """Go on to the next step's noise."""
        self._step += 1

    def frame(self, view: View) -> np.ndarray:
        """Return the view's picture with this step's noise, uint8 [H, W, 3]."""
        return self.touch_up(view.render())

    def touch_up(self, picture: np.ndarray) -> np.ndarray:
        """Return any uint8 [H, W, 3] with this step's noise, the same however often it is asked."""
        # A generator per step: pictures may be skipped or repeated.
        rng = np.random.default_rng((self._seed, self._step))
        noise = rng.standard_normal(picture.shape, np.float32)
        noise *= np.float32(255 * self._deviation)
        noise += picture
        return np.rint(noise).clip(0, 255).astype(np.uint8)

    def get_state(self) -> dict[str, Any]:
        """Return seed and strength of the noise, and the step."""
        return {"seed": self._seed, "step": self._step, "deviation": self._deviation}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Go on with the noise of `state`."""
        self._seed, self._step = state["seed"], state["step"]
        self._deviation = state["deviation"]
