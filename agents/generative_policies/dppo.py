"""DPPO, diffusion policy policy optimization (Ren et al. 2024, https://arxiv.org/abs/2409.00588).

Denoising a chunk of actions is a Markov decision process inside a step of the environment: every denoising step is a
Gaussian with a log-probability, and only the last one is rewarded. The base takes the first steps of a chain, from
noise, and stays as it was; a copy of it takes the last K' ones and learns by PPO, where each pair of decision and
denoising step is one sample. Its advantage is the decision's, discounted by how far from the action the step is.

The log-probability is the **mean** over a chunk's numbers, not the sum, so that one clip suits chunks of any size.

Differences from the authors' code, beside those of `fine_tuning`:

- A single fine-tuned step (K' = 1) has the last step's clip; there it is 0/0.
- Any path and prediction: a flow is fine-tuned by the posterior of a flow.
- Log-probabilities are those of the samples as they were drawn; there the last one is clipped to [-1, 1] before.
- Evaluation draws as the policy's own settings say: `rule`, `noise_level` (0 is DDIM), `min_std` and `start_noise`.
  There it is DDPM with a floor of 1e-3 from states, DDIM from pixels. As in training, the base takes the first steps;
  in a chain of another number of steps, those at noise levels that the policy has not learned.
- eta is a setting and is not learned; there is no entropy bonus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.core.agent import Observation
from agents.core.chain_steps import Limits, reduce_log_prob, standard_normal
from agents.core.errors import UserError
from agents.core.fields import Field
from agents.core.noise_paths import Point
from agents.core.packed_convolutions import packed
from agents.core.policy_gradient import ppo_clip
from agents.core.sampling import Chain, Sampler
from agents.core.step_rules import Posterior
from agents.generative_policies.fine_tuning import FineTuner, PolicyLoss
from agents.generative_policies.fine_tuning_config import FineTuningConfig
from agents.generative_policies.policy import DenoisingPolicy
from agents.on_policy.config import Ranges, not_negative

CLIP_RATE = 3.0
"""How steeply the clip grows along a chain, in e-foldings (DPPO 3)."""


@dataclass(frozen=True)
class DPPOConfig(FineTuningConfig):
    """DPPO; defaults are the paper's for gym unless a field says otherwise."""

    fine_tuned_steps: int = 10
    """K', last steps of a chain that learn, or the whole chain where it is shorter; 0 for the whole chain (DPPO 10 of
    20 from states, all 5 from pixels)."""
    eta: float = 1.0
    """Share of the posterior's noise that is drawn while exploring: 1 is DDPM."""
    exploration_std: float = 0.1
    """Floor of the noise of every step while exploring (DPPO .1, furniture .04)."""
    log_prob_std: float = 0.1
    """Floor of the spread that log-probabilities are computed with."""
    noise_limit: float = 3.0
    """Clip of the noise that is drawn, in spreads; 0 for none."""
    lowest_log_prob: float = -5.0
    """Floor of the log-probability of each number of a chunk, below which it has no gradient."""
    highest_log_prob: float = 2.0
    """Likewise its ceiling."""
    clip_base: float = 0.01
    """Largest |ratio - 1| of the first fine-tuned step; it grows along the chain to `clip` (DPPO .01 in gym, .001 in
    Robomimic)."""
    denoising_discount: float = 0.99
    """Discount of the advantage for every denoising step before the last (DPPO .99, furniture .9)."""
    bc_coefficient: float = 0.0
    """Weight of -log-probability of the base's own chains (DPPO's furniture .1)."""

    RANGES: ClassVar[Ranges] = (
        ("fine_tuned_steps noise_limit bc_coefficient", not_negative, "0 or more"),
        ("exploration_std log_prob_std", lambda value: 0 < value < math.inf, "a positive number"),
        ("eta", lambda value: 0 < value <= 1, "a number above 0, up to 1"),
        ("lowest_log_prob highest_log_prob", math.isfinite, "a finite number"),
        ("clip_base", lambda value: 0 < value < 1, "a number in (0, 1)"),
        ("denoising_discount", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if not self.lowest_log_prob < self.highest_log_prob:
            raise UserError(
                f"log-probabilities lie between lowest_log_prob {self.lowest_log_prob} and highest_log_prob "
                f"{self.highest_log_prob}; give two increasing numbers"
            )
        if self.clip_base > self.clip:
            raise UserError(
                f"the clip grows along a chain, from clip_base {self.clip_base} to clip {self.clip}; lower clip_base "
                "or raise clip"
            )


def clip_schedule(steps: int, first: float, last: float) -> Tensor:
    """Return the clip of every fine-tuned step, float32 [steps], growing exponentially from `first` to `last`."""
    place = torch.linspace(0, 1, steps) if steps > 1 else torch.ones(1)
    return first + (last - first) * torch.expm1(CLIP_RATE * place) / math.expm1(CLIP_RATE)


class DPPO(FineTuner):
    """The agent; see the module's docstring, and `FineTuner` for arguments."""

    config: DPPOConfig
    base: DenoisingPolicy
    keeps_base = True

    def prepare(self) -> dict[str, Field]:
        """See `FineTuner.prepare`: the learned part of the chain, and its log-probabilities."""
        config = self.config
        limits = Limits(
            x0=self.policy.config.clip_x0 or None,
            noise=config.noise_limit or None,
            min_std=config.exploration_std,
            min_log_prob_std=config.log_prob_std,
        )
        self.sampler: Sampler = self.policy.sampler(Posterior(config.eta), limits=limits)
        self._take_over(self._hand_over(self.sampler.points))
        self.clips = clip_schedule(self.learned, config.clip_base, config.clip).to(self.device)
        before = torch.arange(self.learned - 1, -1, -1, device=self.device)
        self.weights = config.denoising_discount**before
        return {
            "chain": Field((self.learned + 1, *self.policy.shape)),
            "log_prob": Field((self.learned,)),
        }

    def _hand_over(self, points: Sequence[Point]) -> float:
        """Return the time at which the policy takes over from the base in a chain of these points."""
        steps = len(points) - 1
        return points[max(0, steps - (self.config.fine_tuned_steps or steps))].t

    def _take_over(self, time: float) -> None:
        """Let the policy take the steps that begin at `time` or nearer to the data."""
        times = [point.t for point in self.sampler.points[:-1]]
        self.first = sum(t > time + 1e-6 for t in times)
        self.learned = self.sampler.steps - self.first

    def trained_as(self, *configs: Any) -> None:
        """See `Agent.trained_as`: in a chain of other steps, too, the policy acts at the noise levels it has learned.

        Raises:
            UserError: the chain has no step there.
        """
        steps = configs[1].denoising_steps
        time = self._hand_over(self.policy.path.points(self.policy.path.times(steps)))
        self._take_over(time)
        if not self.learned:
            raise UserError(
                f"denoising_steps is {self.sampler.steps}: none of these steps is at a noise level that was "
                f"fine-tuned, the last {self.config.fine_tuned_steps} of {steps}; give more"
            )

    def clip_widths(self) -> Tensor:
        """See `FineTuner.clip_widths`: one for every fine-tuned step."""
        return self.clips

    def draw(self, observation: Observation) -> tuple[Tensor, dict[str, Tensor]]:
        """See `FineTuner.draw`."""
        chain = self._chain(observation, self.policy)
        log_prob = torch.stack([self._reduced(step) for step in chain.log_prob], dim=1)
        remembered = {"chain": chain.samples.transpose(0, 1), "log_prob": log_prob}
        return self.policy.colored(chain.data), remembered

    def choose(self, observation: Observation) -> Tensor:
        """See `FineTuner.choose`: here, too, the base begins; at its noise levels the policy has learned nothing."""
        if not self.first:
            return super().choose(observation)
        sampler, count = self.evaluation_sampler(), len(next(iter(observation.values())))
        x = self.policy.start(count, self.acting, self.device)
        halves = (self.base, range(self.first)), (self.policy, range(self.first, sampler.steps))
        for policy, steps in halves:
            condition = policy.condition(observation)
            with packed():
                x = sampler.sample(policy.denoise, x, condition, self.acting, steps=steps)
        return self.policy.colored(x)

    def policy_loss(
        self, observation: Observation, extras: dict[str, Tensor], advantage: Tensor
    ) -> PolicyLoss:
        """See `FineTuner.policy_loss`: PPO's, of every pair of decision and fine-tuned step."""
        condition = self.policy.condition(observation)
        log_ratio = self._log_prob(extras["chain"], condition) - extras["log_prob"]
        loss = ppo_clip(log_ratio, advantage[:, None] * self.weights, clip=self.clips).mean()
        metrics: dict[str, Tensor] = {}
        if self.config.bc_coefficient:
            with torch.no_grad():
                imitated = self._chain(observation, self.base).samples.transpose(0, 1)
            imitation = -self._log_prob(imitated, condition).mean()
            loss = loss + self.config.bc_coefficient * imitation
            metrics["loss/imitation"] = imitation.detach()
        return PolicyLoss(loss, log_ratio, metrics)

    def _chain(self, observation: Observation, policy: DenoisingPolicy) -> Chain:
        """Return chains that the base begins and `policy` goes on with."""
        sampler, count = self.sampler, len(next(iter(observation.values())))
        x = standard_normal((count, *self.policy.shape), self.generator, device=self.device)
        if self.first:
            condition = self.base.condition(observation)
            steps = range(self.first)
            x = sampler.sample(self.base.denoise, x, condition, self.generator, steps=steps)
        steps = range(self.first, sampler.steps)
        condition = policy.condition(observation)
        return sampler.chain(policy.denoise, x, condition, self.generator, steps=steps)

    def _log_prob(self, chain: Tensor, condition: Tensor) -> Tensor:
        """Return the log-probabilities [M, K'] of chains [M, K' + 1, H, A] under the policy now."""
        index = torch.arange(self.first, self.sampler.steps, device=chain.device)
        each = self.sampler.log_prob(
            self.policy.denoise,
            chain[:, :-1].flatten(0, 1),
            chain[:, 1:].flatten(0, 1),
            index.repeat(len(chain)),
            condition.repeat_interleave(self.learned, 0),
        )
        return self._reduced(each).view(len(chain), self.learned)

    def _reduced(self, log_prob: Tensor) -> Tensor:
        """Return a step's log-probability [B] from those of its numbers [B, H, A]."""
        bounds = self.config.lowest_log_prob, self.config.highest_log_prob
        return reduce_log_prob(log_prob[:, : self.executed].clamp(*bounds), "mean")
