"""What every update from a rollout does, whatever its policy is: credit, passes, gradient steps, and what they tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.core.advantages import generalized_advantage
from agents.core.errors import DivergedError
from agents.core.normalizers import RewardScale
from agents.core.rollout import Evaluate, Experience


class Credit(NamedTuple):
    """What steps were worth, [T, N] each."""

    reward: Tensor
    """As it was learned from."""
    advantage: Tensor
    """How much better than expected every step turned out."""


def credited(
    experience: Experience,
    evaluate: Evaluate,
    scale: RewardScale | None,
    *,
    discount: float,
    gae_lambda: float,
) -> Credit:
    """Return the credit of a rollout's steps, which time limits end with the value of what was seen then.

    Args:
        experience: the rollout, with the values that were seen while acting.
        evaluate: the critic, of what followed.
        scale: of rewards; None leaves them as they are.
        discount: per step.
        gae_lambda: of the generalized advantage estimate.
    """
    value = experience.extras["value"]
    reward = experience.reward if scale is None else scale.scale(experience.reward)
    advantage = generalized_advantage(
        reward,
        value,
        experience.next_values(value, evaluate),
        experience.terminated,
        experience.truncated,
        discount=discount,
        gae_lambda=gae_lambda,
    )
    return Credit(reward, advantage)


def take_in_rewards(scale: RewardScale, experience: Experience) -> None:
    """Take a rollout's rewards into the statistics by which they are scaled, before they are."""
    ended = experience.terminated | experience.truncated
    scale.update(experience.reward, ended, experience.kept)


def passes(
    minibatches: Callable[[], Iterable[Tensor]],
    metrics: Sequence[dict[str, Tensor]],
    *,
    epochs: int,
    target_kl: float,
) -> Iterator[Tensor]:
    """Yield every pass's minibatches, until the policy is too far from the one that acted.

    Args:
        minibatches: one pass's.
        metrics: of the gradient steps so far; the caller adds each step's before it asks for the next minibatch.
        epochs: passes at most.
        target_kl: estimated KL(old || new) after which the remaining passes are left out; infinity asks nothing.
    """
    for _ in range(epochs):
        begun = len(metrics)
        yield from minibatches()
        if math.isfinite(target_kl):  # one synchronization a pass, and only where it was asked for
            seen = [m["ratio/kl"] for m in metrics[begun:] if "ratio/kl" in m]
            if seen and torch.stack(seen).mean() > target_kl:
                return


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients of what an optimizer holds; its `zero_grad` spends 50 microseconds more on bookkeeping."""
    for parameter in _held(optimizer):
        parameter.grad = None


def backward(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float) -> Tensor:
    """Leave a loss's gradients, scaled down, in what an optimizer holds, and return their norm before."""
    moved = _held(optimizer)
    loss.backward(inputs=moved)
    return nn.utils.clip_grad_norm_(moved, max_norm).detach()


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def value_metrics(value: Tensor, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Return how well values [T * N] told their targets, over the steps that are kept."""
    spread = target[kept].var(correction=0)
    unexplained = (target - value)[kept].var(correction=0) / spread.clamp(min=1e-12)
    return {"value/explained_variance": 1 - unexplained, "value/target": target[kept].mean()}


def mean_metrics(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of every metric over the gradient steps that have it; none for no steps.

    What the first step finds is told apart as `ratio/first_deviation`: there, the policy is still the one that acted.

    Here one update's metrics are looked at for the first time, all together: weights that are not finite would
    otherwise show in the next action only, which does not say where they come from.

    Raises:
        DivergedError: a metric is not finite; the text names the first, and its gradient step.
    """
    names = list(dict.fromkeys(name for told in metrics for name in told))
    values = {name: [m[name].float() for m in metrics if name in m] for name in names}
    means = {name: torch.stack(each).mean() for name, each in values.items()}
    if names and not torch.isfinite(torch.stack(list(means.values()))).all():
        _tell_the_first(metrics)
    if "ratio/largest_deviation" in means:
        means["ratio/first_deviation"] = values["ratio/largest_deviation"][0]
    return means


def _tell_the_first(metrics: Sequence[dict[str, Tensor]]) -> None:
    """Raise an error that names the first metric which is not finite."""
    for step, told in enumerate(metrics):
        bad = [name for name, value in told.items() if not value.isfinite()]
        if bad:
            # What makes the others so, where it is among them.
            name = "ratio/kl" if "ratio/kl" in bad else bad[0]
            culprit = "a log-ratio" if name == "ratio/kl" else name
            raise DivergedError(
                f"{culprit} is not finite (its metric is {told[name].item()}) in gradient step {step + 1} of "
                f"{len(metrics)} of an update",
                "lower the learning rate or the epochs",
            )
