"""An exponential moving average of a network's parameters, which acts in its place and is saved with the agent."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from agents.core.errors import UserError

M = TypeVar("M", bound=nn.Module)


class ParameterAverage(nn.Module, Generic[M]):
    """Keeps `module`, a copy of a network whose parameters follow the network's slowly.

    With `power` above 0 the decay grows with the number of updates n, as 1 - (1 + n)^-power up to `decay`: the average
    forgets the initialization (Diffusion Policy: power .75, decay .9999; after 10^4 updates it is .999). That is
    diffusers' count; Diffusion Policy's own is one update behind. With 0 the decay is the same throughout (DPPO: .995).
    Buffers, such as a normalizer's ranges, are copied.

    Args:
        network: it is copied, not kept.
        decay: largest share that the average keeps of itself in an update, in [0, 1).
        power: of the warm-up, at least 0.

    Raises:
        UserError: a number outside its range.
    """

    updates: Tensor

    def __init__(self, network: M, *, decay: float = 0.9999, power: float = 0.75) -> None:
        super().__init__()
        if not 0 <= decay < 1 or power < 0:
            raise UserError(
                f"an average of decay {decay} and power {power}; give a decay in [0, 1) and a power of 0 or more"
            )
        self.decay, self.power = decay, power
        self.module: M = copy.deepcopy(network).requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._count: int | None = None

    def train(self, mode: bool = True) -> ParameterAverage[M]:
        """Stay in evaluation mode: nothing is ever trained here."""
        return super().train(False)

    @property
    def current_decay(self) -> float:
        """The decay of the next update: 0 for the first one under a warm-up, which copies."""
        count = self._counted()
        if self.power == 0:
            return self.decay
        return min(self.decay, 1 - (1 + count) ** -self.power)

    @torch.no_grad()
    def update(self, network: M) -> None:
        """Move the average towards `network`."""
        share = 1 - self.current_decay
        averages: list[Tensor] = list(self.module.parameters())
        if averages:
            torch._foreach_lerp_(averages, list(network.parameters()), share)
        for average, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1
        self._count = self._counted() + 1

    def _counted(self) -> int:
        """Return the updates so far without waiting for the device at each one."""
        if self._count is None:
            self._count = int(self.updates)
        return self._count

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None
