"""A recurrent memory: gated recurrent units over stretches of steps (Cho et al. 2014, https://arxiv.org/abs/1406.1078).

A batch is a row of steps in which stretches follow one another: the consecutive steps of one environment within one
episode. Each goes on from the memory that acting had where it begins, so an episode's end needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """Features of each step to a memory of all the steps before.

    Weights are orthogonal and biases 0, as in Huang et al. 2022 ("The 37 implementation details of PPO").

    Args:
        features: length of what each step brings.
        size: units.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.gru = nn.GRU(features, size)
        for name, parameter in self.gru.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:  # three gates, one above the other
                for gate in parameter.data.chunk(3):
                    nn.init.orthogonal_(gate)

    def forward(
        self, features: Tensor, memory: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Return the memory after each step, [B, size].

        Args:
            features: [B, features], stretch after stretch, each in the order of time.
            memory: [S, size], before the first step of each stretch; None at the starts of episodes.
            lengths: int64 [S] on the CPU, steps of each stretch, B in all; None where each has one.
        """
        stretches = len(features) if lengths is None else len(lengths)
        if memory is None:
            memory = features.new_zeros(stretches, self.size)
        if lengths is None or stretches == len(features):
            return self.gru(features[None], memory[None])[0][0]
        stretch = torch.repeat_interleave(torch.arange(stretches), lengths)
        place = torch.arange(len(features)) - (lengths.cumsum(0) - lengths)[stretch]
        longest = int(lengths.max())
        # Shorter stretches are filled up with zeros behind their ends, where nobody looks.
        at = (place * stretches + stretch).to(features.device)
        padded = features.new_zeros(longest * stretches, features.shape[1]).index_copy(
            0, at, features
        )
        after = self.gru(padded.view(longest, stretches, -1), memory[None])[0]
        return after.flatten(0, 1).index_select(0, at)
