"""Video backgrounds: exact compositing, and no pixel of a body is touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.toy import Reach
from envs.toy_view import ToyView
from wrappers.distraction.textures import ProceduralVideo, ProceduralVideos
from wrappers.distraction.video import SKY, SURROUNDINGS, VideoBackground, composite
from wrappers.view import Layers, Part


def view_of(seed: int, size: int = 24) -> ToyView:
    env = Reach()
    env.reset(seed=seed)
    return env.view(size, size)


def naive_composite(layers: Layers, background: np.ndarray) -> np.ndarray:
    """One pixel at a time, in real numbers."""
    picture = layers.rgb.copy()
    for row, column in np.ndindex(layers.coverage.shape):
        share = round(255 * float(layers.coverage[row, column])) / 255
        for channel in range(3):
            behind = float(background[row, column, channel])
            front = float(layers.rgb[row, column, channel])
            picture[row, column, channel] = int((1 - share) * front + share * behind + 0.5 - 1e-9)
    return picture


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.integers(5, 40), hidden=st.sampled_from((SKY, SURROUNDINGS))
)
def test_compositing_is_exact(seed: int, size: int, hidden: frozenset[Part]) -> None:
    layers = view_of(seed, size).render_layers(hidden)
    background = np.random.default_rng(seed).integers(0, 256, layers.rgb.shape, np.uint8)
    assert (composite(layers, background) == naive_composite(layers, background)).all()


def test_compositing_is_exact_for_every_coverage_and_color() -> None:
    rng = np.random.default_rng(0)
    coverage = rng.integers(0, 256, (64, 64)).astype(np.float32) / 255
    rgb = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    layers = Layers(rgb, coverage)
    assert (composite(layers, rgb[::-1]) == naive_composite(layers, rgb[::-1])).all()


@pytest.mark.parametrize("hidden", [SKY, SURROUNDINGS])
@pytest.mark.parametrize("size", [24, 84])
def test_bodies_are_those_of_the_clean_picture(hidden: frozenset[Part], size: int) -> None:
    view = view_of(3, size)
    video = VideoBackground(ProceduralVideos(), hidden)
    video.reset(view, np.random.default_rng(0))
    clean, picture, layers = view.render(), video.frame(view), view.render_layers(hidden)
    body, background = layers.coverage == 0, layers.coverage == 1
    assert body.any()
    assert (picture[body] == clean[body]).all()
    name, start = video.get_state()["name"], int(video.get_state()["start"] * 10_000)
    expected = ProceduralVideo(int(name), size, size).frame(start)
    assert (picture[background] == expected[background]).all()
    is_floor_kept = (picture[-1] == clean[-1]).all()
    assert is_floor_kept == (hidden == SKY)


def test_a_white_body_before_a_white_background_has_no_rim() -> None:
    view = view_of(3, 84)
    white = dict.fromkeys(view.colors(), np.ones(3))
    view.set_colors(white)
    layers = view.render_layers(SURROUNDINGS)
    not_target = view.render().min(axis=-1) > 250
    picture = composite(layers, np.full_like(layers.rgb, 255))
    assert not_target.mean() > 0.9
    assert picture[not_target].min() >= 254


class Ramp:
    """A source whose videos show their frame's number."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.opened: list[tuple[str, int, int]] = []

    def draw(self, rng: np.random.Generator, split: str, count: int | None = None) -> str:
        return f"{split}-{rng.integers(1000)}"

    def open(self, name: str, height: int, width: int) -> "Ramp":
        self.opened.append((name, height, width))
        return self

    def frame(self, t: int) -> np.ndarray:
        return np.full((24, 24, 3), t % 256, np.uint8)


def test_one_frame_per_step_from_a_random_start_and_a_new_video_per_episode() -> None:
    view, source, starts = view_of(0), Ramp(100), []
    video = VideoBackground(source, SURROUNDINGS, "test")
    rng = np.random.default_rng(0)
    for _ in range(20):
        video.reset(view, rng)
        corner = []
        for _ in range(4):
            corner.append(int(video.frame(view)[0, 0, 0]))
            video.frame(view)  # looking twice does not advance
            video.advance(view)
        starts.append(corner[0])
        assert corner == [corner[0] + step for step in range(4)]
    assert len(set(starts)) > 10
    assert max(starts) < 100
    assert len({name for name, *_ in source.opened}) > 15
    assert len(source.opened) == 20, "a video is opened once per episode"
    assert all(name.startswith("test-") for name, *_ in source.opened)


def test_a_scene_without_the_hidden_parts_is_left_as_it_is() -> None:
    view = view_of(0)
    video = VideoBackground(ProceduralVideos(), frozenset(("walls",)))
    video.reset(view, np.random.default_rng(0))
    assert (video.frame(view) == view.render()).all()
