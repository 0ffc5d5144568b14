"""What `envs.make` returns: a task, what an agent sees of it, and how to make it again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from envs.experts import Expert, scripted_expert
from envs.registry import TaskSpec, get_spec
from envs.settings import Settings
from wrappers.distraction.presets import make_distraction
from wrappers.pixels import Pixels


class Environment(Pixels):
    """A task seen through `Pixels`, with the settings that make it again.

    Attributes:
        settings: the arguments of `envs.make` with nothing left open; JSON can hold them.
    """

    def __init__(self, settings: Settings, spec: TaskSpec | None = None) -> None:
        """Build the task from settings that are `resolved`.

        Args:
            settings: what was asked for.
            spec: of the task, for a process in which nobody has registered it.

        Raises:
            UserError: chunks of actions are longer than episodes, or there is no such camera.
        """
        spec = spec or get_spec(settings.id)
        adapter = spec.build(settings.episode_length)
        settings.check_chunk(getattr(adapter, "episode_length", None))  # now a task's own is known
        is_seen = (
            settings.observation != "state"
            or settings.foreground_mask
            or settings.distraction is not None
            or settings.camera is not None
        )
        if settings.camera is None:
            settings = replace(settings, camera=getattr(adapter, "default_camera", None))
        assert settings.action_repeat is not None
        assert settings.quality != "auto"
        super().__init__(
            adapter,
            observation=settings.observation,
            size=settings.size,
            frame_stack=settings.frame_stack,
            action_repeat=settings.action_repeat,
            action_chunk=settings.action_chunk,
            quality=settings.quality,
            supersample=settings.supersample,
            camera=settings.camera,
            side_by_side=settings.side_by_side,
            distraction=make_distraction(
                settings.distraction,
                split=settings.split,
                videos=settings.videos,
                control_steps=settings.action_repeat,
                floor_opacity=spec.floor_opacity,
            ),
            foreground_mask=settings.foreground_mask,
            end_at_success=settings.end_at_success,
        )
        self.settings = settings.as_dict()
        self._first_seed = settings.seed
        self._script: Expert | None = None
        if is_seen:
            _ = self.view  # tells of an unknown camera now; GL is not touched yet
        if adapter.spec is None:
            adapter.spec = EnvSpec(
                gymnasium_id(settings.id), entry_point="envs:make", kwargs=self.settings
            )

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]  # as in Gymnasium's own wrappers
        """How Gymnasium makes this environment again: all of it, so that no wrapper is listed."""
        return self.unwrapped.spec

    def scripted_action(self) -> np.ndarray:
        """Return what the task's script would do next, an action of this environment's space.

        Raises:
            UserError: the task has none.
        """
        if self._script is None:
            self._script = scripted_expert(self.settings["id"])
        return self.foreseen(self._script)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the first one without a seed of its own takes the environment's."""
        if seed is None:
            seed = self._first_seed
        self._first_seed = None
        return super().reset(seed=seed, options=options)

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which an environment of the same settings gave."""
        super().set_state(state)
        self._first_seed = None


def gymnasium_id(id: str) -> str:
    """Return the name under which Gymnasium knows `id`: with a version, `-v0` where it has none."""
    family, _, task = id.partition("/")
    task = task.replace("/", "-")  # Gymnasium allows one namespace only
    return f"{family}/{task}" if re.search(r"-v\d+$", task) else f"{family}/{task}-v0"
