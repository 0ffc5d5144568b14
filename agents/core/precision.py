"""Which numbers a device is fast with."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Resolve `auto`: bf16 on GPUs that have it and on CPUs with its instructions (1.6-2 times faster there).

    Without them a CPU takes many times as long as in float32. Processors with AMX have AVX512-BF16, too.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
