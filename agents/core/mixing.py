"""Demonstrations in every batch of a replay: a fixed share, drawn apart from what the agent has done itself.

Half of each batch is the symmetric sampling of RLPD (Ball et al. 2023, https://arxiv.org/abs/2302.02948) and of ResFiT.
The demonstrations are a replay of their own, so that both give the same n-step returns of the same stacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.core.errors import UserError
from agents.core.replay import Batch, Replay

FOREIGN = -1
"""The id of demonstrated transitions in a batch: `Replay.write` leaves it alone."""


class Mixture:
    """Batches of two replays.

    Args:
        demonstrations: filled, and never added to.
        share: of a batch that comes from them, in [0, 1]; it is rounded to whole transitions.
        digest: tells what they hold from other data.

    Raises:
        UserError: the share is none.
    """

    def __init__(self, demonstrations: Replay, share: float, digest: str) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"demonstration_share is {share}; give a number in [0, 1]")
        self.demonstrations, self.share, self.digest = demonstrations, share, digest

    def sample(self, replay: Replay, batch_size: int, *, n_step: int, discount: float) -> Batch:
        """Return a batch whose last `round(share * batch_size)` transitions are demonstrated; see `Replay.sample`."""
        count = round(self.share * batch_size)
        steps: dict[str, Any] = {"n_step": n_step, "discount": discount}
        if count == 0:
            return replay.sample(batch_size, **steps)
        shown = self.demonstrations.sample(count, **steps)
        shown.ids.fill_(FOREIGN)
        if count == batch_size:
            return shown
        return joined(replay.sample(batch_size - count, **steps), shown)

    def get_state(self) -> dict[str, Any]:
        """Return the generator's state and the digest; the rows are the data set's."""
        return {"generator": self.demonstrations.generator_state, "digest": self.digest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on drawing from `get_state`'s state.

        Raises:
            UserError: it was saved with other demonstrations.
        """
        if state["digest"] != self.digest:
            raise UserError(
                "the demonstrations are not those that the run began with: a data set was replaced or cut; put it "
                "back, or begin a new run"
            )
        self.demonstrations.generator_state = state["generator"]


def joined(first: Batch, second: Batch) -> Batch:
    """Return the transitions of two batches with the same fields, one behind the other."""

    def both(left: Any, right: Any) -> Any:
        if isinstance(left, Tensor):
            return torch.cat([left, right])
        return {name: both(part, right[name]) for name, part in left.items()}

    return Batch(**{name: both(part, getattr(second, name)) for name, part in vars(first).items()})


def add_episode(
    replay: Replay,
    observation: Mapping[str, np.ndarray],
    action: np.ndarray,
    reward: np.ndarray,
    terminated: bool,
) -> None:
    """Put a whole episode of T actions into a replay of one environment, in T + 1 rows, or T + 2 if it truly ended.

    Args:
        replay: gets it.
        observation: by name, [T + 1, ...]; of pictures the newest one, uint8 [T + 1, 3, H, W].
        action: [T, A].
        reward: float [T].
        terminated: the last action truly ended it; otherwise its last observation is bootstrapped from.
    """

    def row(t: int, depth: int = 1) -> dict[str, np.ndarray]:
        rows = {name: values[t : t + 1] for name, values in observation.items()}
        return {n: np.tile(v, (1, depth, 1, 1)) if v.ndim == 4 else v for n, v in rows.items()}

    first = row(0, replay.frame_stack)  # an episode begins with one picture, repeated
    never, last = np.zeros(1, bool), len(action) - 1
    replay.start(first)
    for t in range(len(action)):
        step = action[t : t + 1], reward[t : t + 1]
        if terminated and t == last:
            replay.add(*step, ~never, never, first, row(t + 1))
        else:
            replay.add(*step, never, never, row(t + 1))
