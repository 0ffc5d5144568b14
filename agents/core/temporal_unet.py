"""The conditional 1-D U-Net over action chunks of Diffusion Policy (Chi et al. 2023, arXiv:2303.04137).

Convolutions run along the steps of a chunk; time and condition shift (and scale) the channels of every block (FiLM).
Normalization is by groups, never by batch: running statistics and an average of the parameters do not go together.

**Differences from the paper's code:** every resolution but the lowest hands its features to the way up (there, the
finest one's are computed and dropped, and the lowest one's are used twice), the length of a chunk need not be divisible
by 2^(levels - 1), and the number of groups is lowered to a divisor of the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from agents.core.denoisers import TimeEmbedding
from agents.core.errors import UserError
from agents.core.packed_convolutions import Convolution, Doubling


class _ConvolutionBlock(nn.Sequential):
    """Convolution, group normalization, Mish."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int) -> None:
        super().__init__(
            Convolution(inputs, outputs, kernel, padding=kernel // 2),
            nn.GroupNorm(math.gcd(groups, outputs), outputs),
            nn.Mish(),
        )


class _FiLMBlock(nn.Module):
    """Two convolutions around a residual, with the channels between them modulated by the condition."""

    def __init__(
        self, inputs: int, outputs: int, condition: int, kernel: int, groups: int, *, scale: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.first = _ConvolutionBlock(inputs, outputs, kernel, groups)
        self.second = _ConvolutionBlock(outputs, outputs, kernel, groups)
        self.modulation = nn.Sequential(
            nn.Mish(), nn.Linear(condition, outputs * (2 if scale else 1))
        )
        self.residual = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map features [B, inputs, H] under a condition [B, condition] to [B, outputs, H]."""
        features = self.first(x)
        modulation = self.modulation(condition).unsqueeze(-1)
        if self.scale:
            scale, shift = modulation.chunk(2, dim=1)
            # Diffusion Policy multiplies by `scale` itself, which starts near 0; so a block starts near the identity.
            features = (1 + scale) * features + shift
        else:
            features = features + modulation
        return self.second(features) + self.residual(x)


class UNetDenoiser(nn.Module):
    """Denoises chunks [B, H, A] of any H; see the module, and `denoisers` for its inputs.

    Args:
        action: A.
        condition: C, or 0 without.
        widths: channels at each resolution, each half as long as the one before (Diffusion Policy: 256, 512, 1024 from
            states, 512, 1024, 2048 from pixels).
        kernel: taps of a convolution, odd.
        groups: of the normalization.
        time_features: length of the time embedding (128 from pixels, 256 from states).
        scale: whether the condition scales channels beside shifting them (from pixels).
    """

    def __init__(
        self,
        action: int,
        condition: int,
        *,
        widths: Sequence[int] = (256, 512, 1024),
        kernel: int = 5,
        groups: int = 8,
        time_features: int = 256,
        scale: bool = True,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or not widths:
            raise UserError(
                f"a U-Net of kernel {kernel} and widths {tuple(widths)}; give an odd kernel and at least one width"
            )
        self.time = TimeEmbedding(time_features, 4 * time_features, time_features)
        total = time_features + condition

        def block(inputs: int, outputs: int) -> _FiLMBlock:
            return _FiLMBlock(inputs, outputs, total, kernel, groups, scale=scale)

        self.down = nn.ModuleList(
            nn.ModuleList([block(inputs, outputs), block(outputs, outputs)])
            for inputs, outputs in pairwise([action, *widths])
        )
        self.shrink = nn.ModuleList(
            Convolution(width, width, 3, stride=2, padding=1) for width in widths[:-1]
        )
        self.middle = nn.ModuleList(block(widths[-1], widths[-1]) for _ in range(2))
        ways_up = [(low, high) for high, low in pairwise(widths)][::-1]
        self.grow = nn.ModuleList(Doubling(low, high) for low, high in ways_up)
        self.up = nn.ModuleList(
            nn.ModuleList([block(2 * high, high), block(high, high)]) for _, high in ways_up
        )
        self.leave = nn.Sequential(
            _ConvolutionBlock(widths[0], widths[0], kernel, groups), nn.Conv1d(widths[0], action, 1)
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the prediction [B, H, A]."""
        embedding = self.time(t)
        if condition is not None:
            embedding = torch.cat([embedding, condition], dim=1)
        features = x.transpose(1, 2)
        passed: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            if level:
                passed.append(features)
                features = self.shrink[level - 1](features)
            features = _through(blocks, features, embedding)
        features = _through(self.middle, features, embedding)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            beside = passed.pop()
            grown = grow(features)[
                ..., : beside.shape[-1]
            ]  # one step longer where its length was odd
            features = _through(blocks, torch.cat([grown, beside], dim=1), embedding)
        return self.leave(features).transpose(1, 2)


def _through(blocks: nn.Module, features: Tensor, embedding: Tensor) -> Tensor:
    for block in blocks.children():
        features = block(features, embedding)
    return features
