"""A policy that leaves the house: the greedy action as a module of tensors, for `torch.export` and ONNX.

It holds what acting needs and no more: no critic, no target, no statistics of rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from agents.core.augmentations import center_crop
from agents.core.encoders import PixelEncoder
from agents.core.normalizers import RunningMoments


class GreedyPolicy(nn.Module):
    """Encodes pixels, normalizes a state, and acts on both; the networks are the agent's own, not copies.

    Args:
        act: from features [B, F], of pixels first, to flat actions, float32 [B, A] or int64 [B].
        shape: of one action; () of discrete ones.
        networks: the modules that `act` uses.
        encoder: of pixels; None where the agent sees none.
        moments: what a state is normalized by; None leaves it as it is.
        crop: side of the central window that the encoder sees; 0 is the whole picture.
    """

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        networks: Sequence[nn.Module],
        *,
        encoder: PixelEncoder | None = None,
        moments: RunningMoments | None = None,
        crop: int = 0,
    ) -> None:
        super().__init__()
        self.act, self.shape = act, shape
        self.networks = nn.ModuleList(networks)
        self.encoder, self.moments, self.crop = encoder, moments, crop

    def forward(self, pixels: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Return greedy actions, float32 [B, *shape] in [-1, 1], or int64 [B].

        Args:
            pixels: uint8 [B, 3*k, H, W]; the parts of the observation that the agent was built for.
            state: float32 [B, D].
        """
        parts = []
        if self.encoder is not None:
            assert pixels is not None
            window = center_crop(pixels, self.crop) if self.crop else pixels
            parts.append(self.encoder(self.encoder.normalize(window)))
        if state is not None:
            parts.append(state if self.moments is None else self.moments.normalize(state))
        action = self.act(torch.cat(parts, dim=1))
        return action.unflatten(-1, self.shape) if self.shape else action


def freeze(networks: Mapping[str, nn.Module]) -> None:
    """Make networks ready for other runtimes, in place: constants, in float32, their weights in plain order."""
    for network in networks.values():
        network.requires_grad_(False).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for part in network.modules():
            if isinstance(part, PixelEncoder):
                part.bf16 = False
