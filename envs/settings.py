"""What a user asks of an environment, checked and completed before anything is built."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from envs.registry import TaskSpec, get_protocol, get_spec
from envs.rendering import resolve_quality
from wrappers.distraction.base import SPLITS, Split
from wrappers.distraction.presets import find_videos, parse_name
from wrappers.errors import UserError
from wrappers.view import Part

Observation = Literal["pixels", "state", "both"]
_REPLACED: dict[str, set[Part]] = {"video_easy": {"sky"}, "video_hard": {"sky", "floor", "walls"}}
"""What video distractions replace: a task without it stays as it is."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `envs.make`, which describes them."""

    id: str
    observation: Observation = "pixels"
    distraction: str | None = None
    seed: int | None = None
    size: int = 84
    frame_stack: int = 3
    action_repeat: int | None = None
    action_chunk: int = 1
    quality: Literal["auto", "reference", "fast"] = "auto"
    supersample: int = 1
    camera: str | int | tuple[str | int, ...] | None = None
    side_by_side: bool = False
    split: Split = "train"
    videos: str | None = None
    protocol: str | None = None
    foreground_mask: bool = False
    episode_length: int | None = None
    end_at_success: bool = False

    def __post_init__(self) -> None:
        """Write cameras in one way: several as a tuple, though JSON has lists, and a single one as itself."""
        if isinstance(self.camera, list | tuple):
            one_or_several = self.camera[0] if len(self.camera) == 1 else tuple(self.camera)
            object.__setattr__(self, "camera", one_or_several)

    def resolved(self) -> Settings:
        """Return these settings without anything left open, so that they always mean the same.

        Raises:
            UserError: for the first argument that cannot be used.
        """
        spec = get_spec(self.id)
        self._check()
        settings = self._with_protocol(spec)
        seed = np.random.SeedSequence().generate_state(1)[0] if self.seed is None else self.seed
        settings = replace(
            settings,
            seed=int(seed),
            quality=settings._resolved_quality(spec),
            distraction=None if self.distraction == "clean" else self.distraction,
            # Absolute: a run may be resumed and evaluated from another folder.
            videos=str(Path(self.videos).expanduser().resolve()) if self.videos else self.videos,
            action_repeat=settings.action_repeat or spec.action_repeat,
            camera=spec.camera if settings.camera is None else settings.camera,
            side_by_side=self.side_by_side and self._shows_several,
            episode_length=settings.episode_length or spec.episode_length,
        )
        settings._warn_if_nothing_changes(spec)
        settings.check_chunk(settings.episode_length)
        settings._check_success(spec)
        settings._check_videos()
        return settings

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as `envs.make` takes them and JSON can hold them."""
        settings = asdict(self)
        if isinstance(self.camera, tuple):
            settings["camera"] = list(self.camera)
        if (
            not self.side_by_side
        ):  # as older versions, whose settings are compared with these, wrote them
            del settings["side_by_side"]
        return settings

    @property
    def _shows_several(self) -> bool:
        """Whether an observation shows several cameras."""
        return isinstance(self.camera, tuple) and self.observation != "state"

    def _check(self) -> None:
        _one_of("observation", self.observation, get_args(Observation))
        _one_of("quality", self.quality, ("auto", "reference", "fast"))
        _one_of("split", self.split, SPLITS)
        if self.distraction is not None:
            parse_name(self.distraction)
        _whole_number("size", self.size, 8, 4096)
        _whole_number("frame_stack", self.frame_stack, 1, 64)
        _whole_number("supersample", self.supersample, 1, 16)
        _whole_number("action_chunk", self.action_chunk, 1, 1000)
        for name in ("action_repeat", "episode_length"):
            if getattr(self, name) is not None:
                _whole_number(name, getattr(self, name), 1, 1_000_000_000)
        if self.seed is not None:
            _whole_number("seed", self.seed, 0, 2**63 - 1)
        self._check_cameras()

    def _check_cameras(self) -> None:
        """Refuse what names no camera, and cameras that are named twice."""
        cameras = self.camera if isinstance(self.camera, tuple) else (self.camera,)
        if self.camera is None:
            return
        for camera in cameras:
            if isinstance(camera, bool) or not isinstance(camera, str | int):
                raise UserError(f"camera is {camera!r}; expected a camera's name or number")
        if not cameras:
            raise UserError("camera is empty; expected the name or number of at least one")
        names = [str(camera) for camera in cameras]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"camera '{name}' is given twice; give each once")
            if len(names) > 1 and name in ("pixels", "state"):
                raise UserError(
                    f"camera '{name}' has the name of another part of an observation; give its number"
                )

    def check_chunk(self, episode_length: int | None) -> None:
        """Refuse chunks whose last actions no episode ever takes.

        Args:
            episode_length: control steps of an episode; None where it has no limit, or a task's own is not known yet.

        Raises:
            UserError: says how many actions there are.
        """
        if episode_length is None or self.action_chunk == 1:
            return
        repeat = self.action_repeat or 1
        actions = -(-episode_length // repeat)
        if self.action_chunk > actions:
            raise UserError(
                f"action_chunk is {self.action_chunk}, but an episode of {self.id} ends after {actions} actions "
                f"({episode_length} control steps, {repeat} to an action); give at most {actions}, or a longer "
                "episode_length"
            )

    def _check_success(self, spec: TaskSpec) -> None:
        """Refuse to wait for a success that the task does not tell."""
        if self.end_at_success and not spec.may_tell_success:
            raise UserError(
                f"end_at_success: {self.id} does not tell whether it is solved; leave it out"
            )

    def _check_videos(self) -> None:
        """Look into the folder of videos, used or not: an evaluation may want it hours later."""
        if self.videos is None:
            return
        empty = find_videos(self.videos).empty_splits()
        if empty and self.split == "train":
            warnings.warn(
                f"no video in '{self.videos}' belongs to split {' or '.join(map(repr, empty))}, so that nothing can "
                f"be drawn from there: give more, about 30 fill every split, or put some into '{empty[0]}/'",
                stacklevel=4,
            )

    def _with_protocol(self, spec: TaskSpec) -> Settings:
        """Return the settings with what the protocol fixes; contradicting it is an error."""
        if self.protocol is None:
            return self
        protocol = get_protocol(self.protocol, spec)
        fixed: dict[str, Any] = {
            "size": protocol.size,
            "frame_stack": protocol.frame_stack,
            "supersample": 1,
            "action_repeat": protocol.action_repeat_of(spec),
            "camera": protocol.camera_of(spec),
        }
        for name, value in fixed.items():
            given = getattr(self, name)
            if given is not None and value is not None and given != value:
                shown = " ".join(map(str, given)) if isinstance(given, tuple) else given
                raise UserError(
                    f"{name} is {shown}, but protocol '{self.protocol}' fixes {value} for "
                    f"{self.id}; leave out {name} or the protocol"
                )
        return replace(self, **{name: value for name, value in fixed.items() if value is not None})

    def _resolved_quality(self, spec: TaskSpec) -> Literal["reference", "fast"]:
        draws_itself = spec.family == "gym" and spec.background == frozenset()
        if self.quality == "auto" and (spec.family == "toy" or draws_itself):
            return "reference"  # drawn without GL, which need not be there
        try:
            return resolve_quality(self.quality)
        except UserError:
            if self.observation == "state":
                return "reference"  # nothing is to be drawn
            raise

    def _warn_if_nothing_changes(self, spec: TaskSpec) -> None:
        """Warn where the usual camera shows nothing of what the distraction changes."""
        if self.distraction is None or spec.background is None or self.camera != spec.camera:
            return
        names = [name for member in parse_name(self.distraction) for name in member]
        for name in dict.fromkeys(names):
            missing = _missing(name, spec)
            if missing:
                warnings.warn(
                    f"{name} changes no pixel of {self.id}: its picture {missing}; "
                    "choose another distraction or camera",
                    stacklevel=4,
                )


def _missing(name: str, spec: TaskSpec) -> str | None:
    """Return what a task's picture lacks of what a distraction changes, None if it has it."""
    background = spec.background or frozenset()
    kind = name.partition("_")[0]
    if kind in ("noise", "randomized"):
        return None
    if kind == "video" and not background & _REPLACED[name]:
        return f"shows no {' or '.join(sorted(_REPLACED[name]))}"
    if kind == "objects" and spec.objects is False:
        return "shows no objects but the robot"
    if kind == "textures" and spec.textures is False:
        return "has no textures"
    if kind in ("camera", "light") and not background:
        return f"has no {kind}"
    return None if background else "has fixed colors"


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError.unknown(name, str(value), known)


def _whole_number(name: str, value: Any, low: int, high: int) -> None:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not low <= value <= high:
        raise UserError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
