"""Distractions by name, as commands and `envs.make` know them.

A name, names joined by `+` (all at once), or a list of these joined by `,` (one of them per episode):
`color_hard`, `color_hard+camera_easy`, `clean,color_hard,video_easy+noise_easy`.

The Distracting Control Suite (Stone et al., 2021) has the levels easy, medium and hard of its authors
(scale 0.1, 0.2, 0.3) and the intensities of DMC-GB, with as many videos as these take, and all move
with every control step as in the original (DMC-GB's video: every second one); `_static` keeps video,
camera and colors as they begin. `randomized` draws all settings of the rendering anew in every
episode, as in CAD2RL (Sadeghi and Levine, 2017, arXiv:1611.04201): colors, objects, textures, light,
camera, sky and noise; that the list is complete for this renderer is the idea taken from there, the
ranges are those of the single distractions here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from wrappers.distraction import light, noise
from wrappers.distraction.base import SPLITS, Distraction, Split
from wrappers.distraction.camera import RandomCamera
from wrappers.distraction.color import EASY, HARD, ColorWalk, RandomColors
from wrappers.distraction.combination import Combination, OneOf, check_parts
from wrappers.distraction.folder import VideoFolder
from wrappers.distraction.light import RandomLight
from wrappers.distraction.noise import RandomNoise
from wrappers.distraction.surfaces import RandomObjects, RandomTextures
from wrappers.distraction.textures import ProceduralVideos
from wrappers.distraction.video import SKY, SURROUNDINGS, VideoBackground
from wrappers.errors import UserError
from wrappers.view import Part

CLEAN = "clean"
"""The name of no distraction."""

Videos = str | Path | None
"""A folder of videos or images, or None: generate them."""


@dataclass(frozen=True)
class Making:
    """What distractions are made with, beside their names."""

    split: Split = "train"
    videos: Videos = None
    control_steps: int = 1
    floor_opacity: float = 0.3


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


def _source(making: Making) -> ProceduralVideos | VideoFolder:
    if making.videos is None:
        return ProceduralVideos()
    source = find_videos(making.videos)
    source.names(making.split)  # tells of a split without videos now
    return source


def _video(hidden: frozenset[Part], making: Making) -> VideoBackground:
    return VideoBackground(_source(making), hidden, making.split)


def _suite(scale: float, videos: int, making: Making) -> Combination:
    """Return the Distracting Control Suite at a scale, with so many videos."""
    split, steps = making.split, making.control_steps
    background = VideoBackground(
        _source(making), SKY, split, count=videos, steps=steps, floor_opacity=making.floor_opacity
    )
    return Combination({
        "background": background,
        "camera": RandomCamera(scale, split, steps),
        "colors": ColorWalk(scale, split, steps),
    })  # fmt: skip


def _randomized(making: Making) -> Combination:
    # The sky alone is replaced: a video over everything would leave no texture to be seen.
    # Dark textures in the light of `light_hard` would leave nothing to be seen of the robot.
    parts = ("color_hard", "objects_easy", "textures", "light_easy", "camera_hard", "video_easy")
    split = making.split
    return Combination(
        {name: PRESETS[name](making) for name in parts}
        | {"noise": RandomNoise(0, noise.EASY, split)}
    )


Maker = Callable[[Making], Distraction]

SUITE_VIDEOS: Mapping[float, int] = MappingProxyType(
    {0.025: 2, 0.05: 2, 0.1: 4, 0.15: 6, 0.2: 8, 0.3: 60, 0.4: 60, 0.5: 60}
)
"""Intensity -> from how many videos DMC-GB's version draws; 60 are all that DAVIS has to train on."""

SUITE_LEVELS: Mapping[str, float] = MappingProxyType(
    {"easy": 0.1, "medium": 0.2, "hard": 0.3, **{f"{scale:g}": scale for scale in SUITE_VIDEOS}}
)

CAMERA_SCALES: Mapping[str, float] = MappingProxyType({"easy": 0.1, "hard": 0.3})
"""`camera_*` is the suite's camera at its authors' easiest and hardest levels, standing still."""


def _suite_makers() -> dict[str, Maker]:
    makers: dict[str, Maker] = {}
    for level, scale in SUITE_LEVELS.items():
        make = functools.partial(_suite, scale, SUITE_VIDEOS[scale])
        makers[f"dcs_{level}"] = make
        makers[f"dcs_{level}_static"] = functools.partial(_static, make)
    return makers


def _static(make: Maker, making: Making) -> Distraction:
    return make(replace(making, control_steps=0))


PRESETS: dict[str, Maker] = {
    "color_easy": lambda made: RandomColors(EASY, made.split),
    "color_hard": lambda made: RandomColors(HARD, made.split),
    "video_easy": functools.partial(_video, SKY),
    "video_hard": functools.partial(_video, SURROUNDINGS),
    "camera_easy": lambda made: RandomCamera(CAMERA_SCALES["easy"], made.split),
    "camera_hard": lambda made: RandomCamera(CAMERA_SCALES["hard"], made.split),
    "light_easy": lambda made: RandomLight(light.EASY, made.split),
    "light_hard": lambda made: RandomLight(light.HARD, made.split),
    "noise_easy": lambda made: RandomNoise(noise.EASY, noise.EASY, made.split),
    "noise_hard": lambda made: RandomNoise(noise.HARD, noise.HARD, made.split),
    "objects_easy": lambda made: RandomObjects(is_hard=False, split=made.split),
    "objects_hard": lambda made: RandomObjects(is_hard=True, split=made.split),
    "textures": lambda made: RandomTextures(made.split),
    **_suite_makers(),
    "randomized": _randomized,
}

DISTRACTIONS = tuple(PRESETS)
"""Every name but `clean`."""


def parse_name(name: str) -> list[list[str]]:
    """Return the members of a list, each as the names that it combines; clean combines none.

    >>> parse_name("clean,color_hard+camera_easy")
    [[], ['color_hard', 'camera_easy']]

    Raises:
        UserError: a name is unknown, or two cannot be combined.
    """
    members = []
    for member in str(name).split(","):
        names = [] if member == CLEAN else member.split("+")
        for part in names:
            if part not in PRESETS:
                known = DISTRACTIONS if len(names) > 1 else (CLEAN, *DISTRACTIONS)
                raise UserError.unknown("distraction", part, known)
        for place, part in enumerate(names):
            if part in names[:place]:
                raise UserError(f"distraction {part} is given twice in '{member}'; once is enough")
        check_parts({part: PRESETS[part](Making()) for part in names})
        members.append(names)
    return members


def make_distraction(
    name: str | None,
    *,
    split: Split = "train",
    videos: Videos = None,
    control_steps: int = 1,
    floor_opacity: float = 0.3,
) -> Distraction | None:
    """Return the distraction of that name, or None for None and "clean".

    >>> make_distraction("video_hard", split="test").hidden == {"sky", "floor", "walls"}
    True

    Args:
        name: one of `DISTRACTIONS`, several joined by `+`, or a list of these joined by `,`.
        split: whose colors and videos to draw; what one split shows, no other does.
        videos: where backgrounds come from; repainted scenes ignore it.
        control_steps: of the simulator per agent step, by which the Distracting Control Suite
            moves on.
        floor_opacity: how much of the floor that suite leaves before its video, in [0, 1].

    Raises:
        UserError: the name or the split is unknown, two distractions cannot be combined, or the folder has no videos,
            or none of the split.
    """
    if split not in SPLITS:
        raise UserError.unknown("split", split, SPLITS)
    if name is None or name == CLEAN:
        return None
    making = Making(split, videos, control_steps, floor_opacity)
    members = [_combined(names, making) for names in parse_name(name)]
    return OneOf(name.split(","), members) if len(members) > 1 else members[0]


def _combined(names: list[str], making: Making) -> Distraction | None:
    parts = {name: PRESETS[name](making) for name in names}
    if len(parts) > 1:
        return Combination(parts)
    return next(iter(parts.values()), None)
