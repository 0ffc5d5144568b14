"""Networks that denoise action chunks: a residual MLP and a diffusion transformer (`temporal_unet` has the U-Net).

All take x [B, H, A] (H steps of A numbers), times [B] in [0, 1] and a condition [B, C] that the caller concatenates
from image features, state and language embeddings, or None where C is 0; they return a prediction [B, H, A].

- `MLPDenoiser` is DPPO's (Ren et al. 2024, arXiv:2409.00588, `model/diffusion/mlp_diffusion.py`). **Difference:** the
  residual stream is activated before the last layer, too, as is usual where blocks activate first.
- `DiTDenoiser` is a DiT (Peebles & Xie 2023, arXiv:2212.09748) with adaLN-zero over the steps of a chunk, as CogACT's
  action head is one. **Differences from CogACT:** the condition modulates every block instead of being a token, and
  positions are sinusoidal, so that one network takes chunks of any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.errors import UserError

TIME_SCALE = 1000.0
"""Times in [0, 1] are embedded as if there were a thousand steps, for which the frequencies were chosen."""


class ChunkDenoiser(Protocol):
    """What denoises action chunks."""

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """Return a prediction [B, H, A] for x [B, H, A], t [B] and condition [B, C]."""


def sinusoids(positions: Tensor, features: int) -> Tensor:
    """Return sines and cosines of positions [*], float32 [*, features] (Vaswani et al. 2017, arXiv:1706.03762).

    Wavelengths grow geometrically from 2 pi to 10,000 * 2 pi.
    """
    half = features // 2
    rates = torch.arange(half, device=positions.device) * (-math.log(10_000.0) / max(half - 1, 1))
    angles = positions.float().unsqueeze(-1) * rates.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """Maps times [B] to [B, out]: sinusoids, a wider hidden layer, a linear one (Diffusion Policy).

    Args:
        features: number of sinusoids, even.
        hidden: width of the layer between.
        out: length of the result.
    """

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise UserError(
                f"a time embedding has {features} features; give an even number of them"
            )
        self.features = features
        self.enter = nn.Linear(features, hidden)
        self.leave = nn.Linear(hidden, out)

    def forward(self, t: Tensor) -> Tensor:
        """Return the embedding [B, out] of times [B] in [0, 1]."""
        waves = sinusoids(t * TIME_SCALE, self.features).to(self.enter.weight.dtype)
        return self.leave(F.mish(self.enter(waves)))


class _ResidualBlock(nn.Module):
    """x + linear(act(linear(act(x)))), DPPO's pre-activation block without normalization."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class MLPDenoiser(nn.Module):
    """A residual MLP over the flattened chunk, its time and its condition.

    Args:
        horizon: H.
        action: A.
        condition: C, or 0 without.
        hidden: width (DPPO: 512 for gym, 1024 for the harder Robomimic tasks).
        blocks: residual blocks of two layers.
        time_features: length of the time embedding (DPPO: 16 or 32).
        condition_hidden: widths of an MLP that the condition goes through first (kitchen: 128, 32); none by default.
    """

    def __init__(
        self,
        horizon: int,
        action: int,
        condition: int,
        *,
        hidden: int = 512,
        blocks: int = 1,
        time_features: int = 16,
        condition_hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.shape = (horizon, action)
        self.time = TimeEmbedding(time_features, 2 * time_features, time_features)
        sizes = [condition, *condition_hidden] if condition else [0]
        layers: list[nn.Module] = []
        for index, (size, following) in enumerate(pairwise(sizes)):
            layers += [nn.ReLU()] if index else []
            layers.append(nn.Linear(size, following))
        self.condition = nn.Sequential(*layers)
        self.enter = nn.Linear(horizon * action + time_features + sizes[-1], hidden)
        self.blocks = nn.Sequential(*[_ResidualBlock(hidden) for _ in range(blocks)])
        self.leave = nn.Linear(hidden, horizon * action)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the prediction [B, H, A]; see the module."""
        parts = [x.flatten(1), self.time(t)]
        if condition is not None:
            parts.append(self.condition(condition))
        features = self.blocks(self.enter(torch.cat(parts, dim=1)))
        return self.leave(F.relu(features)).unflatten(1, self.shape)


class TransformerBlock(nn.Module):
    """Self-attention and an MLP whose normalization, size and share the condition sets (adaLN-zero)."""

    def __init__(self, features: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(
            nn.LayerNorm(features, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.queries_keys_values = nn.Linear(features, 3 * features)
        self.project = nn.Linear(features, features)
        self.mlp = nn.Sequential(
            nn.Linear(features, expansion * features),
            nn.GELU(approximate="tanh"),
            nn.Linear(expansion * features, features),
        )
        self.modulation = nn.Linear(features, 6 * features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens [B, H, F] under a condition [B, F]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate * self._attend(self.norms[0](x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)

    def _attend(self, x: Tensor) -> Tensor:
        split = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(
            0
        )  # each [B, heads, H, F / heads]
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.project(attended.transpose(1, 2).flatten(2))


class DiTDenoiser(nn.Module):
    """A transformer over the steps of a chunk; at initialization every block is the identity and the output is 0.

    Args:
        action: A.
        condition: C, or 0 without.
        features: F, width of a token (DiT-S: 384, DiT-B, CogACT's default: 768).
        blocks: how many (DiT-S and DiT-B: 12).
        heads: of attention; they divide F (DiT-S: 6).
        expansion: the MLP's width over F.
    """

    def __init__(
        self,
        action: int,
        condition: int,
        *,
        features: int = 128,
        blocks: int = 4,
        heads: int = 4,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        if features % (2 * heads):
            raise UserError(
                f"{features} features do not split into {heads} heads of an even size; change either"
            )
        self.time = TimeEmbedding(256, features, features)
        self.condition = nn.Linear(condition, features) if condition else None
        self.enter = nn.Linear(action, features)
        self.blocks = nn.ModuleList(
            TransformerBlock(features, heads, expansion) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(features, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(features, 2 * features)
        self.leave = nn.Linear(features, action)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        modulations = [b.modulation for b in self.blocks if isinstance(b, TransformerBlock)]
        for layer in [*modulations, self.modulation, self.leave]:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the prediction [B, H, A]; see the module."""
        embedding = self.time(t)
        if self.condition is not None:
            assert condition is not None
            embedding = embedding + self.condition(condition)
        tokens = self.enter(x)
        positions = torch.arange(x.shape[1], device=x.device)
        tokens = tokens + sinusoids(positions, tokens.shape[-1]).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, embedding)
        shift, scale = self.modulation(F.silu(embedding)).unsqueeze(1).chunk(2, dim=-1)
        return self.leave(self.norm(tokens) * (1 + scale) + shift)
