"""Networks that denoise images under a prompt: a U-Net with a transformer at its lowest resolution, and a DiT.

Both take x [B, C, H, W], times [B] in [0, 1] and text features [B, L, F], and return a prediction [B, C, H, W]. Text
reaches them in two ways: its mean joins the time and modulates every block (adaLN-zero or FiLM), and its tokens stand
beside those of the image in every transformer block, so that attention can tell which color belongs to which shape.

- `ImageDiT`: DiT (Peebles & Xie 2023, arXiv:2212.09748). **Differences:** text tokens in the sequence, as in Stable
  Diffusion 3 (Esser et al. 2024, arXiv:2403.03206), but with the same weights as the image's.
- `ImageUNet`: residual convolutions as in DDPM (Ho et al. 2020, arXiv:2006.11239) around transformer blocks, as in
  Stable Diffusion. **Differences:** the image is first folded into patches, one residual block a resolution, and a
  block's text tokens take part in self-attention instead of a cross-attention of their own.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.denoisers import TimeEmbedding, TransformerBlock, sinusoids
from agents.core.errors import UserError
from agents.core.noise_paths import Path, Prediction

TIME_FEATURES = 256
"""Sinusoids of a time (DiT)."""


def grid_positions(height: int, width: int, features: int, device: torch.device) -> Tensor:
    """Return sinusoids of rows beside those of columns, float32 [H * W, F], F divisible by 4."""
    rows = sinusoids(torch.arange(height, device=device), features // 2)
    columns = sinusoids(torch.arange(width, device=device), features // 2)
    both = torch.cat(
        [
            rows[:, None].expand(-1, width, -1),
            columns[None].expand(height, -1, -1),
        ],
        dim=-1,
    )
    return both.flatten(0, 1)


class _JointTransformer(nn.Module):
    """Transformer blocks over the tokens of text and image together.

    Args:
        features: width of a token.
        text: width of a text token.
        blocks: how many.
        heads: of attention.
    """

    def __init__(self, features: int, text: int, blocks: int, heads: int) -> None:
        super().__init__()
        if features % 4 or features % (2 * heads):
            raise UserError(
                f"tokens of width {features} do not split into {heads} heads of an even size; take a multiple of "
                f"{math.lcm(4, 2 * heads)}"
            )
        self.text = nn.Linear(text, features)
        self.blocks = nn.ModuleList(TransformerBlock(features, heads, 4) for _ in range(blocks))
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)

    def forward(self, image: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        """Map image features [B, features, H, W] under text [B, L, text] and an embedding [B, features]."""
        height, width = image.shape[-2:]
        positions = grid_positions(height, width, image.shape[1], image.device)
        tokens = image.flatten(2).transpose(1, 2) + positions.to(image.dtype)
        both = torch.cat([self.text(text).to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            both = block(both, embedding)
        return both[:, text.shape[1] :].transpose(1, 2).unflatten(2, (height, width))


class _Embedding(nn.Module):
    """Time and the mean of the text as one vector."""

    def __init__(self, text: int, features: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(TIME_FEATURES, features, features)
        self.text = nn.Linear(text, features)

    def forward(self, t: Tensor, text: Tensor) -> Tensor:
        return self.time(t) + self.text(text.mean(1))


class _ResidualBlock(nn.Module):
    """Two convolutions around a residual; time and text scale and shift the channels between (FiLM)."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            nn.GroupNorm(math.gcd(8, channels), channels) for channels in (inputs, outputs)
        )
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.residual = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(embedding))[..., None, None].chunk(2, dim=1)
        features = self.first(F.silu(self.norms[0](x)))
        features = self.norms[1](features) * (1 + scale) + shift
        return self.residual(x) + self.second(F.silu(features))


class ImageUNet(nn.Module):
    """See the module.

    Args:
        channels: C.
        text: F, width of text features.
        width: channels at the lowest resolution, and of a token there; every finer one has half as many.
        depth: transformer blocks.
        heads: of their attention.
        patch: side of the squares of pixels that the finest resolution sees as one.
        levels: number of resolutions; H and W are divisible by patch * 2^(levels - 1).
    """

    def __init__(
        self,
        channels: int,
        text: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        levels: int,
    ) -> None:
        super().__init__()
        self.patch, self.multiple = patch, patch * 2 ** (levels - 1)
        widths = [width // 2**level for level in reversed(range(levels))]
        folded = channels * patch * patch
        self.embedding = _Embedding(text, width)
        self.enter = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_ResidualBlock(w, w, width) for w in widths)
        self.shrink = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(widths)
        )
        self.middle = _JointTransformer(width, text, depth, heads)
        finer = list(pairwise(widths))[::-1]
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in finer
        )
        self.up = nn.ModuleList(
            _ResidualBlock(2 * w, w, width) for w in [widths[-1], *(fine for fine, _ in finer)]
        )
        self.norm = nn.GroupNorm(math.gcd(8, widths[0]), widths[0])
        self.leave = nn.Conv2d(widths[0], folded, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction [B, C, H, W]."""
        _check_size(x, self.multiple)
        embedding = self.embedding(t, condition)
        features = self.enter(F.pixel_unshuffle(x, self.patch))
        passed: list[Tensor] = []
        for level, block in enumerate(self.down):
            features = block(self.shrink[level - 1](features) if level else features, embedding)
            passed.append(features)
        features = self.middle(features, condition, embedding)
        for level, block in enumerate(self.up):
            features = self.grow[level - 1](features) if level else features
            features = block(torch.cat([features, passed.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(features))), self.patch)


class ImageDiT(nn.Module):
    """See the module; at initialization every block is the identity and the output is 0.

    Args:
        channels: C.
        text: F, width of text features.
        width: of a token (DiT-S: 384, DiT-B: 768).
        depth: blocks (DiT-S and DiT-B: 12).
        heads: of attention (DiT-S: 6).
        patch: side of the squares of pixels that are a token; it divides H and W.
    """

    def __init__(
        self, channels: int, text: int, *, width: int, depth: int, heads: int, patch: int
    ) -> None:
        super().__init__()
        self.patch = patch
        folded = channels * patch * patch
        self.embedding = _Embedding(text, width)
        self.enter = nn.Conv2d(folded, width, 1)
        self.blocks = _JointTransformer(width, text, depth, heads)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, folded)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction [B, C, H, W]."""
        _check_size(x, self.patch)
        embedding = self.embedding(t, condition)
        features = self.enter(F.pixel_unshuffle(x, self.patch))
        features = self.blocks(features, condition, embedding).permute(0, 2, 3, 1)
        shift, scale = self.modulation(F.silu(embedding))[:, None, None].chunk(2, dim=-1)
        tokens = self.leave(self.norm(features) * (1 + scale) + shift)
        return F.pixel_shuffle(tokens.permute(0, 3, 1, 2), self.patch)


class BesideGuess(nn.Module):
    """A network that says what a linear guess leaves open: the skip connection of EDM (Karras et al. 2022).

    The guess is the best prediction for pixels that are all N(mean, spread^2) and independent, arXiv:2206.00364
    appendix B.6 for any path and prediction. Without it a network spends its first hundreds of gradient steps on
    finding the noise in its input. **Difference from EDM**: what the network adds is not scaled.

    Args:
        network: (x [B, ...], t [B], condition) -> what is missing, [B, ...].
        path: data to noise.
        kind: what is predicted.
        mean: of the data's numbers.
        spread: of them, above 0.
    """

    def __init__(
        self, network: nn.Module, path: Path, kind: Prediction, *, mean: float, spread: float
    ) -> None:
        super().__init__()
        self.network, self.path, self.kind = network, path, kind
        self.mean, self.variance = mean, spread * spread

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction [B, ...]."""
        c = self.path.coefficients(t).beside(x)
        scaled = (x - c.alpha * self.mean) / (c.alpha**2 * self.variance + c.sigma**2)
        x0, noise = self.mean + c.alpha * self.variance * scaled, c.sigma * scaled
        return self.path.target(self.kind, x0, noise, t) + self.network(x, t, condition)


def _check_size(x: Tensor, multiple: int) -> None:
    if x.shape[-2] % multiple or x.shape[-1] % multiple:
        raise UserError(
            f"images of {x.shape[-2]} x {x.shape[-1]} pixels: this network takes sides divisible by {multiple}"
        )
