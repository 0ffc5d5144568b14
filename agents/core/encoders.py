"""Convolutional encoders of pixels, as the benchmark families define them.

Sources: `dmc-gb` is DMControl-GB's (11 layers, SVEA and SGQN use it), `drqv2` is DrQ-v2's (4 layers), `small` is ours
for two CPU cores: at 48 pixels it keeps DrQ-v2's feature-map size per pixel at a fifth of its operations. `nature` is
DQN's (Mnih et al. 2015, https://doi.org/10.1038/nature14236, methods), which Stable-Baselines3 has too; behind it comes
this suite's projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from agents.core.errors import UserError
from agents.core.networks import ReLU, delta_orthogonal, initialize

EncoderName = Literal["dmc-gb", "drqv2", "small", "nature"]


@dataclass(frozen=True)
class EncoderShape:
    """The layout of a stack of convolutions without padding."""

    strides: tuple[int, ...]
    kernels: tuple[int, ...] = ()
    """Height and width of each one's kernel; without any, 3 everywhere."""
    channels: tuple[int, ...] = ()
    """That each one gives; without any, 32 everywhere."""
    last_relu: bool = True
    """Whether a ReLU follows the last convolution."""
    center: float = 0.0
    """Subtracted after division by 255."""
    delta_orthogonal: bool = False
    """Initialize so, instead of plainly orthogonal."""


ENCODERS: dict[EncoderName, EncoderShape] = {
    "dmc-gb": EncoderShape(strides=(2,) + (1,) * 10, last_relu=False, delta_orthogonal=True),
    "drqv2": EncoderShape(strides=(2, 1, 1, 1), center=0.5),
    "small": EncoderShape(strides=(2, 2, 1), center=0.5),
    "nature": EncoderShape(strides=(4, 2, 1), kernels=(8, 4, 3), channels=(32, 64, 64)),
}


class PixelEncoder(nn.Module):
    """Convolutions over stacked frames, flattened.

    Args:
        in_channels: 3 * frame_stack.
        size: (height, width) of the observation.
        name: a key of `ENCODERS`.
        bf16: convolve in bfloat16; weights and features stay float32.

    Attributes:
        out_features: length of the flattened feature map.
    """

    def __init__(
        self, in_channels: int, size: tuple[int, int], name: EncoderName, *, bf16: bool = False
    ) -> None:
        super().__init__()
        self.bf16 = bf16
        shape = ENCODERS[name]
        self.center = shape.center
        depth = len(shape.strides)
        kernels, channels = shape.kernels or (3,) * depth, shape.channels or (32,) * depth
        first = nn.Conv2d(in_channels, channels[0], kernels[0], shape.strides[0])
        layers: list[nn.Module] = [first]
        for place in range(1, depth):
            sizes = channels[place - 1], channels[place], kernels[place]
            layers += [ReLU(), nn.Conv2d(*sizes, shape.strides[place])]
        if shape.last_relu:
            layers.append(ReLU())
        self.convs = nn.Sequential(*layers)
        self.apply(initialize)
        if shape.delta_orthogonal:
            self.apply(delta_orthogonal)
        self._first = [first]  # in a list, so that it is not registered twice
        try:
            with torch.no_grad():
                self.out_features = self.convs(torch.zeros(1, in_channels, *size)).numel()
        except RuntimeError as error:
            raise UserError(
                f"pixels of {size[0]} x {size[1]} are too small for encoder '{name}' "
                f"({len(shape.strides)} convolutions); use a larger --size or another --encoder"
            ) from error

    def normalize(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 255] (uint8 or float, [B, C, H, W]) to the encoder's input, in its memory format."""
        channels_last = self._first[0].weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        # One after the other, and the layout in the smaller type: both at once take twice as long on CPU.
        small = pixels if pixels.dtype == torch.uint8 else pixels.to(dtype)
        return small.contiguous(memory_format=layout).to(dtype).mul(1 / 255).sub_(self.center)

    def forward(self, normalized: Tensor) -> Tensor:
        """Encode normalized pixels [B, C, H, W] to features, float32 [B, out_features].

        They are flattened in NHWC order: without a copy, and the gradient comes back in the convolutions' layout.
        """
        with torch.autocast(normalized.device.type, torch.bfloat16, enabled=self.bf16):
            return self.convs(normalized).permute(0, 2, 3, 1).flatten(1).float()
