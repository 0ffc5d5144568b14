"""When two trajectories count as the same behavior, and how diverse a set of them is.

A behavior is a number: `BEHAVIORS` holds functions from the vines of a rollout to theirs, and -1 where there is none to
speak of. Third parties add their own by name. Which one suits is a question about the task, not about the agent:

- `told`: what the task's `info["behavior"]` said last, such as which goal was reached. A trajectory of which nothing
  was said has no behavior and adds nothing to a set's diversity.
- `ended`: the cell of the last observation. States are cut into cells of a given width in every dimension, of pictures
  the mean colors of a 4 x 4 grid, in [0, 1].
- `visited`: the set of all cells on the way (the paper on polychromic objectives counts sets of rooms).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agents.core.rollout import Experience
from agents.core.vines import Vines

Behavior = Callable[[Experience, Vines, float], np.ndarray]
"""From a rollout, its vines and the width of a cell to behaviors, int64 [V, N]."""


def told(experience: Experience, vines: Vines, cell: float) -> np.ndarray:
    """Return the newest behavior that the task told of."""
    said = experience.extras["behavior"].cpu().numpy()
    behavior = np.full(vines.last.shape, -1, np.int64)
    for (v, n), last in np.ndenumerate(vines.last):
        spoken = said[vines.first[v] : last + 1, n]
        spoken = spoken[spoken >= 0]
        behavior[v, n] = spoken[-1] if len(spoken) else -1
    return behavior


def ended(experience: Experience, vines: Vines, cell: float) -> np.ndarray:
    """Return the number of the cell of the last observation."""
    if not vines.whole.any():
        return np.full(vines.last.shape, -1, np.int64)
    whole = torch.from_numpy(vines.whole.reshape(-1))
    cells = cells_of(experience.next_observation(vines.last_index()[whole]), cell)
    behavior = np.full(vines.last.size, -1, np.int64)
    behavior[whole.numpy()] = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    return behavior.reshape(vines.last.shape)


def visited(experience: Experience, vines: Vines, cell: float) -> np.ndarray:
    """Return the number of the set of cells on the way, the last observation's among them."""
    count = vines.last.shape[1]
    behavior, known = np.full(vines.last.shape, -1, np.int64), dict[frozenset[bytes], int]()
    for v, n in zip(*np.nonzero(vines.whole), strict=True):
        index = torch.arange(int(vines.first[v]), int(vines.last[v, n]) + 1) * count + int(n)
        before, after = experience.observation(index), experience.next_observation(index[-1:])
        seen = {name: torch.cat([before[name], after[name]]) for name in before}
        way = frozenset(row.tobytes() for row in cells_of(seen, cell))
        behavior[v, n] = known.setdefault(way, len(known))
    return behavior


def cells_of(observation: dict[str, Tensor], cell: float) -> np.ndarray:
    """Return the cells of a batch of observations, int64 [M, D]."""
    parts = []
    if "state" in observation:
        parts.append(observation["state"].float())
    if "pixels" in observation:
        newest = observation["pixels"][:, -3:].float() / 255
        parts.append(F.adaptive_avg_pool2d(newest, 4).flatten(1))
    return torch.cat(parts, dim=1).div(cell).round().long().cpu().numpy()


BEHAVIORS: dict[str, Behavior] = {"told": told, "ended": ended, "visited": visited}
"""What a behavior is, by the name that configs have."""


def diversity(behavior: np.ndarray) -> np.ndarray:
    """Return the share of different behaviors in sets, float64 [M] in [0, 1].

    Args:
        behavior: int64 [M, n]; -1 counts for nothing.
    """
    ordered = np.sort(behavior, axis=1)
    new = np.diff(ordered, axis=1, prepend=-1) > 0
    return new.sum(1) / behavior.shape[1]
