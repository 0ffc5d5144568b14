"""Learnt Policy Optimisation's drift: a network that says how far is too far (Lu et al. 2022, arXiv:2210.05639).

Mirror learning maximizes ratio * advantage - drift, and its guarantees ask three things of the drift: it is never
negative, and at ratio 1 both it and its gradient are 0. The network has them by construction: eight inputs that vanish
at ratio 1, no biases, a tanh between, and a ReLU around what exceeds a margin. So all around ratio 1 the drift is 0,
exactly.

Differences from the paper:
- The margin is the paper's 1e-6; the authors' code has 1e-4, and an option to add the network to PPO's drift.
- Hidden units are as many as the weights have: 16 for those that are shipped, 128 in the authors' code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from agents.core.errors import UserError, full_disk_named

MARGIN = 1e-6
"""What the network must exceed to count (xi)."""
INPUTS = 8
"""See `drift_inputs`."""
SHIPPED = Path(__file__).with_name("learned_drift.safetensors")
"""What `python -m experiments.evolve_drift` found; experiments/results/learned-drift says how it compares."""
HEAD, FORMAT = "drift", "sightline-drift-1"
"""The metadata's entry, JSON, and what its `format` says; raised when older files can no longer be read."""


def drift_inputs(ratio: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return the network's inputs [*, 8]: all are 0 at ratio 1.

    Each of (1 - r), (1 - r)^2, log r and (log r)^2, alone and times the advantage.

    Args:
        ratio: float32 [*].
        log_ratio: float32 [*].
        advantage: float32 [*].
    """
    away = 1 - ratio
    moved = torch.stack([away, away.square(), log_ratio, log_ratio.square()], -1)
    return torch.cat([moved, moved * advantage[..., None]], -1)


@dataclass(frozen=True)
class LearnedDrift:
    """One drift, or M of them side by side for samples [M, N]."""

    hidden: Tensor
    """float32 [8, H], or [M, 8, H]."""
    out: Tensor
    """float32 [H], or [M, H]."""

    def __call__(self, ratio: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return the drift [*], at least 0.

        Args:
            ratio: float32 [*], finite.
            log_ratio: float32 [*], its logarithm.
            advantage: float32 [*].
        """
        hidden, out = self.hidden.to(ratio.device), self.out.to(ratio.device)
        features = torch.tanh(drift_inputs(ratio, log_ratio, advantage) @ hidden)
        return F.relu((features @ out[..., None])[..., 0] - MARGIN)


def unflatten(weights: Tensor) -> LearnedDrift:
    """Return the drift (or drifts) of flat weights [*, 9 * H]."""
    width = weights.shape[-1] // (INPUTS + 1)
    hidden, out = weights.split([INPUTS * width, width], -1)
    return LearnedDrift(hidden.unflatten(-1, (INPUTS, width)), out)


def save_drift(file: Path, drift: LearnedDrift, made: Mapping[str, str]) -> None:
    """Write a drift atomically: the file is the old one, or the new one whole.

    Args:
        file: its folder exists.
        drift: a single one.
        made: how it was made, kept as metadata.
    """
    # One entry: safetensors writes several in an order of chance, and equal drifts should be equal files.
    metadata = {HEAD: json.dumps({**made, "format": FORMAT})}
    tensors = {"hidden": drift.hidden.contiguous(), "out": drift.out.contiguous()}
    temporary = file.with_name(file.name + ".tmp")
    with full_disk_named(file.parent), temporary.open("wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata))
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def load_drift(file: str | Path = SHIPPED) -> LearnedDrift:
    """Read a drift.

    Raises:
        UserError: there is no such file, or it holds no drift that could be used.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"drift file '{path}' does not exist; give one that experiments.evolve_drift wrote"
        )
    try:
        with safetensors.safe_open(path, "pt") as content:
            head = json.loads((content.metadata() or {}).get(HEAD, "{}"))
            tensors = {name: content.get_tensor(name) for name in sorted(content.keys())}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"drift file '{path}' cannot be read ({error}); evolve it again, or copy it again"
        ) from None
    if fault := _fault(tensors, head.get("format")):
        raise UserError(
            f"drift file '{path}' {fault}; give one that experiments.evolve_drift wrote"
        )
    return LearnedDrift(tensors["hidden"], tensors["out"])


def _fault(tensors: Mapping[str, Tensor], format: object) -> str | None:
    """Return what is wrong with a file's content."""
    if format != FORMAT:
        return f"has format {format}, not {FORMAT}"
    if list(tensors) != ["hidden", "out"]:
        return f"holds {', '.join(tensors) or 'nothing'}, not hidden and out"
    hidden, out = tensors["hidden"], tensors["out"]
    if hidden.ndim != 2 or hidden.shape[0] != INPUTS or out.shape != hidden.shape[1:]:
        return f"has shapes {tuple(hidden.shape)} and {tuple(out.shape)}, not (8, H) and (H,)"
    for tensor in (hidden, out):
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            return "has weights that are no finite float32 numbers"
    return None
