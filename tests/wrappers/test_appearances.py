"""Light, noise, objects, textures and walking colors against their definitions."""

import numpy as np
import pytest

from envs.toy import Reach
from envs.toy_view import PALETTE, ToyView
from wrappers.distraction import light, noise
from wrappers.distraction.base import SPLITS
from wrappers.distraction.color import ColorWalk
from wrappers.distraction.light import RandomLight, draw_lighting
from wrappers.distraction.noise import RandomNoise
from wrappers.distraction.presets import DISTRACTIONS, make_distraction
from wrappers.distraction.surfaces import RandomObjects, RandomTextures, draw_textures


def view_of(seed: int = 0, size: int = 24) -> ToyView:
    env = Reach()
    env.reset(seed=seed)
    return env.view(size, size)


# Light -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [light.EASY, light.HARD])
def test_light_is_drawn_in_its_ranges_and_never_brighter(ranges: light.LightRange) -> None:
    drawn = [draw_lighting(ranges, seed) for seed in range(1000)]
    tilts = np.array([lighting.tilt for lighting in drawn])
    assert 0 <= tilts.min() < 0.1 * ranges.tilt
    assert 0.9 * ranges.tilt < tilts.max() <= ranges.tilt
    brightest = np.array([lighting.diffuse.max() for lighting in drawn])
    darkest = np.array([lighting.diffuse.min() for lighting in drawn])
    assert brightest.max() <= ranges.brightness[1]
    assert darkest.min() >= ranges.brightness[0] * (1 - ranges.tint)
    assert (darkest / brightest).min() >= 1 - ranges.tint
    ambient = np.array([lighting.ambient / lighting.diffuse for lighting in drawn])
    others = np.append(ambient, [lighting.headlight for lighting in drawn])
    assert ranges.others - 1e-9 <= others.min() < others.max() <= 1 + 1e-9
    directions = np.histogram([v.direction for v in drawn], 4, (0, 2 * np.pi))[0]
    assert directions.min() > 200


def test_an_episode_keeps_its_light() -> None:
    view = view_of()
    clean, lamp = view.render(), RandomLight(light.HARD)
    lamp.reset(view, np.random.default_rng(0))
    first = lamp.frame(view)
    lamp.advance(view)
    assert (lamp.frame(view) == first).all()
    assert (first < clean).any()
    assert (first <= clean).all()


# Noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [noise.EASY, noise.HARD])
def test_noise_is_gaussian_independent_and_new_in_every_step(deviation: float) -> None:
    view, gray = view_of(), np.full((60, 60, 3), 128, np.uint8)
    sensor = RandomNoise(deviation, deviation)
    sensor.reset(view, np.random.default_rng(0))
    pictures = []
    for _ in range(5):
        pictures.append(sensor.touch_up(gray).astype(float) - 128)
        assert (sensor.touch_up(gray) - 128.0 == pictures[-1]).all(), "looking twice is free"
        sensor.advance(view)
    seen = np.array(pictures)
    exact = np.random.default_rng(1).normal(0, 255 * deviation, 200_000).round().clip(-128, 127)
    assert seen.std() == pytest.approx(exact.std(), rel=0.02)
    assert seen.mean() == pytest.approx(0, abs=0.02 * 255 * deviation)
    flat = seen.reshape(5, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(5)).max() < 0.05, "steps"
    assert np.abs(np.corrcoef(seen.reshape(-1, 3).T) - np.eye(3)).max() < 0.05, "channels"
    assert abs(np.corrcoef(flat[:, :-3].ravel(), flat[:, 3:].ravel())[0, 1]) < 0.05, "pixels"


def test_black_and_white_are_clipped_and_nothing_wraps_around() -> None:
    sensor = RandomNoise(0.3, 0.3)
    sensor.reset(view_of(), np.random.default_rng(0))
    black, white = (np.full((40, 40, 3), value, np.uint8) for value in (0, 255))
    assert 0.4 < (sensor.touch_up(black) == 0).mean() < 0.6
    assert 0.4 < (sensor.touch_up(white) == 255).mean() < 0.6


def test_the_strength_of_noise_is_drawn_per_episode() -> None:
    sensor, rng, strengths = RandomNoise(0, 0.18), np.random.default_rng(0), []
    for _ in range(400):
        sensor.reset(view_of(), rng)
        strengths.append(sensor.get_state()["deviation"])
    assert np.histogram(strengths, 3, (0, 0.18))[0].min() > 100


# Objects and textures ----------------------------------------------------------------------------


def test_only_objects_are_repainted() -> None:
    view = view_of(3)
    clean = view.render()
    target = (clean == np.rint(255 * PALETTE["objects"]["target"])).all(-1)
    other = np.abs(clean.astype(int) - 255 * PALETTE["objects"]["target"]).max(-1) > 100
    for is_hard in (False, True):
        objects = RandomObjects(is_hard=is_hard)
        objects.reset(view, np.random.default_rng(0))
        picture = objects.frame(view)
        assert (picture[target] != clean[target]).any(-1).all()
        assert (picture[other & view.foreground()] == clean[other & view.foreground()]).all()
        assert (picture[0] == clean[0]).all()
        assert (picture[-1] == clean[-1]).all()


def test_textures_cover_what_is_meant_with_something_new_in_every_episode() -> None:
    view, rng, rows = view_of(3), np.random.default_rng(0), set()
    clean = view.render()
    for _ in range(8):
        textures = RandomTextures()
        textures.reset(view, rng)
        picture = textures.frame(view)
        assert (picture[0] == clean[0]).all(), "the sky stays"
        rows.add(picture[-1].tobytes())
    assert len(rows) == 8
    drawn = draw_textures(view, 1, {"floor"}.__contains__)
    assert drawn["floor"].shape == (128, 128, 3)
    assert drawn["floor"].dtype == np.uint8
    assert draw_textures(view, 1, {"walls"}.__contains__) == {}


# Walking colors ----------------------------------------------------------------------------------


def own_colors(view: ToyView) -> np.ndarray:
    colors = view.colors("materials")
    return np.array([colors[slot] for slot in sorted(colors)])


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_colors_begin_uniformly_in_the_suites_range(scale: float) -> None:
    view, rng, drawn = view_of(), np.random.default_rng(0), []
    for _ in range(3000):
        walk = ColorWalk(scale)
        walk.reset(view, rng)
        drawn.append(walk.get_state()["colors"])
    own, colors = own_colors(view), np.array(drawn)
    low, high = np.maximum(own - scale, 0), np.minimum(own + scale, 1)
    share = (colors - low) / (high - low)
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.mean(0) == pytest.approx(0.5, abs=0.02)
    assert share.std(0) == pytest.approx(12**-0.5, abs=0.01)


def test_colors_walk_by_clipped_normal_steps() -> None:
    view, scale = view_of(), 0.5
    walk = ColorWalk(scale, control_steps=4)
    walk.reset(view, np.random.default_rng(3))
    state = walk.get_state()
    twin = np.random.default_rng(0)
    twin.bit_generator.state = state["generator"]
    own, expected = own_colors(view), state["colors"].copy()
    begun = expected.copy()
    for _ in range(60):
        for change in twin.normal(0, 0.03 * scale, (4, *own.shape)):
            for place in np.ndindex(own.shape):
                moved = expected[place] + change[place]
                expected[place] = max(
                    max(0, own[place] - scale), min(min(1, own[place] + scale), moved)
                )
        walk.advance(view)
        np.testing.assert_allclose(walk.get_state()["colors"], expected, atol=1e-12)
    assert np.abs(expected - begun).max() > 0.1, "they went somewhere"


# All of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRACTIONS)
def test_splits_never_show_the_same(name: str) -> None:
    states = {}
    for split in SPLITS:
        for seed in range(3):
            distraction = make_distraction(name, split=split)
            assert distraction is not None
            distraction.reset(view_of(), np.random.default_rng(seed))
            states[split, seed] = repr(distraction.get_state())
    assert len(set(states.values())) == 9


STATIC = [name for name in DISTRACTIONS if name.endswith("_static")]
STILL = ["camera_hard", "light_hard", "objects_hard", "textures", "color_hard"]


@pytest.mark.parametrize("name", [*STATIC, *STILL])
def test_what_stands_still_does(name: str) -> None:
    view, distraction = view_of(), make_distraction(name, control_steps=8)
    assert distraction is not None
    distraction.reset(view, np.random.default_rng(0))
    first = distraction.frame(view)
    assert (first != view_of().render()).any()
    for _ in range(3):
        distraction.advance(view)
        assert (distraction.frame(view) == first).all()
