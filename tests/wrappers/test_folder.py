"""Backgrounds from a folder: what is a video, exact frames, splits, every way to be broken."""

import contextlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wrappers.distraction import folder as folder_module
from wrappers.distraction.base import SPLITS
from wrappers.distraction.folder import SHARES, FrameSequence, VideoFolder, split_of
from wrappers.errors import UserError


def write_video(path: Path, frames: int = 6, height: int = 64, width: int = 96) -> None:
    """Frame t is gray 30 t; a third at each side is white, which the crop removes in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".gif": "gif", ".webm": "libvpx-vp9"}.get(path.suffix)
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), macro_block_size=1, codec=codec, pix_fmt_out=pixels
    )
    writer.send(None)
    for t in range(frames):
        frame = np.full((height, width, 3), 30 * t, np.uint8)
        frame[:, : width // 6] = frame[:, -(width // 6) :] = 255
        writer.send(frame.tobytes())
    writer.close()


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (80, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_videos_folders_of_frames_and_loose_images(tmp_path: Path) -> None:
    write_video(tmp_path / "deep" / "er" / "clip.mp4")
    for t in range(3):
        write_image(tmp_path / "davis" / "bear" / f"{t:05d}.png", (10 * t, 0, 0))
    write_image(tmp_path / "still.PNG", (1, 2, 3))
    (tmp_path / "notes.txt").write_text("not a video")
    write_image(tmp_path / ".hidden.png", (0, 0, 0))
    folder = VideoFolder(tmp_path)
    assert sorted(contents(folder)) == ["davis/bear", "deep/er/clip.mp4", "still.PNG"]
    bear, still = folder.open("davis/bear", 20, 20), folder.open("still.PNG", 20, 20)
    assert [int(bear.frame(t)[0, 0, 0]) for t in range(8)] == [0, 10, 20, 10, 0, 10, 20, 10]
    assert bear.length == 3
    assert [still.frame(t)[5, 5].tolist() for t in (0, 7)] == [[1, 2, 3]] * 2


@pytest.mark.parametrize("kind", ["mp4", "mov", "avi", "webm", "gif"])
def test_video_files_are_cropped_resized_and_played_forth_and_back(
    tmp_path: Path, kind: str
) -> None:
    write_video(tmp_path / f"clip.{kind}")
    video = VideoFolder(tmp_path).open(f"clip.{kind}", 16, 16)
    assert video.frames.shape == (6, 16, 16, 3)
    assert video.frames.dtype == np.uint8
    centers = [int(video.frame(t)[8, 8, 1]) for t in range(16)]
    assert centers == pytest.approx(
        [30 * t for t in (0, 1, 2, 3, 4, 5, 4, 3, 2, 1) * 2][:16], abs=8
    )
    assert video.frame(0).max() < 40, "the sides are cropped away"


def test_images_are_cropped_in_the_middle_and_averaged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    frame = VideoFolder(tmp_path).open("noise.png", 10, 10).frame(0)
    expected = pixels[:, 20:60].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    assert np.abs(frame - expected).max() <= 1


def test_a_long_video_plays_without_a_cut() -> None:
    video = FrameSequence(np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, -1))
    shown = np.array([int(video.frame(t)[0, 0, 0]) for t in range(100)])
    assert np.abs(np.diff(shown)).tolist() == [1] * 99


def test_splits_are_disjoint_complete_and_have_their_shares() -> None:
    names = [f"video{number}" for number in range(5000)]
    counts = {split: [split_of(name) for name in names].count(split) for split in SPLITS}
    assert sum(counts.values()) == len(names)
    for split in SPLITS:  # four standard deviations of a fair draw
        assert counts[split] / len(names) == pytest.approx(SHARES[split], abs=0.028)
    known = {"car": "train", "davis/bear": "train", "bear": "validation", "horse": "test"}
    assert {name: split_of(name) for name in known} == known, "on every machine, for ever"


def contents(folder: VideoFolder) -> dict[str, str]:
    found = {}
    for split in SPLITS:
        with contextlib.suppress(UserError):
            for name in folder.names(split):
                assert name not in found, "splits are disjoint"
                found[name] = split
    return found


def test_adding_videos_moves_none_between_splits(tmp_path: Path) -> None:
    before: dict[str, str] = {}
    for batch in ("mno", "abcdefgh", "z0123456789"):
        for letter in batch:
            write_image(tmp_path / f"{letter}.png", (0, 0, 0), size=(8, 8))
        after = contents(VideoFolder(tmp_path))
        assert len(after) == len(before) + len(batch)
        assert before.items() <= after.items()
        before = after
    (tmp_path / "m.png").unlink()
    assert contents(VideoFolder(tmp_path)).items() < before.items()


def test_subfolders_named_after_splits_decide(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "one.png", (0, 0, 0))
    write_image(tmp_path / "train" / "two.png", (0, 0, 0))
    write_image(tmp_path / "test" / "film" / "0.png", (0, 0, 0))
    write_image(tmp_path / "test" / "film" / "1.png", (0, 0, 0))
    write_image(tmp_path / "validation" / "train" / "0.png", (0, 0, 0))
    folder = VideoFolder(tmp_path)
    assert folder.names("train") == ["train/one.png", "train/two.png"]
    assert folder.names("test") == ["test/film"]
    assert folder.names("validation") == ["validation/train"]
    assert folder.open("test/film", 8, 8).length == 2
    assert folder.open("train/one.png", 8, 8).length == 1


def test_frames_are_played_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        write_image(tmp_path / "film" / f"frame{number}.png", (20 * number, 0, 0), size=(8, 8))
    video = VideoFolder(tmp_path).open("film", 8, 8)
    assert [int(video.frame(t)[0, 0, 0]) for t in range(12)] == [20 * n for n in range(12)]


def test_masks_of_davis_are_no_videos(tmp_path: Path) -> None:
    for kind in ("JPEGImages", "Annotations"):
        write_image(tmp_path / kind / "480p" / "bear" / "0.png", (0, 0, 0))
    folder = VideoFolder(tmp_path)
    assert list(contents(folder)) == ["JPEGImages/480p/bear"]
    assert len(folder.empty_splits()) == 2


def test_draws_stay_in_their_split(tmp_path: Path) -> None:
    for number in range(30):
        write_image(tmp_path / f"{number}.png", (number, 0, 0), size=(8, 8))
    folder, rng = VideoFolder(tmp_path), np.random.default_rng(0)
    for split in SPLITS:
        assert {folder.draw(rng, split) for _ in range(300)} == set(folder.names(split))


def test_a_split_without_videos_is_told_with_what_to_do(tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "only.png", (1, 1, 1))
    folder = VideoFolder(tmp_path)
    assert folder.names("test") == ["test/only.png"]
    for split in ("train", "validation"):
        with pytest.raises(UserError) as error:
            folder.draw(np.random.default_rng(0), split)
        assert str(error.value) == (
            f"none of the 1 video(s) in '{tmp_path}' belongs to split '{split}': give more, about 30 "
            f"fill every split, or put some into '{tmp_path / split}'"
        )


def test_decoded_videos_are_kept_within_the_bound(tmp_path: Path) -> None:
    for number in range(4):
        write_image(tmp_path / f"{number}.png", (number, 0, 0))
    size = 20 * 20 * 3
    folder = VideoFolder(tmp_path, max_bytes=2 * size)
    first = folder.open("0.png", 20, 20)
    assert folder.open("0.png", 20, 20) is first, "decoded once"
    folder.open("1.png", 20, 20)
    assert folder.open("0.png", 20, 20) is first
    folder.open("2.png", 20, 20)  # the longest unused, 1.png, is forgotten
    assert folder.open("0.png", 20, 20) is first
    assert len(folder._opened) == 2


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no video folder '.*nowhere'"):
        VideoFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no videos in .*\.mp4"):
        VideoFolder(tmp_path)
    write_image(tmp_path / "a.png", (0, 0, 0))
    with pytest.raises(UserError, match="no video 'gone' in"):
        VideoFolder(tmp_path).open("gone", 8, 8)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_download_is_named_before_anything_runs(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"404 Not Found"}[damage]
    )
    with pytest.raises(
        UserError, match=r"cannot read '.*clip\.mp4': it is empty or cut off"
    ) as error:
        VideoFolder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
@pytest.mark.parametrize(
    "name", ["clip.webm", "clip.gif", "clip.avi", "still.jpg", "film/0.png", "film/0.webp"]
)
def test_a_file_that_cannot_be_read_is_named_before_anything_runs(
    tmp_path: Path, name: str, damage: bytes
) -> None:
    write_image(tmp_path / "film" / "1.png", (0, 0, 0))
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=rf"cannot read '.*{name}': .+; repair the file") as error:
        VideoFolder(tmp_path)
    assert "\n" not in str(error.value)


def test_an_empty_frame_in_the_middle_of_a_film_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "film" / "0.png", (0, 0, 0))
    (tmp_path / "film" / "1.png").touch()
    with pytest.raises(UserError, match=r"cannot read '.*1\.png': it is empty"):
        VideoFolder(tmp_path)


@pytest.mark.parametrize("name", ["clip.mp4", "film/1.png", "clip.webm"])
def test_what_is_found_broken_only_when_decoded_is_named_in_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MAX_PROBED", 0)  # too many files to look into each
    write_image(tmp_path / "film" / "0.png", (0, 0, 0))
    box = (16).to_bytes(4, "big") + b"moov" + bytes(8)  # passes for an mp4 until it is decoded
    (tmp_path / name).write_bytes(box if name.endswith("mp4") else b"nonsense")
    folder = VideoFolder(tmp_path)
    video = "film" if name.startswith("film") else name
    with pytest.raises(UserError, match=rf"cannot read '.*{name}': .+; repair the file") as error:
        folder.open(video, 8, 8)
    assert "\n" not in str(error.value)


def test_a_decoder_that_hangs_is_ended_and_the_file_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "clip.mp4")
    decoder = tmp_path / "ffmpeg"
    decoder.write_text("#!/bin/sh\nexec sleep 60\n")
    decoder.chmod(0o755)
    monkeypatch.setattr(folder_module.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(decoder))
    monkeypatch.setattr(folder_module, "DECODE_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"cannot read '.*clip\.mp4': decoding took over 0\.2 s"):
        VideoFolder(tmp_path).open("clip.mp4", 8, 8)
