"""Is the reward still worth climbing? What every evaluation measures, and when a run has begun to hack its reward.

A reward that is optimized stops to measure what it was meant to measure. So every evaluation draws the same held-out
prompts from the same noise, and measures

- the **proxy**, the reward that is optimized, and the **gold** reward, which is not,
- **diversity**: the distance of images of one prompt, and recall and precision against the base's images of these
  prompts (Kynkaanniemi et al. 2019, arXiv:1904.06991). These begin with other noise: from the same one a model that
  hardly moved draws the base's images again, and covers them whatever it has lost. So the base itself has less than 1,
  and the first evaluation says how much,
- the **KL** of the model's chains to the base's, in nats of a whole chain, with one sampler for all methods.

An evaluation is *on the frontier* if no earlier one had more gold at no larger KL (gold against KL: Gao et al. 2023,
arXiv:2210.10760); more by `tolerance` standard errors of the difference, prompt by prompt. A run that has been off the
frontier for `patience` evaluations only pays: it stops, and its best checkpoint is the one of the most gold.

Distances are of images averaged down to 8 x 8 pixels. That is crude, needs no downloaded network, and sees what
collapses: colors, places, numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.core.chain_steps import standard_normal
from agents.core.errors import UserError
from agents.core.step_rules import Posterior
from agents.generative_models.chains import STILL
from agents.generative_models.credit import RewardFunction, rewards_in_batches
from agents.generative_models.text_to_image import TextToImage

SIDE = 8
"""Pixels of the side of images whose distances are measured."""
NEIGHBORS = 3
"""An image is covered by those nearer to another than its third neighbor (Kynkaanniemi et al.: 3)."""


@dataclass(frozen=True)
class MonitorSettings:
    """What is measured, and when a run stops."""

    eval_prompts: int = 24
    """Held-out prompts of an evaluation."""
    eval_images: int = 4
    """Images of each."""
    eval_steps: int = 10
    """Denoising steps of an image, deterministic (Flow-GRPO 40)."""
    kl_images: int = 24
    """Chains whose KL to the base is measured."""
    patience: int = 4
    """Evaluations off the frontier after which the run stops; 0 never stops it."""
    tolerance: float = 2.0
    """Standard errors by which an earlier gold must be higher: with 1, noise alone ends many runs."""
    most_kl: float = math.inf
    """KL, in nats of a chain, above which the run stops."""
    least_recall: float = 0.0
    """Recall below which the run stops."""

    def __post_init__(self) -> None:
        """Reject values that measure nothing."""
        for name in ("eval_prompts", "eval_steps", "kl_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.eval_images < 2 or self.eval_prompts * self.eval_images <= NEIGHBORS:
            raise UserError(
                f"{self.eval_images} images of {self.eval_prompts} prompts have no distances to measure; give 2 of "
                "each prompt or more"
            )
        if self.patience < 0 or not self.tolerance >= 0 or not self.most_kl > 0:
            raise UserError("patience and tolerance are 0 or more, most_kl is more than 0")
        if math.isnan(self.least_recall):
            raise UserError("least_recall is nan; give a share in [0, 1]")


@dataclass(frozen=True)
class Measurement:
    """One evaluation.

    Attributes:
        step: iterations before it.
        values: scalars by name: proxy, gold, further rewards, distance, recall, precision, kl.
        gold_by_prompt: means over each prompt's images, [P].
    """

    step: int
    values: dict[str, float]
    gold_by_prompt: list[float]


def features(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] as vectors [B, D] whose distances are measured."""
    side = min(SIDE, images.shape[-1])
    return F.adaptive_avg_pool2d(images, side).flatten(1)


def group_distance(vectors: Tensor, count: int) -> Tensor:
    """Return the mean distance of two images of one prompt, per number (root mean square), 0-d.

    Args:
        vectors: [P * count, D], prompt by prompt.
        count: images of a prompt, at least 2.
    """
    groups = vectors.view(-1, count, vectors.shape[1])
    distances = torch.cdist(groups, groups) / math.sqrt(vectors.shape[1])
    return distances.sum((1, 2)).mean() / (count * (count - 1))


def coverage(covered: Tensor, covering: Tensor) -> Tensor:
    """Return the share of vectors [N, D] that lie within some `covering` [M, D] one's third neighbor, 0-d.

    Of base images by the model's it is recall, the other way round precision.
    """
    radius = (
        torch.cdist(covering, covering).kthvalue(NEIGHBORS + 1, 1).values
    )  # the first is itself
    return (torch.cdist(covered, covering) <= radius).any(1).float().mean()


@torch.no_grad()
def chain_kl(
    model: TextToImage,
    reference: TextToImage,
    condition: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Return an estimate of KL(model's chains || reference's) in nats, 0-d, from one chain of each condition.

    The sum over steps of KLs of Gaussians, which is exact given the chain; the step to the data has no noise.

    Args:
        model: draws.
        reference: judges.
        condition: [B, L, F].
        steps: of the chains, by the posterior's rule (DDPM's), whatever noise training has.
        guidance: scale, of both.
        seed: of the noise.
    """
    noise = torch.Generator(condition.device).manual_seed(seed)
    sampler = model.sampler(max(steps, 2), Posterior(1.0))
    x = standard_normal((len(condition), *model.shape), noise, device=condition.device)
    ours, theirs = model.guided(guidance), reference.guided(guidance)
    total = torch.zeros(len(x), device=x.device)
    for index in sampler.stochastic:
        step = sampler.step(ours, x, index, condition)
        other = sampler.step(theirs, x, index, condition)
        total += step.kl(other.mean).flatten(1).sum(1)
        x = step.mean + step.std * standard_normal(x.shape, noise, device=x.device)
    return total.mean()


class Monitor:
    """Measures a model beside its reference, and remembers.

    Args:
        prompts: held out; the first `eval_prompts` are used.
        rewards: by name, `proxy` and `gold` among them.
        settings: what and when.
        guidance: scale of all images.
        seed: of all noise.
        batch_size: images in a pass.

    Attributes:
        prompts: that are used.
        history: all measurements.
        images: of the last one, [P * eval_images, 3, H, W], prompt by prompt.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        rewards: Mapping[str, RewardFunction],
        settings: MonitorSettings,
        *,
        guidance: float,
        seed: int,
        batch_size: int = 64,
    ) -> None:
        if not prompts:
            raise UserError("there are no held-out prompts to evaluate on; give some")
        self.prompts = list(prompts[: settings.eval_prompts])
        if len(self.prompts) * settings.eval_images <= NEIGHBORS:
            raise UserError(
                f"{len(self.prompts)} prompts of {settings.eval_images} images are too few to measure recall; give more"
            )
        self.rewards, self.settings = dict(rewards), settings
        self.guidance, self.seed, self.batch_size = guidance, seed, batch_size
        self.history: list[Measurement] = []
        self.images = torch.empty(0)
        self._base: Tensor | None = None

    @property
    def asked(self) -> list[str]:
        """The prompt of every image."""
        return [prompt for prompt in self.prompts for _ in range(self.settings.eval_images)]

    def draw(self, model: TextToImage, *, other_noise: bool = False) -> Tensor:
        """Return a model's images of the evaluation, [P * eval_images, 3, H, W]: always from the same noise.

        Args:
            model: draws.
            other_noise: than that of evaluations, but again the same at every call.
        """
        return model.generate(
            self.asked, seed=self.seed + other_noise, steps=self.settings.eval_steps, rule=STILL,
            scale=self.guidance, batch=self.batch_size, label="evaluation",
        )  # fmt: skip

    @torch.no_grad()
    def measure(self, step: int, model: TextToImage, reference: TextToImage) -> Measurement:
        """Return what a model is like after `step` iterations, and remember it."""
        if self._base is None:
            self._base = features(self.draw(reference, other_noise=True))
        self.images = self.draw(model)
        scores = {
            name: rewards_in_batches(
                reward, self.images, self.asked, batch=self.batch_size, device=model.device
            )
            for name, reward in self.rewards.items()
        }
        vectors = features(self.images)
        condition = model.encode(self.asked[: self.settings.kl_images])
        values = {name: score.mean() for name, score in scores.items()} | {
            "distance": group_distance(vectors, self.settings.eval_images),
            "recall": coverage(self._base, vectors),
            "precision": coverage(vectors, self._base),
            "kl": chain_kl(
                model, reference, condition, steps=self.settings.eval_steps,
                guidance=self.guidance, seed=self.seed,
            ),
        }  # fmt: skip
        by_prompt = scores["gold"].view(-1, self.settings.eval_images).mean(1)
        said = Measurement(step, {n: float(v) for n, v in values.items()}, by_prompt.tolist())
        self.history = [each for each in self.history if each.step < step] + [said]
        return said

    def why_stop(self) -> str | None:
        """Return why the run is to stop, if it is."""
        if not self.history:
            return None
        settings, now = self.settings, self.history[-1].values
        if now["kl"] > settings.most_kl:
            return (
                f"the KL to the base is {now['kl']:.3g} nats, above --most-kl {settings.most_kl:g}"
            )
        if now["recall"] < settings.least_recall:
            return f"recall is {now['recall']:.2f}, below --least-recall {settings.least_recall:g}"
        if not settings.patience or len(self.history) <= settings.patience:
            return None
        on = on_frontier(self.history, settings.tolerance)
        if not any(on[-settings.patience :]):
            return (
                f"the last {settings.patience} evaluations (--patience) have less gold at more KL than an earlier one: "
                "the reward is being hacked"
            )
        return None

    def get_state(self) -> list[dict[str, Any]]:
        """Return the history as a tree."""
        return [vars(each) for each in self.history]

    def set_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restore `get_state`."""
        self.history = [Measurement(**each) for each in state]


def on_frontier(history: Sequence[Measurement], tolerance: float) -> list[bool]:
    """Return for every measurement whether no earlier one had more gold at no larger KL.

    Args:
        history: in order.
        tolerance: standard errors of the mean difference, prompt by prompt, by which gold must be more.
    """
    result = []
    for place, now in enumerate(history):
        dominated = False
        for before in history[:place]:
            difference = torch.tensor(before.gold_by_prompt) - torch.tensor(now.gold_by_prompt)
            error = float(difference.std(correction=0)) / math.sqrt(len(difference))
            more = float(difference.mean()) > tolerance * error + 1e-12
            dominated |= more and before.values["kl"] <= now.values["kl"]
        result.append(not dominated)
    return result
