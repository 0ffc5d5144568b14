"""The Distraction protocol: what may change between the simulator's picture and the agent's."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from wrappers.view import View


class Distraction(Protocol):
    """Turns a view into the picture that the agent sees.

    `reset` begins an episode, `frame` is called once per agent step. All randomness comes from the generator
    handed to `reset` (the environment owns and saves it) and state trees hold only arrays, numbers, strings,
    lists and dicts, so that an episode can be resumed in its middle.
    """

    def reset(self, view: View, rng: np.random.Generator) -> None:
        """Draw this episode's appearance and apply it to the view."""
        ...

    def frame(self, view: View) -> np.ndarray:
        """Return the picture of the current agent step, uint8 [H, W, 3], and advance by one."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly, views excluded."""
        ...

    def set_state(self, view: View, state: dict[str, Any]) -> None:
        """Continue from `state`, repainting the view where the episode had repainted it."""
        ...
