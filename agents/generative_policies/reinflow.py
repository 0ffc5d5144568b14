"""ReinFlow: a flow fine-tuned with noise that it learns (Zhang et al. 2025, https://arxiv.org/abs/2505.22094).

A flow's steps have no noise and so no log-probability. A second network gives each step some, of a spread between two
bounds that depends on observation and time; the chain's log-probability, its mean over steps and over a chunk's
numbers, goes into PPO's ratio with the decision's advantage. When it does not explore, the policy is the flow again and
the noise network is not asked.

Differences from the authors' code, beside those of `fine_tuning`:

- Sampling and log-probabilities ask the networks at the same times, one `Sampler`'s; there the chain is drawn at
  k / (K - 1) and evaluated at k / K, or the other way round, so that ratios do not begin at 1.
- Samples are clipped as they are handed on, and log-probabilities are those of what was drawn.
- The start of a chain, which no parameter changes, is left out of the log-probability.
- The noise's upper bound falls in a straight line, by agent steps, and only between rollouts.
- The noise network has no share in the encoder's gradient.
- By default the noise does not decay, and the policy learns from the first rollout on: there the critic learns alone
  before (`critic_warmup`), and values begin with an optimistic bias, which there is none of here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents.core.agent import Observation
from agents.core.chain_steps import Limits, reduce_log_prob, standard_normal
from agents.core.denoisers import TimeEmbedding
from agents.core.errors import UserError
from agents.core.fields import Field
from agents.core.policy_gradient import ppo_clip
from agents.core.rollout import Experience
from agents.core.sampling import Sampler
from agents.core.schedules import linear
from agents.core.step_rules import Euler, LearnedNoise
from agents.generative_policies.fine_tuning import FineTuner, PolicyLoss
from agents.generative_policies.fine_tuning_config import FineTuningConfig
from agents.generative_policies.policy import DenoisingPolicy
from agents.on_policy.config import Ranges, not_negative, positive

HALF_LOG_2PI_E = 0.5 * math.log(2 * math.pi * math.e)
"""Entropy of a Gaussian of spread 1, in nats."""


@dataclass(frozen=True)
class ReinFlowConfig(FineTuningConfig):
    """ReinFlow; defaults are the paper's for hopper unless a field says otherwise."""

    learning_rate: float = 4.5e-5
    """Adam step size of policy and noise (hopper 4.5e-5, walker 4e-4)."""
    critic_learning_rate: float = 6.5e-4
    """Adam step size of the critic (hopper 6.5e-4, walker 4e-3)."""
    smallest_noise: float = 0.1
    """Lower bound of a step's spread (hopper .1, pixels .08)."""
    largest_noise: float = 0.24
    """Upper bound of a step's spread (hopper .24, pixels .14)."""
    noise_hold_steps: int = 0
    """Agent steps in which the upper bound stays (the paper: 35 % of a run)."""
    noise_decay_steps: int = 0
    """Agent steps after these in which it falls to the lower bound; 0 leaves it (the paper's falls until 70 %)."""
    noise_hidden: tuple[int, ...] = (64, 64)
    """Widths of the noise network's hidden layers."""
    clip_samples: float = 1.0
    """Clip of a chain's samples on their way from step to step, in evaluations too; 0 for none."""
    entropy_coefficient: float = 0.03
    """Weight of the noise's entropy per step and number of a chunk (states .03, pixels 0 to .01)."""
    w2_coefficient: float = 0.0
    """Weight of the mean squared distance between what the flow and its base make of one noise, which bounds their
    squared 2-Wasserstein distance (the paper finds entropy better)."""

    RANGES: ClassVar[Ranges] = (
        ("smallest_noise", positive, "a positive number"),
        ("noise_hold_steps noise_decay_steps", not_negative, "0 or more"),
        ("clip_samples entropy_coefficient w2_coefficient", not_negative, "0 or more"),
        ("noise_hidden", lambda value: min(value, default=1) >= 1, "positive widths"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if not self.smallest_noise < self.largest_noise < math.inf:
            raise UserError(
                f"the noise lies between smallest_noise {self.smallest_noise} and largest_noise "
                f"{self.largest_noise}; give two increasing numbers"
            )


class NoiseNetwork(nn.Module):
    """The spread of every number of a step, between two bounds, from observation and time.

    Args:
        shape: H and A of a chunk.
        condition: C.
        hidden: widths of the hidden layers.
        time_features: of the time's embedding.
        bounds: smallest and largest spread.
    """

    bounds: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        condition: int,
        hidden: tuple[int, ...],
        time_features: int,
        bounds: tuple[float, float],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.time = TimeEmbedding(time_features, 2 * time_features, time_features)
        layers: list[nn.Module] = []
        size = condition + time_features
        for width in hidden:
            layers += [nn.Linear(size, width), nn.Tanh()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, math.prod(shape)), nn.Tanh())
        self.register_buffer("bounds", torch.tensor(bounds))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return spreads [B, H, A]; x [B, H, A] itself says nothing."""
        low, high = self.bounds.log()
        place = self.layers(torch.cat([condition.detach(), self.time(t)], dim=1)).add(1).div(2)
        return torch.exp(low + (high - low) * place).unflatten(1, self.shape)


class ReinFlow(FineTuner):
    """The agent; see the module's docstring, and `FineTuner` for arguments."""

    config: ReinFlowConfig
    base: DenoisingPolicy
    keeps_base = True

    def prepare(self) -> dict[str, Field]:
        """See `FineTuner.prepare`: the chain, and its log-probability."""
        config, policy = self.config, self.policy
        if config.clip_samples and policy.noise is not None:
            raise UserError(
                "correlated noise runs in coordinates of its own, where clip_samples has no meaning; give "
                "--clip-samples 0"
            )
        limits = Limits(x0=policy.config.clip_x0 or None, sample=config.clip_samples or None)
        self.sampler: Sampler = policy.sampler(LearnedNoise(), limits=limits)
        self.flow: Sampler = policy.sampler(Euler(), limits=limits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.further_seed)
            self.noise = NoiseNetwork(
                policy.shape,
                policy.condition.out_features,
                config.noise_hidden,
                policy.config.time_features,
                (config.smallest_noise, config.largest_noise),
            )
        self.noise.to(self.device)
        return {"chain": Field((self.sampler.steps + 1, *policy.shape)), "log_prob": Field()}

    def actor_parameters(self) -> list[nn.Parameter]:
        """See `FineTuner.actor_parameters`: the noise's, too."""
        return [*self.policy.parameters(), *self.noise.parameters()]

    def evaluation_sampler(self) -> Sampler:
        """See `FineTuner.evaluation_sampler`: the flow alone."""
        return self.flow

    def draw(self, observation: Observation) -> tuple[Tensor, dict[str, Tensor]]:
        """See `FineTuner.draw`."""
        condition = self.policy.condition(observation)
        start = standard_normal(
            (len(condition), *self.policy.shape), self.generator, device=self.device
        )
        chain = self.sampler.chain(
            self.policy.denoise, start, condition, self.generator, noise_network=self.noise
        )
        steps = torch.stack([self._reduced(step) for step in chain.log_prob])
        remembered = {"chain": chain.samples.transpose(0, 1), "log_prob": steps.mean(0)}
        return self.policy.colored(chain.data), remembered

    def policy_loss(
        self, observation: Observation, extras: dict[str, Tensor], advantage: Tensor
    ) -> PolicyLoss:
        """See `FineTuner.policy_loss`: PPO's, of every chain as a whole."""
        config = self.config
        condition = self.policy.condition(observation)
        log_prob, entropy = self._evaluated(extras["chain"], condition)
        log_ratio = log_prob - extras["log_prob"]
        loss = ppo_clip(log_ratio, advantage, clip=config.clip).mean()
        loss = loss - config.entropy_coefficient * entropy
        metrics = {"policy/entropy": entropy.detach()}
        if config.w2_coefficient:
            distance = self._distance(observation, condition, extras["chain"][:, 0])
            loss = loss + config.w2_coefficient * distance
            metrics["policy/distance_to_base"] = distance.detach()
        return PolicyLoss(loss, log_ratio, metrics)

    def _evaluated(self, chain: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [M] of chains [M, K + 1, H, A] under the policy now, and the noise's entropy."""
        steps, count = self.sampler.steps, len(chain)
        index = torch.arange(steps, device=chain.device).repeat(count)
        x, condition = chain[:, :-1].flatten(0, 1), condition.repeat_interleave(steps, 0)
        step = self.sampler.step(self.policy.denoise, x, index, condition, noise_network=self.noise)
        each = self._reduced(step.log_prob(chain[:, 1:].flatten(0, 1)))
        assert isinstance(step.std, Tensor)
        entropy = step.std[:, : self.executed].log().mean() + HALF_LOG_2PI_E
        return each.view(count, steps).mean(1), entropy

    def _distance(self, observation: Observation, condition: Tensor, start: Tensor) -> Tensor:
        """Return the mean squared distance of the flow's and its base's chunks from the same noise, 0-d."""
        ours = self.flow.sample(self.policy.denoise, start, condition)
        with torch.no_grad():
            theirs = self.flow.sample(self.base.denoise, start, self.base.condition(observation))
        return (ours - theirs)[:, : self.executed].square().mean()

    def _reduced(self, log_prob: Tensor) -> Tensor:
        """Return a step's log-probability [B] from those of its numbers [B, H, A]."""
        return reduce_log_prob(log_prob[:, : self.executed], "mean")

    def _take_in(self, experience: Experience) -> None:
        super()._take_in(experience)
        config = self.config
        if not config.noise_decay_steps:
            return
        # Only now: bounds that fell within a rollout would change the ratio of what was drawn before.
        low, high = config.smallest_noise, config.largest_noise
        passed = self.agent_steps - config.noise_hold_steps
        self.noise.bounds[1] = linear(high, low, config.noise_decay_steps, passed)

    def networks(self) -> dict[str, nn.Module]:
        """See `FineTuner.networks`."""
        return super().networks() | {"noise": self.noise}

    def extra_state(self) -> dict[str, Any]:
        """See `FineTuner.extra_state`."""
        return super().extra_state() | {"agent_steps": self.agent_steps}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """See `FineTuner.load_extra_state`."""
        super().load_extra_state(state)
        self.agent_steps = state["agent_steps"]
