"""What is acted on: `make`, `make_vec` and `list_ids` for every simulator alike.

>>> import envs
>>> env = envs.make("toy/reach", distraction="video_hard", seed=1, size=24)
>>> observation, info = env.reset()
>>> observation.shape, observation.dtype
((9, 24, 24), dtype('uint8'))

Once this package is imported, Gymnasium knows every id too: `gymnasium.make("dmc/walker-walk-v0")`.
No simulator is imported before one of its tasks is made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np

from envs import registry
from envs.environment import Environment, gymnasium_id
from envs.registry import PROTOCOLS, Protocol, TaskSpec, get_protocol, get_spec, list_ids
from envs.settings import Settings

if TYPE_CHECKING:
    from envs.vector import VectorEnv

__all__ = [
    "PROTOCOLS",
    "Environment",
    "Protocol",
    "TaskSpec",
    "get_protocol",
    "get_spec",
    "list_ids",
    "make",
    "make_vec",
    "register",
]


def make(
    id: str,
    *,
    observation: Literal["pixels", "state", "both"] = "pixels",
    distraction: str | None = None,
    seed: int | None = None,
    size: int = 84,
    frame_stack: int = 3,
    action_repeat: int | None = None,
    action_chunk: int = 1,
    quality: Literal["auto", "reference", "fast"] = "auto",
    supersample: int = 1,
    camera: str | int | Sequence[str | int] | None = None,
    side_by_side: bool = False,
    split: Literal["train", "validation", "test"] = "train",
    videos: str | PathLike[str] | None = None,
    protocol: str | None = None,
    foreground_mask: bool = False,
    episode_length: int | None = None,
    end_at_success: bool = False,
    render_mode: Literal["rgb_array"] | None = "rgb_array",
) -> Environment:
    """Return one environment.

    Args:
        id: `family/task`, one of `list_ids()` or `gym/` and any registered Gymnasium id.
        observation: `pixels`, uint8 [3 * frame_stack, size, size], RGB of the oldest frame first;
            `state`, float32 [D]; or `both`, a dict of them.
        distraction: None or `clean` for none; a name (`color_hard`, `video_easy`, `camera_hard`,
            `dcs_medium`, ...: `wrappers.distraction.presets.DISTRACTIONS`), names joined by `+` for
            all at once, or a list of these joined by `,`, of which every episode draws one.
        seed: of the first `reset()`; None draws one, which `settings` tells. `reset(seed=)` goes
            before it.
        size: height and width of a camera's picture in pixels.
        frame_stack: pictures per observation.
        action_repeat: control steps per action; None is the protocol's, else the task's usual one.
        action_chunk: actions per agent step; above 1 an action is [chunk, A], the reward the sum, and
            only what is seen after the last one is drawn.
        quality: `reference` draws exactly what the simulator's own renderer draws, `fast` the same
            scene without shadows, reflections and multisampling; `auto` is `fast` where GL runs in
            software.
        supersample: draw this many times larger in both directions and average: antialiasing, which
            `fast` lacks. At 48 pixels a factor of 4 doubles the time that a picture takes.
        camera: its name or number, or several; None is the protocol's, else the task's usual one.
        side_by_side: several cameras are one picture "pixels", as many times wider, the first one on
            the left, which is what agents learn from; otherwise a Dict of pictures by the camera's
            name, its number as text where that was given.
        split: which colors and videos to draw from; no two splits share any.
        videos: folder of videos or images for the video distractions; None generates them.
        protocol: `dmc-gb`, `drqv2` or `planet`, see `Protocol`; fixes size, stack, action repeat,
            camera.
        foreground_mask: also put `info["foreground"]`, bool [size, width], where neither sky, floor
            nor walls are seen, of several cameras side by side.
        episode_length: control steps until `truncated`; None is the task's own.
        end_at_success: the first control step in which the task is solved ends the episode: `terminated`.
        render_mode: `rgb_array`, the only one; for `gymnasium.make`.

    Returns:
        The environment. Its actions are float32 in [-1, 1], or discrete. `settings` holds these
        arguments with nothing left open; `make(**env.settings)` makes the same environment.

    Raises:
        UserError: one line about the first argument that cannot be used.
    """
    del render_mode
    settings = Settings(
        id=id,
        observation=observation,
        distraction=distraction,
        seed=seed,
        size=size,
        frame_stack=frame_stack,
        action_repeat=action_repeat,
        action_chunk=action_chunk,
        quality=quality,
        supersample=supersample,
        camera=camera,  # type: ignore[arg-type]  # its settings make any sequence a tuple
        side_by_side=side_by_side,
        split=split,
        videos=None if videos is None else str(videos),
        protocol=protocol,
        foreground_mask=foreground_mask,
        episode_length=episode_length,
        end_at_success=end_at_success,
    )
    return Environment(settings.resolved())


def make_vec(
    id: str,
    num_envs: int,
    *,
    workers: int = 0,
    timeout: float = 60.0,
    imports: Sequence[str] = (),
    **settings: Any,
) -> VectorEnv:
    """Return `num_envs` environments of one task as a vector environment.

    Args:
        id: as for `make`.
        num_envs: how many.
        workers: processes that share them; 0 keeps all in this one. The results do not depend on
            it.
        timeout: seconds after which a worker that does not answer is replaced.
        imports: names of modules that every worker imports first, such as one that registers tasks
            with Gymnasium.
        **settings: the other arguments of `make`.

    Returns:
        The vector environment. `reset(seed=)` seeds every environment differently; without it
        `seed` counts.
    """
    from envs.vector import VectorEnv

    resolved = Settings(id=id, **settings).resolved()
    # The children that `reset(seed=)` of a vector environment gives, so that both mean the same.
    seeds = [np.random.SeedSequence(resolved.seed, spawn_key=(i, 0)) for i in range(num_envs)]
    each = (replace(resolved, seed=int(seed.generate_state(1)[0])) for seed in seeds)
    factories = [functools.partial(_build, tuple(imports), own, get_spec(id)) for own in each]
    return VectorEnv(factories, workers=workers, timeout=timeout, seed=resolved.seed)


def _build(imports: Sequence[str], settings: Settings, spec: TaskSpec) -> Environment:
    """Return an environment, in a process that may have imported nothing yet."""
    for name in imports:
        importlib.import_module(name)
    return Environment(settings, spec)


def register(id: str, adapter: registry.Adapter, **settings: Any) -> TaskSpec:
    """Add a task of your own, see `registry.register`, and tell Gymnasium about it."""
    spec = registry.register(id, adapter, **settings)
    _tell_gymnasium(spec.id)
    return spec


def _tell_gymnasium(id: str) -> None:
    gymnasium.register(gymnasium_id(id), entry_point="envs:make", kwargs={"id": id})


for _id in list_ids():
    _tell_gymnasium(_id)
