"""The Distraction protocol: what may change between the simulator's picture and the agent's."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np

from wrappers.errors import UserError
from wrappers.view import View

Split = Literal["train", "validation", "test"]
"""Which population of appearances an environment draws from; no appearance belongs to two of
them."""

SPLITS: tuple[Split, ...] = get_args(Split)

Aspect = Literal["colors", "objects", "textures", "lights", "camera", "background", "noise"]
"""What of a picture a distraction decides over; two that decide over the same cannot be combined."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
"""In the order in which combined distractions are applied."""


class Distraction(Protocol):
    """Turns a view into the picture that the agent sees.

    An episode is `reset`, `frame`, then `advance`, `frame` for every agent step. `frame` changes
    nothing, so it may be skipped (an agent that reads the state needs no picture) or repeated. All
    randomness comes from the generator handed to `reset` (the environment owns and saves it) and
    state trees hold only arrays, numbers, strings, lists and dicts, so that an episode can be
    resumed in its middle.

    Attributes:
        writes: what of the picture it decides over.
    """

    @property
    def writes(self) -> frozenset[Aspect]:
        """What of the picture it decides over."""
        ...

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw this episode's appearance and apply it to the view."""
        ...

    def advance(self, view: View) -> None:
        """Go on by one agent step."""
        ...

    def frame(self, view: View) -> np.ndarray:
        """Return the picture of the current agent step, uint8 [H, W, 3], a fresh array."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly, views excluded."""
        ...

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Continue from `state`, repainting the view where the episode had repainted it."""
        ...


class SceneChange:
    """What distractions share that change how a view draws, and leave the picture that it draws."""

    writes: ClassVar[frozenset[Aspect]]

    def advance(self, view: View) -> None:
        """Change nothing: an episode keeps its appearance."""

    def frame(self, view: View) -> np.ndarray:
        """Return the changed picture, uint8 [H, W, 3]."""
        return view.render()


def draw_seed(rng: np.random.Generator, split: Split) -> int:
    """Draw an appearance's seed from the split's own 2**32 seeds, so that splits never meet."""
    if split not in SPLITS:
        raise UserError.unknown("split", split, SPLITS)
    return (SPLITS.index(split) << 32) | int(rng.integers(1 << 32))
