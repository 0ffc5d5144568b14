"""Critics that know how returns are spread: implicit quantiles, and PG-Rainbow's value behind them.

Implicit quantile networks: Dabney et al. 2018 (https://arxiv.org/abs/1806.06923), eqs. 2-4. PG-Rainbow: Jeon et al.
2024 (https://arxiv.org/abs/2407.13146). Of the latter, the abstract, that a replay trains the quantiles, and the form
of the critic were read: V(s) = f(v(s) * q(s)) with quantiles q(s) and a small network f. The rest of its text was not
at hand, and what follows is derived:
- Quantiles are of the state's value, not of every action's: continuous actions work too.
- They learn from the rollout that PPO learns from, not from a replay of older policies: no correction is needed.
- f has one hidden layer as wide as there are quantiles, and gets the quantiles without gradient.
- The policy stays PPO's: its advantages are generalized ones of V.

Targets are samples of the return: rewards up to a random horizon, which moves on with probability lambda at every
step, and there the quantiles of what follows. Their mean is that of lambda-returns; lambda = 1 gives the return as far
as it was seen. (SR(lambda) of Nam et al. 2021, https://arxiv.org/abs/2105.11366, replaces samples to the same end; here
all samples of a step share a horizon, so that quantiles are needed at few steps.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.advantages import n_step_return
from agents.core.agent import Observation
from agents.core.rollout import MOST_AT_ONCE, Experience
from agents.on_policy.actor_value import ActorValue, tanh_mlp

Critic = Literal["mean", "quantile", "distilled"]
"""What the value is: an output of its own; the mean of implicit quantiles; PG-Rainbow's function of both."""


class QuantileCritic(nn.Module):
    """Values from implicit quantiles of the return.

    Args:
        features: length of the input.
        hidden: widths of the hidden layers; the first one's output is what the fraction's embedding multiplies.
        quantiles: K, how many evenly spaced ones make the value.
        embedding: cosines in the embedding of a fraction (IQN's n).
        is_distilled: the value is f(v * q), see the module; otherwise the quantiles' mean.
    """

    midpoints: Tensor
    frequencies: Tensor

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        *,
        quantiles: int,
        embedding: int,
        is_distilled: bool,
    ) -> None:
        super().__init__()
        width, *rest = hidden or (embedding,)
        self.state = nn.Sequential(tanh_mlp([features, width], last_gain=2**0.5), nn.Tanh())
        self.fraction = nn.Linear(embedding, width)
        self.head = tanh_mlp([width, *rest, 1], last_gain=1.0)
        fixed = {
            "midpoints": (torch.arange(quantiles) + 0.5) / quantiles,
            "frequencies": torch.pi * torch.arange(embedding),
        }
        for name, values in fixed.items():
            self.register_buffer(name, values, persistent=False)
        self.scalar = self.distill = None
        if is_distilled:
            self.scalar = tanh_mlp([features, *hidden, 1], last_gain=1.0)
            self.distill = tanh_mlp([quantiles, quantiles, 1], last_gain=1.0)

    def quantiles(self, features: Tensor, fractions: Tensor) -> Tensor:
        """Return quantiles of the return.

        Args:
            features: float32 [B, D].
            fractions: [B, M] or [M], in [0, 1].

        Returns:
            float32 [B, M].
        """
        cosines = torch.cos(fractions[..., None] * self.frequencies)
        embedded = F.relu(self.fraction(cosines))  # eq. 4
        return self.head(self.state(features)[:, None] * embedded)[..., 0]

    def forward(self, features: Tensor) -> Tensor:
        """Return values [B, 1] of features [B, D]."""
        quantiles = self.quantiles(features, self.midpoints)
        if self.scalar is None or self.distill is None:
            return quantiles.mean(-1, keepdim=True)
        return self.distill(self.scalar(features) * quantiles.detach())


def quantile_huber_loss(
    quantiles: Tensor, fractions: Tensor, target: Tensor, *, threshold: float = 1.0
) -> Tensor:
    """Return the quantile regression loss, 0-d (IQN eq. 3; Dabney et al. 2017, arXiv:1710.10044, eqs. 9-10).

    It is the mean over fractions too, where the papers have the sum, so that its size does not depend on their number.
    With a threshold, errors below it count by their square: what is learned lies between quantile and expectile. 0
    gives the plain quantile loss, and the quantiles themselves.

    Args:
        quantiles: [B, M].
        fractions: [B, M], of each.
        target: [B, K], samples of the return; no gradient.
        threshold: kappa, in units of the return.
    """
    error = target.detach()[:, None, :] - quantiles[:, :, None]
    size = error.abs()
    if threshold > 0:
        size = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=threshold)
        size = size / threshold
    weight = (fractions[:, :, None] - (error.detach() < 0).float()).abs()
    return (weight * size).mean()


def draw_horizons(
    terminated: Tensor, truncated: Tensor, gae_lambda: float, generator: torch.Generator
) -> Tensor:
    """Draw after which steps the rewards of a return end and the value of what follows stands for the rest.

    Args:
        terminated: bool [T, N]; nothing follows there.
        truncated: bool [T, N]; always.
        gae_lambda: probability to go on after any other step but the last row's.
        generator: on the same device.

    Returns:
        bool [T, N].
    """
    draw = torch.rand(terminated.shape, generator=generator, device=terminated.device)
    ends = truncated | (draw >= gae_lambda)
    ends[-1] = True
    return ends & ~terminated


@torch.no_grad()
def return_samples(
    reward: Tensor, following: Tensor, terminated: Tensor, horizon: Tensor, *, discount: float
) -> Tensor:
    """Return samples of the return [T, N, K].

    Args:
        reward: [T, N].
        following: [T, N, K], quantiles of the return from what followed each step; read at horizons only.
        terminated: bool [T, N].
        horizon: bool [T, N], from `draw_horizons`.
        discount: gamma.
    """
    reward, terminated, horizon = (
        x[..., None].expand(following.shape) for x in (reward, terminated, horizon)
    )
    return n_step_return(reward, following, terminated, horizon, discount=discount, steps=None)


def quantiles_of(network: ActorValue, observation: Observation, fractions: Tensor) -> Tensor:
    """Return quantiles [B, M] of the return from a batch of observations, at fractions [B, M] or [M]."""
    assert isinstance(network.critic, QuantileCritic)
    return network.critic.quantiles(network.perceive(network.normalize(observation))[0], fractions)


def quantile_loss(
    network: ActorValue,
    observation: Observation,
    target: Tensor,
    threshold: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the loss of quantiles at random fractions, as many as targets [B, K]; pictures are encoded anew for it."""
    fractions = torch.rand(target.shape, generator=generator, device=target.device)
    quantiles = quantiles_of(network, observation, fractions)
    return quantile_huber_loss(quantiles, fractions, target, threshold=threshold)


@torch.no_grad()
def sample_returns(
    network: ActorValue,
    experience: Experience,
    reward: Tensor,
    *,
    discount: float,
    gae_lambda: float,
    generator: torch.Generator,
) -> Tensor:
    """Return samples [T, N, K] of what the steps of a rollout returned, of rewards [T, N] in the value's units."""
    assert isinstance(network.critic, QuantileCritic)
    fractions, terminated = network.critic.midpoints, experience.terminated
    horizon = draw_horizons(terminated, experience.truncated, gae_lambda, generator)
    following = reward.new_zeros(*reward.shape, len(fractions))
    index = (horizon & experience.kept).flatten().nonzero()[:, 0].cpu()
    for part in index.split(MOST_AT_ONCE):
        quantiles = quantiles_of(network, experience.next_observation(part), fractions)
        following.view(-1, len(fractions))[part.to(following.device)] = quantiles
    return return_samples(reward, following, terminated, horizon, discount=discount)
