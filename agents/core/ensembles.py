"""Many action values at once: members of one shape share a matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.networks import ReLU, initialize


class MemberLinear(nn.Module):
    """A linear layer of each of E members, initialized as `networks.initialize` does.

    Args:
        members: E.
        inputs: features that go in.
        outputs: features that come out.
        norm: with a layer normalization behind it, also each member's own.
    """

    def __init__(self, members: int, inputs: int, outputs: int, *, norm: bool) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, outputs) for _ in range(members)]
        for layer in layers:
            initialize(layer)
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        self.scale = nn.Parameter(torch.ones(members, 1, outputs)) if norm else None
        self.shift = nn.Parameter(torch.zeros(members, 1, outputs)) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [E, B, inputs] to [E, B, outputs]."""
        y = torch.baddbmm(self.bias, x, self.weight)
        if self.scale is None or self.shift is None:
            return y
        return F.layer_norm(y, y.shape[-1:]) * self.scale + self.shift


class QEnsemble(nn.Module):
    """E independent Q functions over (trunk output, action): linear, layer normalization, ReLU, and so on.

    Args:
        features: length of the trunk's output.
        action: numbers of an action.
        hidden: widths of the hidden layers.
        members: E.
    """

    def __init__(self, features: int, action: int, hidden: Sequence[int], *, members: int) -> None:
        super().__init__()
        sizes = [features + action, *hidden, 1]
        layers: list[nn.Module] = []
        for index in range(len(sizes) - 1):
            is_last = index == len(sizes) - 2
            layers.append(MemberLinear(members, sizes[index], sizes[index + 1], norm=not is_last))
            if not is_last:
                layers.append(ReLU())
        self.layers = nn.Sequential(*layers)
        self.members = members

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """Return every member's values, float32 [E, B]."""
        x = torch.cat([features, action], dim=1)
        return self.layers(x.expand(self.members, -1, -1)).squeeze(-1)


def subset_minimum(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the smallest of `count` members drawn at random, the same for the whole batch (REDQ, algorithm 1).

    Args:
        values: [E, B].
        count: members that are compared; all of them where there are fewer.
        generator: draws them.

    Returns:
        float32 [B].
    """
    order = torch.randperm(len(values), generator=generator, device=values.device)
    return values[order[:count]].amin(0)
