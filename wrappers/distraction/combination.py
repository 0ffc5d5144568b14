"""Several distractions at once, and one of several per episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wrappers.distraction.base import ASPECTS, Aspect, Distraction
from wrappers.distraction.noise import RandomNoise
from wrappers.errors import UserError
from wrappers.view import View, undress


class Combination:
    """Applies several distractions to one picture.

    They are applied in the order of `ASPECTS`: colors, objects, textures, lights, camera, then the
    background behind all that, and noise over everything. The order in which they are given
    changes nothing. Each draws from a generator of its own.

    Args:
        parts: distractions by name; no two may write the same aspect.

    Raises:
        UserError: two do.
    """

    def __init__(self, parts: Mapping[str, Distraction]) -> None:
        check_parts(parts)
        order = sorted(parts, key=lambda name: (min(map(ASPECTS.index, parts[name].writes)), name))
        self.parts = {name: parts[name] for name in order}
        self._drawing: Distraction | None = None
        self._noise: list[RandomNoise] = []
        for part in self.parts.values():
            if "background" in part.writes:
                self._drawing = part
            elif isinstance(part, RandomNoise):
                self._noise.append(part)

    @property
    def writes(self) -> frozenset[Aspect]:
        """What of the picture its parts decide over."""
        return frozenset().union(*(part.writes for part in self.parts.values()))

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Begin an episode of every part, each with a generator of its own."""
        for part in self.parts.values():
            part.reset(view, np.random.default_rng(rng.integers(2**63)))

    def advance(self, view: View) -> None:
        """Go on by one agent step."""
        for part in self.parts.values():
            part.advance(view)

    def frame(self, view: View) -> np.ndarray:
        """Return the picture that all parts have changed, uint8 [H, W, 3]."""
        picture = view.render() if self._drawing is None else self._drawing.frame(view)
        for noise in self._noise:
            picture = noise.touch_up(picture)
        return picture

    def get_state(self) -> dict[str, Any]:
        """Return the states of all parts by name."""
        return {name: part.get_state() for name, part in self.parts.items()}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Continue every part from `state`."""
        for name, part in self.parts.items():
            part.set_state(view, state[name])


class OneOf:
    """Draws one of several distractions per episode, each as likely as the others.

    Args:
        names: how the members are called.
        members: as many distractions; None is the clean picture.
    """

    def __init__(self, names: Sequence[str], members: Sequence[Distraction | None]) -> None:
        self.names, self.members = list(names), list(members)
        self.current = 0

    @property
    def writes(self) -> frozenset[Aspect]:
        """What of the picture any member decides over."""
        return frozenset().union(*(member.writes for member in self.members if member is not None))

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw the episode's distraction and begin it on an unchanged view."""
        self.current = int(rng.integers(len(self.members)))
        undress(view)
        if (member := self._member) is not None:
            member.reset(view, rng)

    def advance(self, view: View) -> None:
        """Go on by one agent step."""
        if (member := self._member) is not None:
            member.advance(view)

    def frame(self, view: View) -> np.ndarray:
        """Return the picture of the episode's distraction, uint8 [H, W, 3]."""
        member = self._member
        return view.render() if member is None else member.frame(view)

    def get_state(self) -> dict[str, Any]:
        """Return which distraction the episode has, by number and name, and its state."""
        state = {} if self._member is None else self._member.get_state()
        return {"number": self.current, "name": self.names[self.current], "state": state}

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Continue the distraction of `state`."""
        self.current = state["number"]
        undress(view)
        if (member := self._member) is not None:
            member.set_state(view, state["state"])

    @property
    def _member(self) -> Distraction | None:
        return self.members[self.current]


def check_parts(parts: Mapping[str, Distraction]) -> None:
    """Check that no two parts write the same.

    Raises:
        UserError: names the two.
    """
    writers: dict[Aspect, str] = {}
    for name, part in parts.items():
        for aspect in sorted(part.writes, key=ASPECTS.index):
            if aspect in writers:
                raise UserError(
                    f"distractions {writers[aspect]} and {name} cannot be combined: both change "
                    f"the {aspect}; leave one of them out"
                )
            writers[aspect] = name
