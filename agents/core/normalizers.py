"""Statistics that bring observations, actions and rewards to a common size, saved with the networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agents.core.errors import UserError


class RunningMoments(nn.Module):
    """Mean and variance of everything seen so far, merged batch by batch (Chan et al. 1979).

    Buffers in float64, so that a million batches later a new one still counts.

    Args:
        shape: of one sample.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Take in samples [B, *shape]."""
        batch = batch.double()
        size = batch.new_tensor(len(batch))
        total = self.count + size
        offset = batch.mean(0) - self.mean
        squares = self.variance * self.count + batch.var(0, correction=0) * size
        self.variance.copy_((squares + offset.square() * self.count * size / total) / total)
        self.mean += offset * size / total
        self.count.copy_(total)

    def normalize(self, values: Tensor, limit: float = 10.0) -> Tensor:
        """Return values [..., *shape] with mean 0 and spread 1, clipped to `limit` spreads, float32."""
        scaled = (values.double() - self.mean) / (self.variance + 1e-8).sqrt()
        return scaled.clamp(-limit, limit).float()


class RewardScale(nn.Module):
    """Divides rewards by the spread of the discounted return (Engstrom et al. 2020, arXiv:2005.12729, section 3).

    The mean is left alone: shifting rewards would change which policy is best wherever episodes end.

    Args:
        num_envs: N.
        discount: of the return whose spread counts.
    """

    running: Tensor

    def __init__(self, num_envs: int, discount: float) -> None:
        super().__init__()
        self.discount = discount
        self.moments = RunningMoments()
        # Not a weight: a policy is loaded with any number of environments.
        self.register_buffer(
            "running", torch.zeros(num_envs, dtype=torch.float64), persistent=False
        )

    @torch.no_grad()
    def update(self, reward: Tensor, ended: Tensor, kept: Tensor | None = None) -> None:
        """Take in a rollout's rewards.

        Args:
            reward: [T, N].
            ended: bool [T, N], an episode ended with the step.
            kept: bool [T, N], at least one; the others were lost, which ends an episode too, and tell no return.
                None for all.
        """
        kept = torch.ones_like(ended) if kept is None else kept
        returns = []
        for now, end in zip(reward.double(), ended | ~kept, strict=True):
            self.running.mul_(self.discount).add_(now)
            returns.append(self.running.clone())
            self.running.masked_fill_(end, 0.0)
        self.moments.update(torch.stack(returns)[kept])

    @property
    def spread(self) -> Tensor:
        """What rewards are divided by, float64 0-d."""
        return (self.moments.variance + 1e-8).sqrt()

    def scale(self, reward: Tensor, limit: float = 10.0) -> Tensor:
        """Return rewards over the spread, clipped to `limit`, float32."""
        return (reward.double() / self.spread).clamp(-limit, limit).float()


class RangeNormalizer(nn.Module):
    """Maps every dimension of data linearly to [-1, 1] by its range: what a denoiser's noise of size 1 presumes.

    A dimension that hardly varies (a gripper that never moves) is only shifted, to 0: stretching its range would turn
    rounding into signal (Diffusion Policy's `range_eps`). It comes back as its constant plus whatever was predicted.

    Args:
        size: D, length of the last axis.
    """

    center: Tensor
    half_range: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("half_range", torch.ones(size))

    @torch.no_grad()
    def fit(self, data: Tensor, smallest: float = 1e-4) -> None:
        """Take ranges from data [..., D]; those below `smallest` count as constant.

        Raises:
            UserError: no data, of another size, or not finite.
        """
        size = len(self.center)
        if data.ndim < 2 or data.shape[-1] != size or data.numel() == 0:
            raise UserError(
                f"ranges of {size} dimension(s) need data [..., {size}] of at least one sample; got {tuple(data.shape)}"
            )
        if not bool(data.isfinite().all()):
            raise UserError("data to normalize has NaN or infinite values; remove those samples")
        low, high = data.reshape(-1, size).double().aminmax(dim=0)
        half = (high - low) / 2
        self.center.copy_((high + low) / 2)
        self.half_range.copy_(torch.where(half * 2 < smallest, 1.0, half))

    def normalize(self, data: Tensor) -> Tensor:
        """Return data [..., D] in [-1, 1] (beyond, where it lies outside the range that was seen)."""
        return (data - self.center) / self.half_range

    def restore(self, normalized: Tensor) -> Tensor:
        """Return the data of normalized values [..., D]."""
        return normalized * self.half_range + self.center
