"""Guidance: networks made of a network, whose chains prefer what a condition or a classifier asks for.

Both are denoisers themselves (see `sampling`), so that every step rule, log-probability and gradient works with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.core.denoising import noise_weights
from agents.core.noise_paths import Path, Prediction
from agents.core.sampling import Denoiser


@dataclass(frozen=True)
class ClassifierFree:
    """Extrapolates from the prediction without a condition to the one with it (Ho & Salimans 2022, arXiv:2207.12598).

    prediction = without + scale * (with - without), of any kind, from one pass over a doubled batch. The scale is that
    of image generators (1 is no guidance); the paper's w is scale - 1.

    Attributes:
        denoiser: takes conditions [B, C].
        null: the condition that stands for none, [C]; training must have dropped conditions to it.
        scale: 0 without the condition, 1 with it, above 1 exaggerated (Decision Diffuser: 1.2, images: 4.5 to 7.5).
    """

    denoiser: Denoiser
    null: Tensor
    scale: float

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the guided prediction [B, ...]."""
        if self.scale == 1:
            return self.denoiser(x, t, condition)
        null = self.null.expand_as(condition)
        if self.scale == 0:
            return self.denoiser(x, t, null)
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True)
class ClassifierGuidance:
    """Adds the gradient of a log-probability to the score (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2).

    noise <- noise - scale * sigma * gradient; other predictions change by what that means for them. Diffuser adds the
    gradient to a step's mean instead, scaled by the posterior's variance: the same as the steps shrink.

    Attributes:
        denoiser: the network.
        path: it was trained on.
        kind: what it predicts.
        log_prob: (x [B, ...], t [B], condition) -> [B], differentiable in x: a classifier, or a value of noisy plans.
        scale: of the gradient.
    """

    denoiser: Denoiser
    path: Path
    kind: Prediction
    log_prob: Callable[[Tensor, Tensor, Any], Tensor]
    scale: float

    def __call__(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Return the guided prediction [B, ...]; the gradient counts as constant."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(leaf, t, condition).sum(), leaf)
        prediction = self.denoiser(x, t, condition)
        c = self.path.coefficients(t).beside(x)
        # noise = a * x + b * prediction, so the prediction moves by 1 / b of the noise. Where nothing of the data is
        # left in x (b is 0), x says nothing of the class: the gradient is 0, and the prediction stays.
        _, b = noise_weights(self.kind, c)
        b = torch.as_tensor(b, dtype=x.dtype, device=x.device)
        moved = torch.where(
            b == 0, 0.0, -self.scale * c.sigma * gradient / torch.where(b == 0, 1.0, b)
        )
        return prediction + moved
