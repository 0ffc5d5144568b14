"""Distractions by name, as commands and `envs.make` know them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from wrappers.distraction.base import SPLITS, Distraction, Split
from wrappers.distraction.color import EASY, HARD, RandomColors
from wrappers.distraction.folder import VideoFolder
from wrappers.distraction.textures import ProceduralVideos
from wrappers.distraction.video import SKY, SURROUNDINGS, VideoBackground
from wrappers.errors import UserError
from wrappers.view import Part

CLEAN = "clean"
"""The name of no distraction."""

Videos = str | Path | None
"""A folder of videos or images, or None: generate them."""


def _video(hidden: frozenset[Part], split: Split, videos: Videos) -> VideoBackground:
    if videos is None:
        return VideoBackground(ProceduralVideos(), hidden, split)
    source = find_videos(videos)
    source.names(split)  # tells of a split without videos now
    return VideoBackground(source, hidden, split)


def find_videos(videos: str | Path) -> VideoFolder:
    """Return the source of a folder's videos, the same one each time in a process.

    Raises:
        UserError: see `VideoFolder`.
    """
    folder = Path(videos).expanduser()
    changed = folder.stat().st_mtime_ns if folder.is_dir() else 0
    return _shared_folder(videos, folder.resolve(), changed)


@functools.lru_cache(maxsize=4)
def _shared_folder(videos: str | Path, folder: Path, changed: int) -> VideoFolder:
    """Return the source that all environments of this process share, decoded videos included.

    The last two arguments are for the cache only: the same name may come to mean other files.
    """
    return VideoFolder(videos)


PRESETS: dict[str, Callable[[Split, Videos], Distraction]] = {
    "color_easy": lambda split, _: RandomColors(EASY, split),
    "color_hard": lambda split, _: RandomColors(HARD, split),
    "video_easy": lambda split, videos: _video(SKY, split, videos),
    "video_hard": lambda split, videos: _video(SURROUNDINGS, split, videos),
}

DISTRACTIONS = tuple(PRESETS)
"""Every name but `clean`."""


def make_distraction(
    name: str | None, *, split: Split = "train", videos: Videos = None
) -> Distraction | None:
    """Return the distraction of that name, or None for None and "clean".

    >>> make_distraction("video_hard", split="test").hidden == {"sky", "floor", "walls"}
    True

    Args:
        name: one of `DISTRACTIONS`.
        split: whose colors and videos to draw; what one split shows, no other does.
        videos: where backgrounds come from; repainted scenes ignore it.

    Raises:
        UserError: the name or the split is unknown, or the folder has no videos, or none of the split.
    """
    if split not in SPLITS:
        raise UserError.unknown("split", split, SPLITS)
    if name is None or name == CLEAN:
        return None
    if name not in PRESETS:
        raise UserError.unknown("distraction", name, (CLEAN, *DISTRACTIONS))
    return PRESETS[name](split, videos)
