"""LoRA (Hu et al. 2021, arXiv:2106.09685) by peft: small matrices that learn beside frozen weights.

They are float32 whatever the network is, begin as nothing (B = 0), and can be left out of a pass: the network that
learns is its own reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.core.errors import UserError

ADAPTER = "default"
"""peft's name of the one adapter."""


def add_lora(
    network: Any, *, rank: int, alpha: int, targets: Sequence[str], seed: int
) -> dict[str, nn.Parameter]:
    """Put a LoRA into a network of diffusers, which is frozen; return its parameters by their names in the network.

    Args:
        network: of diffusers.
        rank: r of B @ A.
        alpha: their product is scaled by alpha / rank.
        targets: ends of names of the layers that get one.
        seed: of A.

    Raises:
        UserError: no layer has such a name.
    """
    from peft import LoraConfig

    network.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network.add_adapter(config, ADAPTER)
        except ValueError as error:
            raise UserError(
                f"no layer of the network ends in one of {', '.join(targets)}; give others as --lora-targets ({error})"
            ) from error
    learned = {name: p for name, p in network.named_parameters() if ".lora_" in name}
    for parameter in learned.values():
        parameter.data = parameter.data.float()
    return learned


@contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """Leave the LoRA out of the passes of a context."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class WithoutLora(nn.Module):
    """A denoiser that shares a network, and leaves out its LoRA.

    Args:
        denoiser: with it.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the prediction without the LoRA."""
        with without_lora(self.denoiser):
            # Not by calling it: hooks that count its passes count this one's elsewhere.
            return self.denoiser.forward(*arguments, **keywords)


def save_lora(folder: Path, pipe: Any, part: str) -> Path:
    """Write the LoRA of a pipeline's network as diffusers does, and return the file.

    `pipe.load_lora_weights(folder)` reads it. The scale alpha / rank goes into B: readers then take alpha for the rank.

    Args:
        folder: is made.
        pipe: of diffusers.
        part: the network's name in it.
    """
    from peft.utils import get_peft_model_state_dict

    network = getattr(pipe, part)
    config = network.peft_config[ADAPTER]
    scale = config.lora_alpha / config.r
    tensors = {
        name: (value * scale if ".lora_B." in name else value).cpu().contiguous()
        for name, value in get_peft_model_state_dict(network, adapter_name=ADAPTER).items()
    }
    pipe.save_lora_weights(folder, **{f"{part}_lora_layers": tensors})
    return folder / "pytorch_lora_weights.safetensors"
