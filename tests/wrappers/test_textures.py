"""Procedural videos: repeatable, moving, varied, disjoint between splits, and bounded in memory."""

import numpy as np
import pytest

from wrappers.distraction import textures
from wrappers.distraction.base import SPLITS
from wrappers.distraction.textures import PATTERNS, SCENES, ProceduralVideo, ProceduralVideos


def test_a_seed_is_a_video() -> None:
    for seed in range(8):
        first, second = ProceduralVideo(seed, 24, 24), ProceduralVideo(seed, 24, 24)
        for t in (0, 5, 4, 9999, 12_345):
            assert (first.frame(t) == second.frame(t)).all(), "frames do not depend on the past"


@pytest.mark.parametrize("size", [(84, 84), (24, 24), (17, 40), (1, 1)])
@pytest.mark.parametrize("scene", dict.fromkeys(SCENES))
def test_every_scene_fills_any_size(scene: type, size: tuple[int, int]) -> None:
    for seed in range(3):
        frame = scene(np.random.default_rng(seed), *size).frame(11_000)
        assert frame.shape == (*size, 3)
        assert frame.dtype == np.uint8
        assert frame.flags.writeable
        assert frame.flags.c_contiguous


@pytest.mark.parametrize("pattern", dict.fromkeys(PATTERNS))
def test_patterns_are_periodic_and_in_range(pattern: textures.Callable) -> None:
    for seed in range(3):
        field = pattern(np.random.default_rng(seed), 64)
        assert field.shape == (64, 64)
        assert field.min() >= 0
        assert field.max() <= 1
        assert field.std() > 0.05
        # A seam would make the step over the edge the largest of all.
        inside = np.abs(np.diff(field, axis=0)).mean(axis=1)
        assert np.abs(field[0] - field[-1]).mean() <= 1.5 * inside.max()


def test_videos_move_and_have_contrast() -> None:
    moving, contrast, saturation = [], [], []
    for seed in range(60):
        video = ProceduralVideo(seed, 48, 48)
        frame, later = video.frame(100).astype(int), video.frame(110).astype(int)
        moving.append(np.abs(frame - later).mean())
        contrast.append(frame.std())
        brightest = frame.max(axis=-1)
        saturation.append(((brightest - frame.min(axis=-1)) / (brightest + 1)).mean())
    assert np.mean(np.array(moving) > 1) > 0.9
    assert 25 < np.mean(contrast) < 70
    assert np.min(contrast) > 4
    assert 0.1 < np.mean(saturation) < 0.45, "natural, not garish"


@pytest.mark.parametrize("scene", dict.fromkeys(SCENES))
def test_every_scene_moves_everywhere(scene: type) -> None:
    for seed in range(5):
        video = scene(np.random.default_rng(seed), 48, 48)
        change = np.abs(video.frame(300).astype(int) - video.frame(340)).max(axis=-1)
        columns = change.max(axis=0)
        assert (columns > 0).mean() > 0.8


def test_videos_differ_from_each_other() -> None:
    frames = np.array([ProceduralVideo(seed, 24, 24).frame(0) for seed in range(60)], float)
    flat = frames.reshape(60, -1)
    distances = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(-1))[~np.eye(60, dtype=bool)]
    assert distances.min() > 10, "no two videos look alike (in gray levels)"


def test_splits_never_share_a_video() -> None:
    source, rng = ProceduralVideos(), np.random.default_rng(0)
    names = {split: {source.draw(rng, split) for _ in range(500)} for split in SPLITS}
    assert all(len(drawn) > 490 for drawn in names.values())
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]


def test_memory_is_bounded() -> None:
    for seed in range(30):
        video = ProceduralVideo(seed, 84, 84)
        arrays = [
            vars(video._scene).values(),
            vars(video._things).values() if video._things else (),
        ]
        stored = sum(
            array.nbytes
            for values in arrays
            for value in values
            for array in (value if isinstance(value, list) else [value])
            if isinstance(array, np.ndarray)
        )
        assert stored < 2**20
