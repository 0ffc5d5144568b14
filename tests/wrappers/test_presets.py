"""Distractions by name."""

import doctest
import os
from pathlib import Path

import pytest
from PIL import Image

from wrappers.distraction import presets
from wrappers.distraction.color import RandomColors
from wrappers.distraction.folder import VideoFolder, split_of
from wrappers.distraction.presets import DISTRACTIONS, make_distraction
from wrappers.distraction.textures import ProceduralVideos
from wrappers.distraction.video import VideoBackground
from wrappers.errors import UserError

SINGLE = [name for name in DISTRACTIONS if not name.startswith(("dcs", "randomized"))]


def test_names_mean_what_the_benchmark_calls_them() -> None:
    assert DISTRACTIONS[:4] == ("color_easy", "color_hard", "video_easy", "video_hard")
    assert make_distraction(None) is None
    assert make_distraction("clean") is None
    made = {name: make_distraction(name, split="test") for name in DISTRACTIONS}
    assert all(distraction.split == "test" for name in SINGLE for distraction in [made[name]])
    easy, hard = made["color_easy"], made["color_hard"]
    assert isinstance(easy, RandomColors)
    assert isinstance(hard, RandomColors)
    assert (easy.deviation, hard.deviation) == (0.10, 0.19)
    easy, hard = made["video_easy"], made["video_hard"]
    assert isinstance(easy, VideoBackground)
    assert isinstance(hard, VideoBackground)
    assert (easy.hidden, hard.hidden) == ({"sky"}, {"sky", "floor", "walls"})
    assert isinstance(hard.source, ProceduralVideos)


def test_a_folder_replaces_generated_videos_only_where_videos_are_shown(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    split = split_of("still.png")
    video = make_distraction("video_easy", split=split, videos=tmp_path)
    assert isinstance(video, VideoBackground)
    assert isinstance(video.source, VideoFolder)
    make_distraction("color_hard", videos=tmp_path / "missing")
    with pytest.raises(UserError, match="no video folder"):
        make_distraction("video_hard", videos=tmp_path / "missing")


def test_environments_of_a_process_share_a_folder_until_it_changes(tmp_path: Path) -> None:
    def source() -> VideoFolder:
        distraction = make_distraction("video_hard", videos=str(tmp_path))
        assert isinstance(distraction, VideoBackground)
        assert isinstance(distraction.source, VideoFolder)
        return distraction.source

    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "first.png")
    before = source()
    assert source() is before
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "second.png")
    os.utime(tmp_path, ns=(0, 0))  # clocks of file systems may be coarse
    assert source().names("train") == ["train/first.png", "train/second.png"]


def test_a_split_without_videos_is_told_when_the_distraction_is_made(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "still.png")
    make_distraction("video_hard", videos=tmp_path)
    with pytest.raises(UserError, match=r"none of the 1 video.* split 'test': give more.*test'$"):
        make_distraction("video_hard", split="test", videos=tmp_path)


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(UserError, match="no video folder ''"):
        make_distraction("video_hard", videos="")


def test_wrong_names_get_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"unknown distraction 'video_hrad'; did you mean video_hard"
    ):
        make_distraction("video_hrad")
    with pytest.raises(UserError, match=r"unknown split 'tset'; did you mean test"):
        make_distraction("clean", split="tset")  # type: ignore[arg-type]


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(presets).failed == 0
