"""FPO and FPO++: policy gradients for flows without likelihoods.

Flow Policy Optimization (McAllister et al. 2025, https://arxiv.org/abs/2507.21053) puts a difference of denoising
losses in the place of a log-ratio. A chunk that was drawn gets D pairs of noise and time and the loss of each, which a
rollout remembers; the policy that learns is asked for the same losses again, and log_ratio = mean(old loss - new loss).
FPO++ (Yi et al. 2026, https://arxiv.org/abs/2602.02481) is this with other settings: a ratio of every pair, clipped by
itself; an asymmetric trust region where a policy learns from scratch; bounded losses; zero noise in evaluation.

Differences from the papers' code, beside those of `fine_tuning`:

- FPO computes advantages again for every minibatch with the value as it is then; here once, before the passes.
- The network's output is not scaled by .25; times are drawn as the policy's config says, not from the chain's own.
- Episodes begin as the task draws them; FPO's training environments repeat their first state.
- A loss is the mean over a chunk's numbers (FPO), so that one clip suits chunks of any size; FPO++ sums over
  manipulation chunks: `loss_scale` is the factor between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from agents.core import policy_gradient
from agents.core.agent import Observation
from agents.core.chain_steps import standard_normal
from agents.core.denoising import convert, corrupt, squared_error
from agents.core.errors import UserError
from agents.core.fields import Field
from agents.core.noise_paths import Prediction
from agents.generative_policies.fine_tuning import FineTuner, PolicyLoss
from agents.generative_policies.fine_tuning_config import FineTuningConfig
from agents.generative_policies.policy import DenoisingPolicy
from agents.on_policy.config import Ranges, at_least_one, not_negative, positive

Surrogate = Literal["ppo_clip", "spo", "asymmetric_trust_region"]


@dataclass(frozen=True)
class FPOConfig(FineTuningConfig):
    """FPO; defaults from its code for continuous control unless a field says otherwise."""

    learning_rate: float = 3e-4
    """Adam step size of the policy (FPO 3e-4, FPO++ 1e-4, 1e-5 when it fine-tunes)."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic (FPO 3e-4, FPO++'s fine-tuning 1e-4)."""
    target_kl: float = math.inf
    """Estimate, from log-ratios, of KL(old || new) after which the remaining passes are left out (neither has one)."""
    clip: float = 0.05
    """Largest |ratio - 1| (both .05; FPO++'s motion tracking .01)."""
    draws: int = 8
    """D, pairs of noise and time for every chunk (FPO 8, FPO++ 16, 8 when it fine-tunes)."""
    per_draw: bool = False
    """Clip a ratio of every pair by itself (FPO++), not the ratio of their mean (FPO)."""
    surrogate: Surrogate = "ppo_clip"
    """What keeps ratios near 1 (FPO++: asymmetric_trust_region from scratch, ppo_clip when it fine-tunes)."""
    regression: Prediction = "noise"
    """What a loss compares, whatever the network predicts (FPO noise, FPO++ velocity)."""
    loss_scale: float = 1.0
    """Factor of every loss; the number of a chunk's actions for a sum over them (FPO++'s manipulation)."""
    loss_limit: float = 0.0
    """Ceiling of a loss, above which it has no gradient; 0 for none (FPO++ bounds them; by how much is ours)."""
    difference_limit: float = 0.0
    """Largest difference of two losses before the exponential; 0 for no bound (FPO's code: none where losses are
    averaged before, 3 where every pair has a ratio of its own)."""

    RANGES: ClassVar[Ranges] = (
        ("draws", at_least_one, "a positive number"),
        ("loss_scale", positive, "a positive number"),
        ("loss_limit difference_limit", not_negative, "0 or more"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if self.surrogate not in SURROGATES:
            raise UserError.unknown("surrogate", self.surrogate, SURROGATES)


SURROGATES = {
    "ppo_clip": policy_gradient.ppo_clip,
    "spo": policy_gradient.spo,
    "asymmetric_trust_region": policy_gradient.asymmetric_trust_region,
}
"""From a log-ratio and an advantage to a loss per sample, by name."""

FPO_PLUS_PLUS = FPOConfig(
    learning_rate=1e-4, draws=16, per_draw=True, surrogate="asymmetric_trust_region",
    regression="velocity", loss_limit=20.0, difference_limit=3.0,
)  # fmt: skip
"""FPO++ from scratch; for fine-tuning its authors take surrogate ppo_clip, 8 draws and a learning rate of 1e-5."""


def denoising_losses(
    policy: DenoisingPolicy,
    condition: Tensor,
    chunk: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    regression: Prediction,
    counted: int,
) -> Tensor:
    """Return the losses of a policy at given noise and times, [M, D].

    Args:
        policy: whose.
        condition: [M, C].
        chunk: [M, H, A], in the actions' coordinates.
        noise: standard normal [M, D, H, A].
        t: [M, D].
        regression: what is compared, the prediction brought to that form.
        counted: first actions of a chunk that count.
    """
    draws = t.shape[1]
    x0, times = chunk.repeat_interleave(draws, 0), t.flatten()
    colored = policy.colored(noise.flatten(0, 1))
    x, _ = corrupt(policy.path, regression, x0, colored, times)
    said = policy.denoiser(x, times, condition.repeat_interleave(draws, 0))
    said = convert(said, x, times, policy.path, policy.config.prediction, regression)
    target = policy.path.target(regression, x0, colored, times)
    return squared_error(said[:, :counted], target[:, :counted]).view(-1, draws)


class FPO(FineTuner):
    """The agent; see the module's docstring, and `FineTuner` for arguments."""

    config: FPOConfig

    def prepare(self) -> dict[str, Field]:
        """See `FineTuner.prepare`: a chunk as it was drawn, and its losses with the noise and times they are of."""
        self.surrogate = partial(SURROGATES[self.config.surrogate], clip=self.config.clip)
        draws = self.config.draws
        return {
            "chunk": Field(self.policy.shape),
            "noise": Field((draws, *self.policy.shape)),
            "time": Field((draws,)),
            "loss": Field((draws,)),
        }

    def draw(self, observation: Observation) -> tuple[Tensor, dict[str, Tensor]]:
        """See `FineTuner.draw`."""
        policy, draws = self.policy, self.config.draws
        condition = policy.condition(observation)
        count, generator = len(condition), self.generator
        start = standard_normal((count, *policy.shape), generator, device=self.device)
        chain = policy.acting.chain(policy.denoise, start, condition, generator)
        chunk = policy.colored(chain.samples[-1])  # as it was drawn: clipping is the task's
        noise = standard_normal((count, draws, *policy.shape), generator, device=self.device)
        t = policy.training_times((count, draws), generator, device=self.device)
        loss = self._losses(condition, chunk, noise, t)
        return chunk, {"chunk": chunk, "noise": noise, "time": t, "loss": loss}

    def policy_loss(
        self, observation: Observation, extras: dict[str, Tensor], advantage: Tensor
    ) -> PolicyLoss:
        """See `FineTuner.policy_loss`: a surrogate of the differences of losses."""
        condition = self.policy.condition(observation)
        loss = self._losses(condition, extras["chunk"], extras["noise"], extras["time"])
        log_ratio = self.log_ratio(extras["loss"], loss)
        if self.config.per_draw:
            advantage = advantage[:, None].expand_as(log_ratio)
        surrogate = self.surrogate(log_ratio, advantage).mean()
        return PolicyLoss(surrogate, log_ratio, {"loss/denoising": loss.detach().mean()})

    def log_ratio(self, old: Tensor, new: Tensor) -> Tensor:
        """Return what takes the place of log-ratios, of losses [M, D]: [M], or [M, D] where each draw has its own."""
        config = self.config
        if config.loss_limit:
            old, new = old.clamp(max=config.loss_limit), new.clamp(max=config.loss_limit)
        difference = old - new
        if config.difference_limit:
            limit = config.difference_limit
            difference = difference.clamp(-limit, limit)
        return difference if config.per_draw else difference.mean(1)

    def _losses(self, condition: Tensor, chunk: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        losses = denoising_losses(
            self.policy,
            condition,
            chunk,
            noise,
            t,
            regression=self.config.regression,
            counted=self.executed,
        )
        return self.config.loss_scale * losses
