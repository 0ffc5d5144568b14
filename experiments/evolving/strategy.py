"""Evolution strategies: climb the mean fitness of a cloud of weights (Salimans et al. 2017, arXiv:1703.03864).

Differences from the paper: Adam takes the steps, as in the implementation that the drift's authors used (evosax's
OpenES), and there is no weight decay. Random numbers depend on the seed and the generation's number only, so that what
must be saved is the mean and Adam's moments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def centered_ranks(fitness: Tensor) -> Tensor:
    """Return ranks scaled to [-0.5, 0.5], float32 [P]; equal fitness shares its mean rank.

    Without the sharing, members that do the same would be told apart by their place in the population.

    Args:
        fitness: float [P], at least 2; NaN is worst.
    """
    values = torch.nan_to_num(fitness.double(), nan=-torch.inf, neginf=-torch.inf)
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    rank = below + (equal - 1) / 2
    return (rank / (len(fitness) - 1) - 0.5).float()


class EvolutionStrategy:
    """A mean in weight space, and what it takes to move it.

    Args:
        mean: float32 [D], the first mean.
        population: members of a generation, even: each has a twin on the other side of the mean.
        spread: standard deviation of the members around the mean.
        learning_rate: Adam step size.
        seed: of all generations.

    Attributes:
        mean: float32 [D].
        generation: how many were told.
    """

    def __init__(
        self, mean: Tensor, *, population: int, spread: float, learning_rate: float, seed: int
    ) -> None:
        if population < 2 or population % 2:
            raise ValueError(f"the population is {population}; twins need an even number")
        self.mean = mean.clone()
        self.population, self.spread, self.seed = population, spread, seed
        self.generation = 0
        self._optimizer = torch.optim.Adam([self.mean], lr=learning_rate)

    def ask(self) -> Tensor:
        """Return this generation's members [P, D]: P / 2, then their twins."""
        steps = self.spread * self._directions()
        return torch.cat([self.mean + steps, self.mean - steps])

    def tell(self, fitness: Tensor) -> None:
        """Move the mean and begin the next generation.

        Args:
            fitness: float [P], more is better; only its order counts.
        """
        ours, twins = centered_ranks(fitness).chunk(2)
        climb = (ours - twins) @ self._directions() / (self.population * self.spread)
        self.mean.grad = -climb
        self._optimizer.step()
        self.generation += 1

    def _directions(self) -> Tensor:
        """Return standard normal directions [P / 2, D], this generation's own."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.generation,))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        return torch.randn(self.population // 2, len(self.mean), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly."""
        return {
            "mean": self.mean.clone(),
            "generation": self.generation,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.mean.copy_(state["mean"])
        self.generation = state["generation"]
        self._optimizer.load_state_dict(state["optimizer"])
