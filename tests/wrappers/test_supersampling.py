"""Supersampled pixels are means of finer ones: in pictures, in layers and in masks."""

from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

import envs
from wrappers.distraction.video import composite
from wrappers.errors import UserError
from wrappers.supersampling import Supersampled, block_sums
from wrappers.view import CameraPlace, CameraShift, Layers, Lighting, Palette, Part, undress


class Noise:
    """A view whose picture and layers are given; implements `wrappers.view.View`."""

    parts: frozenset[Part] = frozenset(("sky",))

    def __init__(self, height: int, width: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.height, self.width, self.is_open = height, width, True
        self.picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        # All of it hidden, none of it, and silhouettes.
        coverage = rng.choice([0, 1, 1, 0.25], (height, width))
        coverage[:4, :4], coverage[4:8, :4] = 1, 0
        self.coverage = coverage.astype(np.float32)
        self.wanted: dict[str, object] = {}

    def render(self) -> np.ndarray:
        return self.picture.copy()

    def render_layers(self, hidden: frozenset[Part]) -> Layers:
        assert hidden == {"sky"}
        return Layers(self.picture.copy(), self.coverage.copy())

    def foreground(self) -> np.ndarray:
        return self.coverage < 1

    def colors(self, palette: Palette = "scene") -> dict[str, np.ndarray]:
        return {"sky" if palette == "scene" else palette: np.ones(3)}

    def set_colors(self, colors: Mapping[str, np.ndarray], palette: Palette = "scene") -> None:
        self.wanted[palette] = colors

    def surfaces(self) -> tuple[str, ...]:
        return ("floor",)

    def set_textures(self, textures: Mapping[str, np.ndarray]) -> None:
        self.wanted["textures"] = textures

    def camera(self) -> CameraPlace | None:
        return CameraPlace(0.7, is_overhead=True)

    def set_camera(self, shift: CameraShift | None) -> None:
        self.wanted["camera"] = shift

    def set_lights(self, lighting: Lighting | None) -> None:
        self.wanted["lights"] = lighting

    def close(self) -> None:
        self.is_open = False


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 16])
def test_pictures_are_block_means(factor: int) -> None:
    fine = Noise(3 * factor, 5 * factor)
    picture = Supersampled(fine, factor).render()
    assert picture.shape == (3, 5, 3)
    assert picture.dtype == np.uint8
    pillow = np.asarray(Image.fromarray(fine.picture).reduce(factor))
    assert np.abs(picture.astype(int) - pillow).max() <= 1  # it rounds halves otherwise
    blocks = fine.picture.reshape(3, factor, 5, factor, 3).mean((1, 3))
    assert (picture == np.floor(blocks + 0.5)).all()


def test_sums_do_not_overflow() -> None:
    white = np.full((32, 32, 3), 255, np.uint8)
    assert (block_sums(white, 16) == 255 * 256).all()


def test_compositing_after_averaging_is_averaging_after_compositing() -> None:
    factor = 4
    fine = Noise(6 * factor, 7 * factor)
    layers = Supersampled(fine, factor).render_layers(frozenset(("sky",)))
    behind = np.random.default_rng(1).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    enlarged = behind.repeat(factor, 0).repeat(factor, 1)
    share = fine.coverage[..., None]
    exact = fine.picture * (1 - share) + enlarged * share
    means = exact.reshape(6, factor, 7, factor, 3).mean((1, 3))
    assert np.abs(composite(layers, behind) - means).max() <= 1.5  # coverage is in 255ths
    assert layers.coverage[0, 0] == 1
    assert layers.coverage[1, 0] == 0
    assert layers.coverage.dtype == np.float32


def test_a_pixel_is_foreground_from_one_half_on() -> None:
    fine = Noise(8, 8)
    fine.coverage[:] = 1
    fine.coverage[0:2, 0], fine.coverage[2, 2] = 0, 0
    expected = np.zeros((4, 4), bool)
    expected[0, 0] = True
    assert (Supersampled(fine, 2).foreground() == expected).all()


def test_everything_else_reaches_the_view() -> None:
    fine = Noise(4, 4)
    view = Supersampled(fine, 2)
    colors, textures = {"sky": np.zeros(3)}, {"floor": np.zeros((8, 8, 3), np.uint8)}
    shift, light = CameraShift(roll=1.0), Lighting(0, 0, np.ones(3), 1, np.ones(3))
    view.set_colors(colors)
    view.set_colors(textures, "objects")
    view.set_textures(textures)
    view.set_camera(shift)
    view.set_lights(light)
    expected = {"scene": colors, "objects": textures, "textures": textures}
    assert fine.wanted == {**expected, "camera": shift, "lights": light}
    assert (list(view.colors()), list(view.colors("materials"))) == (["sky"], ["materials"])
    assert (view.surfaces(), view.camera()) == (("floor",), CameraPlace(0.7, is_overhead=True))
    undress(view)
    assert not any(fine.wanted.values())
    view.close()
    assert not fine.is_open


@pytest.mark.parametrize("task", ["toy/reach", "dmc/cartpole-swingup", "metaworld/drawer-open"])
def test_environments_average_what_they_would_show_larger(task: str) -> None:
    keywords = {"seed": 3, "quality": "fast", "frame_stack": 1, "foreground_mask": True}
    with envs.make(task, size=24, supersample=4, **keywords) as env:
        with envs.make(task, size=96, **keywords) as large:
            (small, info), (fine, _) = env.reset(), large.reset()
            for _ in range(2):
                blocks = fine.reshape(3, 24, 4, 24, 4).mean((2, 4))
                assert (small == np.floor(blocks + 0.5)).all()
                assert info["foreground"].shape == (24, 24)
                action = env.action_space.sample()
                small, *_, info = env.step(action)
                fine, *_ = large.step(action)


def test_factors_are_checked_and_protocols_fix_them() -> None:
    with pytest.raises(UserError, match="supersample is 0"):
        envs.make("toy/reach", supersample=0)
    with pytest.raises(UserError, match="supersample is 2, but protocol 'dmc-gb' fixes 1"):
        envs.make("dmc/walker-walk", supersample=2, protocol="dmc-gb")
