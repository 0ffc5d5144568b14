"""One seed, independent children: environments, agent, replay and evaluation never share a stream."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from agents.core.errors import UserError

STREAMS = ("environment", "agent", "replay", "evaluation", "exploration")


def spawn_seeds(seed: int | None) -> tuple[int, dict[str, int]]:
    """Return the run's seed (drawn when None) and one child seed for every stream in `STREAMS`.

    Raises:
        UserError: the seed is negative.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().entropy) % 2**31  # type: ignore[arg-type]
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")
    return seed, child_seeds(seed, STREAMS)


def child_seeds(seed: int, names: Sequence[str]) -> dict[str, int]:
    """Return one independent seed for every name; what a name gets depends on its place alone."""
    children = np.random.SeedSequence(seed).spawn(len(names))
    return {
        name: int(child.generate_state(1)[0]) for name, child in zip(names, children, strict=True)
    }


def rank_seed(seed: int, rank: int) -> int:
    """Return one of several processes' own seed (see `ranks`); the first one's is `seed` itself."""
    return seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def seed_libraries(seed: int) -> None:
    """Seed the global generators that libraries use (weight initialization); agents own theirs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code may draw from the global generator
    torch.manual_seed(seed)
