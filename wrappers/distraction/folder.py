"""One's own videos as backgrounds: a folder of video files, of folders of frames, or of pictures.

Fits DAVIS (`JPEGImages/480p/<video>/00000.jpg`: a folder of frames is a video), RealEstate10K and
the videos of DMC-GB (a tree of mp4 files), and loose pictures (each stands still). Folders
named `Annotations` (DAVIS's masks) are left out. Files are decoded once, at the size that the agent
sees, and kept within a bound on memory.

To which split a video belongs is decided by its name alone, so that a folder may grow and no video
that was trained on ever becomes one to test on: in a subfolder `train`, `validation` or `test` it is
that one's (RealEstate10K comes so), elsewhere a hash of its path below the folder decides: give
the same folder to training and to evaluation.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import imageio_ffmpeg
import numpy as np
from PIL import Image, UnidentifiedImageError

from wrappers.distraction.base import SPLITS, Split
from wrappers.errors import UserError

MP4_FILES = frozenset((".mp4", ".m4v", ".mov"))
VIDEO_FILES = MP4_FILES | {".avi", ".webm", ".mkv", ".gif"}
IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))

MAX_FRAMES = 1000
"""Frames that are read of a video; 21 MB at 84 x 84."""

SHARES: Mapping[Split, float] = MappingProxyType({"train": 0.6, "validation": 0.2, "test": 0.2})
"""Parts of the videos that go to each split, on average."""

MAX_PROBED = 50
"""Video files whose kind tells nothing up front: up to so many are opened, 0.05 s each."""

DECODE_SECONDS = 120.0
"""For one video: 1000 frames of 1080p take 12 s on one core."""


class FrameSequence:
    """Decoded frames, uint8 [T, H, W, 3], played forth and back so that no cut is ever seen."""

    def __init__(self, frames: np.ndarray) -> None:
        self.frames = frames
        self.length = len(frames)

    def frame(self, t: int) -> np.ndarray:
        """Return frame `t`, uint8 [H, W, 3]."""
        place = t % max(1, 2 * self.length - 2)
        return self.frames[min(place, 2 * self.length - 2 - place)]


class VideoFolder:
    """The source of the videos under a folder; a video's name is its path below it.

    Args:
        folder: searched with all its subfolders.
        max_bytes: decoded videos are forgotten, the longest unused first, when they take more.

    Raises:
        UserError: the folder is missing, has no videos, or has files that cannot be videos.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 256 * 2**20) -> None:
        self.folder = Path(folder).expanduser()
        if not str(folder) or not self.folder.is_dir():
            raise UserError(f"no video folder '{folder}'; give a folder of videos or images")
        self._files = dict(sorted(_find_videos(self.folder)))
        if not self._files:
            known = " ".join(sorted(VIDEO_FILES | IMAGE_FILES))
            raise UserError(f"no videos in '{folder}'; expected files of the kinds {known}")
        _check_files(list(self._files.values()))
        self._names: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for name in self._files:
            self._names[split_of(name)].append(name)
        self._max_bytes = max_bytes
        self._opened: OrderedDict[tuple[str, int, int], FrameSequence] = OrderedDict()

    def names(self, split: Split) -> list[str]:
        """Return the names of the split's videos.

        Raises:
            UserError: it has none, which happens in small folders.
        """
        if not self._names[split]:
            raise UserError(
                f"none of the {len(self._files)} video(s) in '{self.folder}' belongs to split "
                f"'{split}': give more, about 30 fill every split, or put some into "
                f"'{self.folder / split}'"
            )
        return self._names[split]

    def empty_splits(self) -> list[Split]:
        """Return the splits without videos."""
        return [split for split in SPLITS if not self._names[split]]

    def draw(self, rng: np.random.Generator, split: Split, count: int | None = None) -> str:
        """Draw one of the split's videos, of its first `count` by name if that is given."""
        names = self.names(split)[:count]
        return names[rng.integers(len(names))]

    def open(self, name: str, height: int, width: int) -> FrameSequence:
        """Return the video, its middle cropped to the aspect ratio and averaged to the size.

        Raises:
            UserError: the video is gone or cannot be decoded.
        """
        if name not in self._files:
            raise UserError(f"no video '{name}' in '{self.folder}'; was the folder changed?")
        key = (name, height, width)
        if key not in self._opened:
            files = self._files[name]
            decode = _decode_video if files[0].suffix.lower() in VIDEO_FILES else _decode_images
            self._opened[key] = FrameSequence(decode(files, height, width))
        self._opened.move_to_end(key)
        while len(self._opened) > 1 and self._bytes() > self._max_bytes:
            self._opened.popitem(last=False)
        return self._opened[key]

    def _bytes(self) -> int:
        return sum(video.frames.nbytes for video in self._opened.values())


def split_of(name: str) -> Split:
    """Return the split of a video: the same on every machine, whatever lies beside it.

    Args:
        name: its path below the folder of videos, with forward slashes.
    """
    first, _, rest = name.partition("/")
    if rest and first in SPLITS:
        return first
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    train, validation = SHARES["train"], SHARES["validation"]
    return "train" if place < train else "validation" if place < train + validation else "test"


def _find_videos(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield name and files of every video: a video file, a loose image, a folder's frames."""
    roots = {folder, *(folder / split for split in SPLITS)}
    frames: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        kind = path.suffix.lower()
        if path.name.startswith(".") or not path.is_file():
            continue
        if "Annotations" in path.relative_to(folder).parts:  # DAVIS's masks beside its pictures
            continue
        if kind in VIDEO_FILES | IMAGE_FILES and not _is_whole(path):
            raise _broken(path, "it is empty or cut off")
        if kind in VIDEO_FILES:
            yield path.relative_to(folder).as_posix(), [path]
        elif kind in IMAGE_FILES:
            place = path if path.parent in roots else path.parent
            frames.setdefault(place, []).append(path)
    for place, files in frames.items():
        yield place.relative_to(folder).as_posix(), sorted(files, key=_in_order)


def _in_order(path: Path) -> list[str | int]:
    """Return a key that sorts frames as they were numbered: 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _is_whole(path: Path) -> bool:
    """Tell whether a file can be what it is called, from a few bytes: finds broken downloads.

    The mp4 family is a row of boxes, each led by its length; a file that was cut off lacks the end
    of one, and without `moov` nothing can be decoded. Of other kinds only emptiness is found here.
    """
    size = path.stat().st_size
    if path.suffix.lower() not in MP4_FILES:
        return size > 0
    place, kinds = 0, set()
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(16)
            if len(head) < 8:
                return False
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(head[8:16], "big")
            elif length == 0:  # up to the end of the file
                length = size - place
            kinds.add(head[4:8])
            if length < 8:
                return False
            place += length
    return place == size and b"moov" in kinds


def _check_files(videos: list[list[Path]]) -> None:
    """Look into what `_is_whole` cannot judge: a frame per folder, and videos that are few.

    Raises:
        UserError: names the first file that cannot be read.
    """
    firsts = [files[0] for files in videos]
    probed = [path for path in firsts if path.suffix.lower() in VIDEO_FILES - MP4_FILES]
    for path in probed if len(probed) <= MAX_PROBED else ():
        _decode_video([path], 8, 8, max_frames=1)
    for path in firsts:
        if path.suffix.lower() in IMAGE_FILES:
            with _naming(path), Image.open(path) as image:
                image.verify()


def _decode_video(
    files: list[Path], height: int, width: int, max_frames: int = MAX_FRAMES
) -> np.ndarray:
    """Return the video's frames, uint8 [T, H, W, 3]; ffmpeg crops and averages while it decodes."""
    crop = f"crop='min(iw,ih*{width}/{height})':'min(ih,iw*{height}/{width})'"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(files[0])]
    command += ["-vf", f"{crop},scale={width}:{height}:flags=area", "-frames:v", str(max_frames)]
    # passthrough: every frame of the file once, whatever its clock says.
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    try:
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DECODE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _broken(files[0], f"decoding took over {DECODE_SECONDS:g} s") from None
    frames = np.frombuffer(run.stdout, np.uint8)
    if run.returncode != 0 or frames.size == 0:
        lines = run.stderr.decode(errors="replace").strip().splitlines()
        raise _broken(files[0], lines[-1] if lines else "it has no frames")
    return frames.reshape(-1, height, width, 3)


def _decode_images(files: list[Path], height: int, width: int) -> np.ndarray:
    """Return images as frames, uint8 [T, H, W, 3]."""
    frames = np.empty((min(len(files), MAX_FRAMES), height, width, 3), np.uint8)
    for frame, path in zip(frames, files, strict=False):
        with _naming(path), Image.open(path) as image:
            image.draft("RGB", (2 * width, 2 * height))  # JPEG decodes faster at lower resolution
            across = min(image.width, image.height * width / height)
            down = min(image.height, image.width * height / width)
            left, top = (image.width - across) / 2, (image.height - down) / 2
            box = (left, top, left + across, top + down)
            rgb = image.convert("RGB").resize((width, height), Image.Resampling.BOX, box)
            frame[:] = np.asarray(rgb)
    return frames


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _broken(path, str(error)) from error


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"cannot read '{path}': {why}; repair the file or remove it from the folder")
