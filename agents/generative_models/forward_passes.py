"""How a denoiser's forward pass is computed: in bfloat16, and compiled.

A `ForwardPass` takes the place of a network's `forward`: hooks, names of parameters and checkpoints stay what they are.
What is compiled is the network alone, not a whole gradient (`agents.core.compilation`): drawing asks it as often as
learning does, and a policy gradient needs both to compute the same.

- Images are drawn by the very program that learns from them, the one that keeps activations, although drawing throws
  these away: a program without them is fused otherwise, rounds otherwise, and ratios would not start at exactly 1. A
  reference that is a copy takes it as well (see `GeneratorTuner.compile`), so that a KL starts at exactly 0.
- Batches of the usual sizes are compiled, of fixed shape; others, such as the last one of an evaluation, run as they
  are. Which ones do depends on nothing else, so that a resumed run computes what an uninterrupted one does.
- In bfloat16 the network computes under autocast: weights, x, the result, and so log-probabilities, are float32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from agents.core.errors import UserError

BACKEND = "inductor"
"""Of `torch.compile`, where none is given."""


class ForwardPass:
    """Computes what a network's class says its forward pass is.

    Args:
        network: its parameters and its class are used; a copy of the network has a copy of this, not compiled.

    Attributes:
        bf16: compute in bfloat16; the result has the type of x.
        sizes: batches that are compiled; none at first.
        failed: whether compiling has failed, and is not tried again.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.bf16 = self.fall_back = self.failed = False
        self.sizes: frozenset[int] = frozenset()
        self._program: Any = None

    def compile(
        self,
        sizes: Collection[int],
        *,
        backend: str | None = None,
        fall_back: bool = False,
    ) -> None:
        """Compile passes of some sizes, each when it is first asked for.

        Args:
            sizes: of batches.
            backend: of `torch.compile`; None for `BACKEND`.
            fall_back: go on without compiling, after a warning, where it fails.
        """
        # Here: it brings a second of imports that most runs can do without.
        from agents.core.compilation import keep_between_runs

        backend = backend or BACKEND
        if backend == "inductor":
            keep_between_runs()
        self.sizes, self.fall_back, self.failed = frozenset(sizes), fall_back, False
        # The network is an argument: networks of one kind, such as model and reference, share a program.
        self._program = torch.compile(_forward, dynamic=False, backend=backend)

    def __call__(self, x: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
        """Return the prediction [B, ...] for x [B, ...] and whatever else the network takes.

        Raises:
            UserError: it cannot be compiled here, and there is no falling back.
        """
        if not self.bf16:
            return self._said(x, *inputs, **keywords)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self._said(x, *inputs, **keywords).to(x.dtype)

    def _said(self, x: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
        if self.failed or len(x) not in self.sizes:
            return _forward(self.network, x, *inputs, **keywords)
        # Other strides would be another program.
        tensors = [each.contiguous() if isinstance(each, Tensor) else each for each in (x, *inputs)]
        try:
            # The backward pass is compiled here as well, so that where it fails nothing has been drawn yet.
            with (
                torch.enable_grad(),
                functorch.patch(force_non_lazy_backward_lowering=True),
            ):  # see the module
                said = self._program(self.network, *tensors, **keywords)
        except RuntimeError as error:
            if not _is_of_compiler(error):
                raise
            # What the network itself refuses comes as its own error from here.
            plain = _forward(self.network, x, *inputs, **keywords)
            self._give_up(error)
            return plain
        return said if torch.is_grad_enabled() else said.detach()

    def _give_up(self, error: Exception) -> None:
        from agents.core.compilation import cannot_compile

        why = cannot_compile(type(self.network).__name__, error)
        if not self.fall_back:
            raise UserError(f"{why}; use --compile off, or auto to go on where it fails") from error
        warnings.warn(f"{why}; training goes on without compiling", stacklevel=4)
        self.failed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardPass:
        """Return the copied network's, which is not compiled."""
        copied = ForwardPass(copy.deepcopy(self.network, memo))
        copied.bf16 = self.bf16
        return copied


def _forward(network: nn.Module, *inputs: Any, **keywords: Any) -> Tensor:
    return type(network).forward(network, *inputs, **keywords)


def _is_of_compiler(error: RuntimeError) -> bool:
    """Whether a tracer, a code generator or a C++ compiler raised it."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def forward_pass(network: nn.Module) -> ForwardPass:
    """Return what computes a network's forward pass; it is put there by the first call."""
    present = vars(network).get("forward")
    if not isinstance(present, ForwardPass):
        present = ForwardPass(network)
        network.forward = present
    return present
