"""Image augmentations, batched on the device that holds the batch.

Every function takes pixels in [0, 255], [B, 3*k, H, W] (k stacked RGB frames), and a `torch.Generator` on the same
device, and treats the k frames of a sample alike. Views that stand side by side ([B, 3*k, H, V*H]) are pictures of
their own: each is shifted, cropped, filtered and blended by itself, as Diffusion Policy crops per camera
(https://arxiv.org/abs/2303.04137). Sources stand at each function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, Literal, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.core.fields import count_views
from agents.core.overlays import OverlayImages

WeakAugmentation = Literal["none", "shift", "crop"]
StrongAugmentation = Literal["overlay", "convolution"]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Rest = ParamSpec("Rest")


def view_by_view(
    function: Callable[Concatenate[Tensor, Rest], Tensor],
) -> Callable[Concatenate[Tensor, Rest], Tensor]:
    """Make a function of pictures [B, C, H, W] treat each of the views of [B, C, H, V*H] as another sample."""

    @functools.wraps(function)
    def of_each(pixels: Tensor, *rest: Rest.args, **named: Rest.kwargs) -> Tensor:
        views = count_views(pixels.shape)
        if views == 1:
            return function(pixels, *rest, **named)
        apart = pixels.unflatten(3, (views, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        done = function(apart, *rest, **named)
        return done.unflatten(0, (-1, views)).permute(0, 2, 3, 1, 4).flatten(3)

    return of_each


@view_by_view
def random_shift(pixels: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each sample by up to `pad` pixels, repeating the border (DrQ, https://arxiv.org/abs/2004.13649).

    DrQ-v2 does the same with bilinear `grid_sample`; its shifts are whole pixels, so copying is equal and exact.
    """
    b, _, h, w = pixels.shape
    offsets = torch.randint(-pad, pad + 1, (2, b, 1), generator=generator, device=pixels.device)
    rows = (torch.arange(h, device=pixels.device) + offsets[0]).clamp_(0, h - 1)
    left, right = (edge.expand(-1, -1, -1, pad) for edge in (pixels[..., :1], pixels[..., -1:]))
    return _take(torch.cat([left, pixels, right], dim=3), rows, offsets[1] + pad, w)


@view_by_view
def random_crop(pixels: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Cut a random `size` x `size` window out of each sample (RAD, https://arxiv.org/abs/2004.14990).

    Every offset can be drawn, the last one included (the benchmark code never draws it).
    """
    b, _, h, w = pixels.shape
    top = torch.randint(0, h - size + 1, (b, 1), generator=generator, device=pixels.device)
    left = torch.randint(0, w - size + 1, (b, 1), generator=generator, device=pixels.device)
    return _take(pixels, torch.arange(size, device=pixels.device) + top, left, size)


@view_by_view
def center_crop(pixels: Tensor, size: int) -> Tensor:
    """Cut the central `size` x `size` window: what a random-crop agent sees when it acts."""
    h, w = pixels.shape[-2:]
    top, left = (h - size) // 2, (w - size) // 2
    return pixels[..., top : top + size, left : left + size]


@view_by_view
def zero_border(maps: Tensor, size: int) -> Tensor:
    """Put the window that `center_crop` cut, [B, k, h, h], back into a picture of `size` x `size`; zeros around it."""
    first = (size - maps.shape[-1]) // 2
    last = size - maps.shape[-1] - first
    return F.pad(maps, (first, last, first, last))


@view_by_view
def random_convolution(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pass every frame through one random 3x3 filter per sample (SVEA, https://arxiv.org/abs/2107.00644).

    As in DMControl-GB: weights N(0, 1), replicated border, sigmoid of the response to pixels in [0, 1], times 255.
    One grouped convolution serves the whole batch. Returns float32.
    """
    b, c, h, w = pixels.shape
    k = c // 3
    weights = torch.randn(b * 3, 3, 3, 3, generator=generator, device=pixels.device)
    # Frames become the batch of a convolution whose groups are the samples.
    frames = pixels.view(b, k, 3, h, w).transpose(0, 1).reshape(k, b * 3, h, w).float() / 255
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    response = torch.sigmoid(F.conv2d(padded, weights, groups=b)) * 255
    return response.view(k, b, 3, h, w).transpose(0, 1).reshape(b, c, h, w)


@view_by_view
def overlay(
    pixels: Tensor, generator: torch.Generator, images: OverlayImages, alpha: float = 0.5
) -> Tensor:
    """Blend each sample with a random image: (1 - alpha) * pixels + alpha * image (SODA, SVEA's best for videos).

    The same image lies over all frames of a sample. Returns float32.
    """
    b, c, h, w = pixels.shape
    drawn = images.sample(b, (h, w), generator, pixels.device)
    frames = pixels.view(b, c // 3, 3, h, w).float()
    return frames.lerp(drawn.float()[:, None], alpha).view(b, c, h, w)


def _take(pixels: Tensor, rows: Tensor, left: Tensor, width: int) -> Tensor:
    """Cut `width` pixels from column `left` [B, 1] on out of the rows [B, h] of each sample.

    Every stretch of memory of that width is an entry of one overlapping view, so that a whole row is copied at once:
    on CPU twice as fast as a gather of pixels.
    """
    b, c, h, w = pixels.shape
    flat = pixels.reshape(-1)
    stretches = flat.as_strided((flat.numel() - width + 1, width), (1, 1))
    planes = torch.arange(b * c, device=pixels.device).view(b, c, 1) * h
    index = (planes + rows[:, None]) * w + left[:, None]
    return stretches.index_select(0, index.view(-1)).view(b, c, -1, width)
