"""PPO on a Gaussian around the chunk that a denoising policy draws from zero noise: what a chain of noise is to beat.

The usual policy of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) over chunks of actions, N(mean, std^2)
with a spread of its own for every number of a chunk. Its mean is the chunk at the end of the deterministic chain from
zeros (DDIM on a diffusion, Euler's steps on a flow), which learns through all of these steps, so that it begins with
the very weights that DPPO, FPO and ReinFlow begin with.

**Difference from the Gaussian baselines of the DPPO paper:** these are networks of their own that were fitted to the
same demonstrations. Of a base that knows several ways, zero noise is one of them or their middle: evaluate the base
with `--acting start_noise=0` to see what the mean begins with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from agents.core.agent import Observation
from agents.core.chain_steps import Limits, reduce_log_prob, standard_normal
from agents.core.errors import UserError
from agents.core.fields import Field
from agents.core.packed_convolutions import packed
from agents.core.policy_gradient import ppo_clip
from agents.core.sampling import Sampler
from agents.core.step_rules import Posterior
from agents.generative_policies.fine_tuning import FineTuner, PolicyLoss
from agents.generative_policies.fine_tuning_config import FineTuningConfig
from agents.generative_policies.gaussian import above_floor, free_of
from agents.on_policy.config import Ranges, not_negative, positive

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianPPOConfig(FineTuningConfig):
    """PPO on a Gaussian; defaults are those that it shares with DPPO."""

    exploration_std: float = 0.1
    """Spread that every number of a chunk begins with, above its floor (DPPO's Gaussian baselines: .1)."""
    smallest_std: float = 0.01
    """Floor of the spread (DPPO's Gaussian baselines: .01, a clamp; here a smooth one)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy per number of a chunk (DPPO 0)."""

    RANGES: ClassVar[Ranges] = (
        ("exploration_std smallest_std", positive, "a positive number"),
        ("entropy_coefficient", not_negative, "0 or more"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if not self.smallest_std < self.exploration_std < math.inf:
            raise UserError(
                f"the spread begins at exploration_std {self.exploration_std}, and its floor is smallest_std "
                f"{self.smallest_std}; give two increasing numbers"
            )


class Spread(nn.Module):
    """A learned spread for every number of a chunk.

    Args:
        shape: H and A.
        start: what it begins with.
        floor: of what is returned, smooth and below the start: see `gaussian.above_floor`.
    """

    def __init__(self, shape: tuple[int, int], start: float, floor: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full(shape, free_of(start, floor)))
        self.floor = floor

    def forward(self) -> Tensor:
        """Return spreads [H, A]."""
        return above_floor(self.log_std, self.floor)


class GaussianPPO(FineTuner):
    """The agent; see the module's docstring, and `FineTuner` for arguments."""

    config: GaussianPPOConfig

    def prepare(self) -> dict[str, Field]:
        """See `FineTuner.prepare`: the chunk as it was drawn, and its log-probability."""
        config, policy = self.config, self.policy
        self.spread = Spread(policy.shape, config.exploration_std, config.smallest_std)
        self.spread.to(self.device)
        limits = Limits(x0=policy.config.clip_x0 or None)
        self.sampler: Sampler = policy.sampler(Posterior(0.0), limits=limits)
        return {"chunk": Field(policy.shape), "log_prob": Field()}

    def actor_parameters(self) -> list[nn.Parameter]:
        """See `FineTuner.actor_parameters`: the spread's, too."""
        return [*self.policy.parameters(), *self.spread.parameters()]

    def evaluation_sampler(self) -> Sampler:
        """See `FineTuner.evaluation_sampler`: the mean's."""
        return self.sampler

    def mean(self, observation: Observation) -> Tensor:
        """Return the Gaussian's mean [B, H, A], not cut off: the chunk from zero noise."""
        condition = self.policy.condition(observation)
        zeros = torch.zeros(len(condition), *self.policy.shape, device=condition.device)
        return self.policy.colored(self.sampler.sample(self.policy.denoise, zeros, condition))

    def draw(self, observation: Observation) -> tuple[Tensor, dict[str, Tensor]]:
        """See `FineTuner.draw`."""
        mean, std = self.mean(observation), self.spread()
        chunk = mean + std * standard_normal(mean.shape, self.generator, device=self.device)
        return chunk, {"chunk": chunk, "log_prob": self._log_prob(chunk, mean, std)}

    def choose(self, observation: Observation) -> Tensor:
        """See `FineTuner.choose`: the mean."""
        with packed():
            return self.mean(observation)

    def policy_loss(
        self, observation: Observation, extras: dict[str, Tensor], advantage: Tensor
    ) -> PolicyLoss:
        """See `FineTuner.policy_loss`: PPO's, of chunks."""
        std = self.spread()
        log_prob = self._log_prob(extras["chunk"], self.mean(observation), std)
        log_ratio = log_prob - extras["log_prob"]
        entropy = std[: self.executed].log().mean() + HALF_LOG_2PI + 0.5
        loss = ppo_clip(log_ratio, advantage, clip=self.config.clip).mean()
        loss = loss - self.config.entropy_coefficient * entropy
        return PolicyLoss(loss, log_ratio, {"policy/entropy": entropy.detach()})

    def _log_prob(self, chunk: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return the mean log-probability of the executed numbers, [B]."""
        each = -0.5 * ((chunk - mean) / std).square() - std.log() - HALF_LOG_2PI
        return reduce_log_prob(each[:, : self.executed], "mean")

    def networks(self) -> dict[str, nn.Module]:
        """See `FineTuner.networks`."""
        return super().networks() | {"spread": self.spread}
