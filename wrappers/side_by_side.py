"""Several cameras in one picture: what each of them sees stands beside what the others see.

What works with pictures works with these: frame stacks, distractions, replays, encoders, masks, films. Every camera's
picture is a square, so that the width tells how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from wrappers.view import CameraPlace, CameraShift, Layers, Lighting, Palette, Part, View


def apart(pictures: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the pictures that stand side by side in [..., H, V * W] by name, [..., H, W] each; nothing is copied."""
    return dict(zip(names, np.split(pictures, len(names), axis=-1), strict=True))


class SideBySide:
    """Views of one simulator next to each other, the first one on the left; implements `wrappers.view.View`.

    What a distraction puts behind them is one wide picture, of which every view shows its own part: a video goes on
    from one to the next. Colors, textures and lights are the scene's, and every view paints it alike. All cameras are
    displaced by the same angles and the same share of the distance, each around the point that it looks at. How far is
    drawn for the first one; another that would pass the vertical, or look from below, stops there.

    Args:
        views: at least one, of the same height.
    """

    def __init__(self, views: Sequence[View]) -> None:
        self._views = tuple(views)
        self.height = views[0].height
        self.width = sum(view.width for view in views)

    @property
    def parts(self) -> frozenset[Part]:
        """The background parts that the scene has."""
        return self._views[0].parts

    def render(self) -> np.ndarray:
        """Return all pictures, uint8 [H, W, 3]."""
        return np.concatenate([view.render() for view in self._views], axis=1)

    def render_layers(self, hidden: frozenset[Part]) -> Layers:
        """Render all views without the `hidden` parts."""
        layers = [view.render_layers(hidden) for view in self._views]
        return Layers(
            np.concatenate([each.rgb for each in layers], axis=1),
            np.concatenate([each.coverage for each in layers], axis=1),
        )

    def foreground(self) -> np.ndarray:
        """Return where the pictures show foreground, bool [H, W]."""
        return np.concatenate([view.foreground() for view in self._views], axis=1)

    def colors(self, palette: Palette = "scene") -> dict[str, np.ndarray]:
        """Return the palette's colors by slot."""
        return self._views[0].colors(palette)

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette = "scene") -> None:
        """Repaint the given slots until the next call."""
        for view in self._views:
            view.set_colors(colors, palette)

    def surfaces(self) -> tuple[str, ...]:
        """Return the slots that can show another texture."""
        return self._views[0].surfaces()

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        """Cover the given slots until the next call."""
        for view in self._views:
            view.set_textures(textures)

    def camera(self) -> CameraPlace | None:
        """Return where the first camera stands when it is not displaced."""
        return self._views[0].camera()

    def set_camera(self, shift: CameraShift | None) -> None:
        """Displace every camera until the next call."""
        for view in self._views:
            view.set_camera(None if shift is None else _within_reach(shift, view.camera()))

    def set_lights(self, lighting: Lighting | None) -> None:
        """Change the lights until the next call."""
        for view in self._views:
            view.set_lights(lighting)

    def close(self) -> None:
        """Free the views."""
        for view in self._views:
            view.close()


def _within_reach(shift: CameraShift, place: CameraPlace | None) -> CameraShift:
    """Return the displacement as far as a camera at `place` may go."""
    if place is None:
        return shift
    low, high = (limit - place.inclination for limit in place.reach)
    return replace(shift, vertical=min(max(shift.vertical, low), high))
