"""Convolutions over few steps, as products with weights in the layout that a CPU multiplies fastest.

Acting is a batch of one and a chunk of a dozen actions: a layer reads megabytes of weights for a few rows of features.
torch's convolutions rearrange these weights at every call, which takes several times as long as the product. Within
`packed` a layer keeps its weights packed and multiplies the unfolded features with them: 18 instead of 86 ms for
2048 channels, 5 taps and 4 steps on one thread, of which 16 are what reading the weights takes.

Results differ from the layers' own by rounding. Gradients, other devices and other number formats go the layers' own
way, and so does a build of torch without oneDNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

MOST_ROWS = 256
"""Rows (samples times steps) above which the product, and not its weights, takes the time."""
LEAST_WEIGHTS = 65_536
"""Numbers below which a layer's weights stay in the cache, and unfolding takes longer than it saves."""

_active = False


class _Packed(NamedTuple):
    """A layer's weights, and what they were packed of."""

    source: ReferenceType[Tensor]
    version: tuple[int, int, int]
    weight: Tensor


# Not in the layers: these are copied, compared and saved, and packed weights have no storage that torch could copy.
_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def _count_fused_steps(optimizer: Optimizer, *_: object) -> None:
    """Count a fused optimizer's steps as changes of what it moves: its kernels do not."""
    if _packed:
        fused = [g["params"] for g in optimizer.param_groups if g.get("fused")]
        torch.autograd.graph.increment_version([p for group in fused for p in group])


register_optimizer_step_post_hook(_count_fused_steps)


@contextmanager
def packed() -> Iterator[None]:
    """Within this context layers of this module act with packed weights where that is possible."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def _applies(x: Tensor, weight: Tensor) -> bool:
    return (
        _active
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not weight.is_inference()  # it has no version
        and weight.numel() >= LEAST_WEIGHTS
        and x.shape[0] * x.shape[2] <= MOST_ROWS
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling()
    )


def _multiply(layer: nn.Module, matrix: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows [R, I] @ matrix [O, I]^T + bias [O].

    `matrix` is a view of the layer's weight with its dimensions in the matrix's order, not yet joined to two: only
    packing copies it. The two operations are those that torch's own compiler puts in the place of a linear layer with
    frozen weights.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # In-place changes (an optimizer's, an average's, a checkpoint's) count up the version.
    version = (weight._version, weight.data_ptr(), len(rows))
    found = _packed.get(layer)
    if found is None or found.source() is not weight or found.version != version:
        laid_out = matrix.detach().reshape(-1, rows.shape[1]).contiguous()
        ordered = torch.ops.mkldnn._reorder_linear_weight(laid_out, len(rows))
        found = _Packed(ref(weight), version, ordered)
        _packed[layer] = found
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, found.weight, bias, "none", [], "")
    return product


class Convolution(nn.Conv1d):
    """`nn.Conv1d` without groups and dilation, which `packed` makes fast."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, I, H] to [B, O, H / stride]."""
        if not _applies(x, self.weight):
            return super().forward(x)
        (taps,), (stride,) = self.kernel_size, self.stride
        padding = int(self.padding[0])
        columns = F.pad(x.transpose(1, 2), (0, 0, padding, padding)).unfold(1, taps, stride)
        batch, steps = columns.shape[:2]
        rows = columns.transpose(2, 3).reshape(batch * steps, -1)  # taps, then channels
        out = _multiply(self, self.weight.transpose(1, 2), rows, self.bias)
        return out.view(batch, steps, -1).transpose(1, 2)


class Doubling(nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` of 4 taps that doubles the steps (stride 2, padding 1), which `packed` makes fast."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map [B, I, H] to [B, O, 2 * H]."""
        if output_size is not None or not _applies(x, self.weight):
            return super().forward(x, output_size)
        batch, inputs, steps = x.shape
        rows = x.transpose(1, 2).reshape(batch * steps, inputs)
        out = _multiply(self, self.weight.permute(2, 1, 0), rows, None)
        out = out.view(batch, steps, 4, -1)
        # Tap k of step i lands on step 2 * i + k - 1.
        even, odd = out[:, :, 1].clone(), out[:, :, 2].clone()
        even[:, 1:] += out[:, :-1, 3]
        odd[:, :-1] += out[:, 1:, 0]
        doubled = torch.stack([even, odd], dim=2).flatten(1, 2).transpose(1, 2)
        assert self.bias is not None
        return doubled + self.bias[:, None]
