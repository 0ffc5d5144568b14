"""Noise that is correlated as action chunks are, as BEHAVIOR 2025's winner has it.

Source: `compute_norm_stats.py --correlation` and `pi_behavior.py` of github.com/IliaLarchenko/behavior-1k-solution.

The flattened chunks' correlation matrix R is shrunk, R_beta = beta * R + (1 - beta) * I, and noise is L z with
L L^T = R_beta and z standard normal. Neighboring actions then get similar noise.

A chain runs in *white* coordinates u = L^-1 x, where noise is standard normal again: every step rule and its
log-probability holds as it is (up to the constant log |det L|, which no ratio sees), and the network is still shown
x = L u. L is lower triangular, so the first coordinates of u are those of the first actions alone. Fixing these leaves
the others at x_U + R_UO R_OO^-1 (what x_O was moved by): conditional inpainting, with nothing to be added.

**Differences from the authors' code:** the correlation, not the covariance of per-step normalized actions, so that
noise keeps spread 1 everywhere; actions are not deltas unless the task's are; a step in which one of the others would
move by more than 1 leaves them all unmoved there, and here they always follow.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from agents.core.errors import UserError


class ChunkNoise(nn.Module):
    """L and its inverse for chunks [B, H, A]; the identity until `fit`.

    Args:
        horizon: H.
        action: A.
        beta: share of the data's correlation, in [0, 1).
    """

    factor: Tensor
    inverse: Tensor

    def __init__(self, horizon: int, action: int, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise UserError(f"the noise's correlation is {beta}; give a share from 0 to below 1")
        self.horizon, self.beta = horizon, beta
        self.register_buffer("factor", torch.eye(horizon * action))
        self.register_buffer("inverse", torch.eye(horizon * action))

    @torch.no_grad()
    def fit(self, chunks: Iterable[Tensor]) -> None:
        """Take the correlation of chunks [B, H, A] that come in batches.

        They are whole: a last action that is repeated beyond an episode's end would seem correlated with itself.

        Raises:
            UserError: there is none.
        """
        size = len(self.factor)
        total = torch.zeros(size, dtype=torch.float64)
        products = torch.zeros(size, size, dtype=torch.float64)
        count = 0
        for chunk in chunks:
            flat = chunk.flatten(1).double().cpu()
            total += flat.sum(0)
            products += flat.T @ flat
            count += len(flat)
        if not count:
            raise UserError(
                f"no demonstrated episode is as long as a chunk of {self.horizon} actions, whose correlation the noise "
                "is to have; lower --horizon, or leave out --noise-correlation"
            )
        mean = total / count
        covariance = products / count - mean.outer(mean)
        spread = covariance.diagonal().clamp(min=0).sqrt()
        # An action that never varies is correlated with nothing.
        varies = spread > 1e-6
        scale = torch.where(varies, 1 / spread.clamp(min=1e-6), 0.0)
        shrunk = self.beta * covariance * scale.outer(scale)
        shrunk.fill_diagonal_(1.0)
        factor = torch.linalg.cholesky(shrunk)
        identity = torch.eye(size, dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        self.factor.copy_(factor)
        self.inverse.copy_(inverse)

    def color(self, white: Tensor) -> Tensor:
        """Return x = L u of u [B, H, A]."""
        return (white.flatten(1) @ self.factor.T).view_as(white)

    def whiten(self, colored: Tensor) -> Tensor:
        """Return u = L^-1 x of x [B, H, A]."""
        return (colored.flatten(1) @ self.inverse.T).view_as(colored)
