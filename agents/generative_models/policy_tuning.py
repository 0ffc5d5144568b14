"""Policy gradients of denoising steps: DDPO, DPOK, Flow-GRPO and its descendants, as `methods` lists them.

Each stochastic step of an image's chain is an action with a log-probability, and the image's reward is every one's. A
gradient step is of a few passes with all their steps, never of some steps of an image's chain without the others;
gradients of (pass, step) pairs are added up, so memory is that of one. A pair's ratio, and the clip, come from
`agents.core.policy_gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agents.core.advantages import ConditionStatistics
from agents.core.chain_steps import reduce_log_prob
from agents.core.errors import UserError
from agents.core.policy_gradient import (
    asymmetric_trust_region,
    dual_clip,
    masked,
    ppo_clip,
    ratio_metrics,
    reinforce,
    spo,
)
from agents.core.sampling import Sampler
from agents.generative_models.chains import ChainBatch
from agents.generative_models.credit import ChainValue, image_advantage
from agents.generative_models.ratio_rules import (
    ClipBounds,
    clip_bounds,
    normalized_log_ratio,
    step_weights,
)
from agents.generative_models.tuner import (
    GeneratorTuner,
    Metrics,
    mean_metrics,
    parts,
    reward_metrics,
)

WITH_ONE_CLIP: dict[str, Callable[..., Tensor]] = {
    "dual_clip": dual_clip, "masked": masked, "spo": spo, "asymmetric": asymmetric_trust_region,
}  # fmt: skip
"""Surrogates that know one clip; its upper bound is meant."""


class Pass(NamedTuple):
    """Images of one pass, and how good their steps were."""

    batch: ChainBatch
    advantage: dict[int, Tensor]
    """Of each stochastic step by its index, [B]."""
    kept: Tensor
    """bool [B]: those that say something."""


class PolicyTuner(GeneratorTuner):
    """Learns from denoising steps; see the module and `GeneratorTuner`.

    Attributes:
        bounds: of a step's ratio.
        value: DPOK's, or None.
    """

    bounds: ClipBounds

    def __init__(self, *arguments: Any, seed: int = 0, **keywords: Any) -> None:
        super().__init__(*arguments, seed=seed, **keywords)
        config = self.config
        self.needs_mean = config.ratio_norm or config.surrogate == "divergence"
        if not self.sampler().stochastic:
            raise UserError(
                f"{config.denoising_steps} denoising steps of noise level {config.noise_level:g} draw no noise to "
                "learn from; give at least 2 steps and a level above 0"
            )
        self.bounds = clip_bounds(config.clip, self.dimension, config.log_prob)
        self.history = ConditionStatistics(config.history, config.history_least)
        self.value: ChainValue | None = None
        if config.credit == "value":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                features = self.model.unconditional(1).shape[-1]
                self.value = ChainValue(self.dimension, features).to(self.device)
            self.value_optimizer = torch.optim.Adam(
                self.value.parameters(), lr=config.value_learning_rate
            )

    # ---------------------------------------------------------------------------------- learning

    def pass_size(self, images: int) -> int:
        """Return what makes passes that `updates` gradient steps can share out: each step is of whole chains."""
        updates = self.config.updates
        rounds = math.ceil(images / (updates * self.config.batch_size))
        return math.ceil(images / (updates * rounds))

    def iterate(self, batch: Sequence[str]) -> Metrics:
        """See `GeneratorTuner.iterate`."""
        sampler, batches = self.draw(batch)
        self.iterations += 1
        reward = self.ranks.gathered(self.score_batches(batches))
        images = self.config.group
        group = torch.arange(len(batch), device=self.device).repeat_interleave(images)
        prompts = [prompt for prompt in batch for _ in range(images)]
        advantage, kept = image_advantage(reward, group, prompts, self.config, self.history)
        metrics = reward_metrics(reward, kept)
        if kept.any():
            sizes, here = [len(each) for each in batches], self.ranks.span(len(prompts), "images")
            passes = [
                Pass(each, dict.fromkeys(sampler.stochastic, own), own_kept)
                for each, own, own_kept in zip(
                    batches, advantage[here].split(sizes), kept[here].split(sizes), strict=True
                )
            ]
            if self.value is not None:
                metrics |= self._learn_value(sampler, passes)
                passes = self._against_values(sampler, passes)
            metrics |= self.learn(sampler, passes)
        return metrics

    def learn(self, sampler: Sampler, passes: Sequence[Pass]) -> Metrics:
        """Take an iteration's gradient steps on the passes that `sampler` drew."""
        weights = step_weights(self.config.step_weight, sampler)
        metrics: list[Metrics] = []
        for _ in range(self.config.epochs):
            for part in parts(self.shuffled(len(passes)), min(self.config.updates, len(passes))):
                chosen = [
                    (passes[place], index)
                    for place in part
                    for index in self._chosen_steps(sampler)
                    if passes[place].kept.any()
                ]
                count = self.ranks.total(sum(int(each.kept.sum()) for each, _ in chosen))
                if count:
                    backward = partial(self._backward, sampler, chosen, weights, count)
                    metrics.append(self.descend(backward))
        said = mean_metrics(metrics)
        if metrics and "ratio/largest_deviation" in metrics[0]:
            # Above 0, something else than the policy has changed since the images were drawn.
            said["ratio/first_deviation"] = metrics[0]["ratio/largest_deviation"]
        return said

    def _backward(
        self,
        sampler: Sampler,
        pairs: Sequence[tuple[Pass, int]],
        weights: dict[int, float],
        count: int,
    ) -> Metrics:
        """Add up the gradients of pairs of pass and step; the loss is their mean over `count` kept images."""
        if not pairs:  # another process has some
            return {}
        metrics = []
        for each, index in pairs:
            loss, said = self.step_loss(
                sampler, each.batch, index, each.advantage[index], each.kept
            )
            (loss * (weights[index] / count)).backward()
            metrics.append(said)
        largest = torch.stack([said["ratio/largest_deviation"] for said in metrics]).max()
        return mean_metrics(metrics) | {"ratio/largest_deviation": largest}

    def step_loss(
        self, sampler: Sampler, batch: ChainBatch, index: int, advantage: Tensor, kept: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Return the loss of one step of a pass's images, summed over those that are kept, and metrics.

        Args:
            sampler: that drew the chains.
            batch: the images.
            index: of the step.
            advantage: [B].
            kept: bool [B], some of them true.
        """
        config = self.config
        x, drawn = batch.samples[index], batch.samples[index + 1]
        reference = None
        if config.kl:  # first: compiled, it keeps activations for a moment (see `forward_passes`)
            with torch.no_grad():
                reference = sampler.step(self.guided(self.reference), x, index, batch.condition)
        step = sampler.step(self.guided(self.model), x, index, batch.condition)
        log_ratio = reduce_log_prob(step.log_prob(drawn), config.log_prob) - batch.log_prob[index]
        if config.ratio_norm:
            log_ratio = normalized_log_ratio(log_ratio, step, batch.mean[index], config.log_prob)
        divergence = None
        if config.surrogate == "divergence":
            divergence = reduce_log_prob(step.kl(batch.mean[index]), "mean")
        loss = self._surrogate(log_ratio, advantage, divergence)
        metrics = ratio_metrics(log_ratio[kept], clip=self.bounds.high)
        metrics["loss/policy"] = loss[kept].mean().detach()
        if reference is not None:
            kl = reduce_log_prob(step.kl(reference.mean), "mean")
            loss = loss + config.kl * kl
            metrics["loss/kl"] = kl[kept].mean().detach()
        return loss[kept].sum(), metrics

    def _surrogate(self, log_ratio: Tensor, advantage: Tensor, divergence: Tensor | None) -> Tensor:
        """Return the loss of each image's step, [B]."""
        name, (low, high) = self.config.surrogate, self.bounds
        if name == "reinforce":
            return reinforce(log_ratio, advantage)
        if name == "ppo_clip":
            return ppo_clip(log_ratio, advantage, clip=low, clip_high=high)
        if name == "divergence":
            largest = self.config.clip / self.dimension
            return masked(log_ratio, advantage, clip=largest, divergence=divergence)
        return WITH_ONE_CLIP[name](log_ratio, advantage, clip=high)

    def _chosen_steps(self, sampler: Sampler) -> list[int]:
        """Return the steps that a pass is learned from, in random order."""
        steps = sampler.stochastic
        count = max(1, round(self.config.step_share * len(steps)))
        return [steps[place] for place in self.shuffled(len(steps))[:count]]

    # ------------------------------------------------------------------------------------- value

    def _learn_value(self, sampler: Sampler, passes: Sequence[Pass]) -> Metrics:
        """Regress the value of every step of some passes to their images' rewards."""
        assert self.value is not None
        losses = []
        for _ in range(self.config.value_updates):
            each = passes[self.shuffled(len(passes))[0]]
            errors = [
                self._expected(sampler, each.batch, index) - each.advantage[index]
                for index in sampler.stochastic
            ]
            loss = torch.stack(errors).square().mean()
            self.value_optimizer.zero_grad(set_to_none=True)
            (loss * (len(each.batch) / self.ranks.total(len(each.batch)))).backward()
            self.ranks.add_gradients(list(self.value.parameters()))
            self.value_optimizer.step()
            losses.append(loss.detach())
        return {"loss/value": torch.stack(losses).mean()}

    @torch.no_grad()
    def _against_values(self, sampler: Sampler, passes: Sequence[Pass]) -> list[Pass]:
        """Return passes whose advantages are rewards minus values, brought to mean 0 and spread 1 over all of these."""
        errors = [
            {i: own - self._expected(sampler, each.batch, i) for i, own in each.advantage.items()}
            for each in passes
        ]
        everything = torch.cat([error for own in errors for error in own.values()])
        everything = self.ranks.gathered(everything)
        mean, spread = everything.mean(), everything.std(correction=0) + 1e-6
        limit = self.config.advantage_limit
        return [
            each._replace(
                advantage={
                    i: ((error - mean) / spread).clamp(-limit, limit) for i, error in own.items()
                }
            )
            for each, own in zip(passes, errors, strict=True)
        ]

    def _expected(self, sampler: Sampler, batch: ChainBatch, index: int) -> Tensor:
        """Return what the value expects of a step of a pass's images, [B]."""
        assert self.value is not None
        t = torch.full((len(batch),), sampler.points[index].t, device=self.device)
        return self.value(batch.samples[index], t, batch.condition)

    # ------------------------------------------------------------------------------------- state

    def networks(self) -> dict[str, nn.Module]:
        """See `GeneratorTuner.networks`."""
        own: dict[str, nn.Module] = {} if self.value is None else {"value": self.value}
        return super().networks() | own

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `GeneratorTuner.optimizers`."""
        own = {} if self.value is None else {"value": self.value_optimizer}
        return super().optimizers() | own

    def extra_state(self) -> dict[str, Any]:
        """See `GeneratorTuner.extra_state`."""
        return super().extra_state() | {"history": self.history.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """See `GeneratorTuner.load_extra_state`."""
        super().load_extra_state(state)
        self.history.load_state_dict(state["history"])
