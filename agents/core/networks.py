"""Building blocks: ReLU with a guided backward, initialization, trunks, MLPs, twin critics, averaging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_guided = False


@contextmanager
def guided_relu() -> Iterator[None]:
    """Within this context every `ReLU` passes back only positive gradients.

    That is guided backpropagation (Springenberg et al. 2015, https://arxiv.org/abs/1412.6806): the rule changes only
    the backward pass, so one forward pass serves both the saliency and the loss.
    """
    global _guided
    _guided = True
    try:
        yield
    finally:
        _guided = False


def _positive_if_guided(gradient: Tensor) -> Tensor | None:
    return gradient.clamp_min(0) if _guided else None


class ReLU(nn.Module):
    """A ReLU whose backward pass obeys `guided_relu`; otherwise torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, 0)."""
        y = F.relu(x)
        if y.requires_grad:
            y.register_hook(_positive_if_guided)
        return y


def initialize(module: nn.Module) -> None:
    """Orthogonal linear layers and convolutions (gain sqrt 2 for these), zero biases, as in DrQ-v2."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.orthogonal_(module.weight, nn.init.calculate_gain("relu"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def delta_orthogonal(module: nn.Module) -> None:
    """Set a convolution's center tap to an orthogonal matrix (gain sqrt 2) and its other taps to zero.

    Xiao et al. 2018 (https://arxiv.org/abs/1806.05393), as in DMControl-GB. For deep stacks of stride 1: behind two
    strides of 2 such a kernel sees one pixel in sixteen, and a thin pole falls through the grid.
    """
    if isinstance(module, nn.Conv2d):
        center = module.kernel_size[0] // 2
        nn.init.zeros_(module.weight)
        nn.init.orthogonal_(module.weight[:, :, center, center], nn.init.calculate_gain("relu"))


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers of the given sizes (input first, output last) with ReLU between."""
    layers: list[nn.Module] = []
    for index in range(len(sizes) - 1):
        layers.append(nn.Linear(sizes[index], sizes[index + 1]))
        if index < len(sizes) - 2:
            layers.append(ReLU())
    return nn.Sequential(*layers).apply(initialize)


class Trunk(nn.Module):
    """Projects pixel features to a short vector (Linear, LayerNorm, tanh) and lets a state pass beside it.

    Args:
        pixel_features: leading entries of the input that come from pixels; 0 without pixels.
        state_features: entries that follow and pass through unchanged.
        out: length of the projection.
    """

    def __init__(self, pixel_features: int, state_features: int, out: int) -> None:
        super().__init__()
        self.split = [pixel_features, state_features]
        self.out_features = (out if pixel_features else 0) + state_features
        self.project = (
            nn.Sequential(nn.Linear(pixel_features, out), nn.LayerNorm(out), nn.Tanh())
            if pixel_features
            else None
        )
        self.apply(initialize)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, pixel_features + state_features] to float32 [B, out_features]."""
        if self.project is None:
            return features
        pixels, state = features.split(self.split, dim=1)
        projected = self.project(pixels)
        return torch.cat([projected, state], dim=1) if self.split[1] else projected


def doubled_convolution(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return conv(F.interpolate(x, scale_factor=2)) of a 3x3 convolution with padding 1, computed at the size of `x`.

    Seen from one of the four phases of the doubled picture, the convolution is one of `x` whose taps are sums of its
    own. With few output channels that is twice as fast as convolving at the full size.

    Args:
        x: [B, C, H, W].
        conv: from C to O channels.

    Returns:
        [B, O, 2 * H, 2 * W].
    """
    sums = _tap_sums(conv.weight.device)
    weight = torch.einsum("piy,qjx,ocyx->opqcij", sums, sums, conv.weight).flatten(0, 2)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(4)
    return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), 2)


@cache
def _tap_sums(device: torch.device) -> Tensor:
    """Return which taps of a 3x3 convolution fall together, [phase, offset in x, tap]; kept, as a GPU waits for it.

    An even column's left tap lies on the left neighbor, its other two on its own pixel.
    """
    return torch.tensor(
        [[[1.0, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]], device=device
    )


class TwinQ(nn.Module):
    """Two independent Q functions over (trunk output, action)."""

    def __init__(self, features: int, action: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.q1 = mlp([features + action, *hidden, 1])
        self.q2 = mlp([features + action, *hidden, 1])

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return both values, float32 [B] each."""
        x = torch.cat([features, action], dim=1)
        return self.q1(x).squeeze(1), self.q2(x).squeeze(1)


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move `target` towards `online`: target <- (1 - rate) * target + rate * online."""
    moving: list[Tensor] = list(target.parameters())
    if moving:  # a trunk without pixels has none
        torch._foreach_lerp_(moving, list(online.parameters()), rate)


def gradient_norm(module: nn.Module) -> Tensor:
    """Return the 2-norm over all gradients of a module, 0-d."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()
