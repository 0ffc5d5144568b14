"""Surrogate objectives on log-ratios: the one place where a ratio is clipped.

A step is anything with a log-probability: an action, one denoising step of an action chunk or of an image, an imagined
action. For every sample, `log_ratio = log_prob_new - log_prob_old` is that of the step under the policy that learns and
the one that acted, and `advantage` says how much better than expected the step turned out. Every surrogate is a
function `(log_ratio, advantage, *, settings) -> loss` of tensors of one shape [*], and raises a ValueError where they
have two: [B, 1] and [B] would broadcast to B times B losses that look like any others. It returns a loss per sample [*]
to be minimized (the caller averages, weights and masks) and computes in float32 whatever it is given: in bfloat16 a
ratio of 1.003 is 1. At `log_ratio = 0` each has the gradient of the policy gradient, -advantage (with the `k1` estimate
of the KL in expectation only).

**Dimension.** A log-probability of d independent parts is a sum. When every part moves by as much, the log-ratio of the
sum is noise that grows with sqrt(d), and a clip that suits 6 joints stops everything at 16,384 latents. Methods that
take the mean over parts instead (DPPO, DDPO, Flow-GRPO) see log-ratios that shrink with 1/sqrt(d), and publish clips
that are smaller by orders of magnitude (1e-2 to 1e-5). A clip makes sense only together with that choice: c on the mean
is d * c on the sum.

Sources stand at each function.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.core.drift import LearnedDrift

LARGEST = 20.0
"""Log-ratio above which the ratio grows linearly: exp(20) is 5e8, and its square still fits float32."""

Divergence = Literal["k1", "k2", "k3"]


def ratio(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio) in float32, continued as a line above exp(20).

    Neither overflow nor a flat end: a ratio that ran away is still told to come back.
    """
    x = log_ratio.float()
    return torch.exp(x.clamp(max=LARGEST)) * (1 + F.relu(x - LARGEST))


def _check_shapes(log_ratio: Tensor, advantage: Tensor) -> None:
    """Raise a ValueError where samples and their advantages have two shapes; nothing is read from the device."""
    if log_ratio.shape != advantage.shape:
        shapes = f"{tuple(log_ratio.shape)} and {tuple(advantage.shape)}"
        raise ValueError(
            f"log-ratios and advantages have the shapes {shapes}; give one advantage for each log-ratio"
        )


def reinforce(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return the score-function loss, without importance weights (Williams 1992).

    At the policy that acted its gradient is the policy gradient; afterwards it is biased, and nothing bounds the step.
    """
    _check_shapes(log_ratio, advantage)
    return -log_ratio.float() * advantage.float()


def ppo_clip(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    clip: float | Tensor = 0.2,
    clip_high: float | Tensor | None = None,
) -> Tensor:
    """Return PPO's pessimistic clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
        log_ratio: [*].
        advantage: [*].
        clip: how far below 1 the ratio may go (and above, unless `clip_high` says otherwise), in (0, 1); a tensor that
            broadcasts to the ratios where samples differ in it (DPPO's denoising steps).
        clip_high: how far above 1 (DAPO, Yu et al. 2025, arXiv:2503.14476: "clip-higher").
    """
    _check_shapes(log_ratio, advantage)
    r, a = ratio(log_ratio), advantage.float()
    high = clip if clip_high is None else clip_high
    clipped = r.clamp(1 - clip, 1 + high)  # type: ignore[arg-type]
    return -torch.minimum(r * a, clipped * a)


def dual_clip(
    log_ratio: Tensor, advantage: Tensor, *, clip: float = 0.2, bound: float = 3.0
) -> Tensor:
    """Return PPO's surrogate with a second bound for negative advantages (Ye et al. 2020, arXiv:1912.09729).

    A step of an old policy that the new one finds far more likely would otherwise have an unbounded loss.

    Args:
        log_ratio: [*].
        advantage: [*].
        clip: as for `ppo_clip`.
        bound: above this ratio, over 1, a negative advantage counts no further (paper 3).
    """
    _check_shapes(log_ratio, advantage)
    a = advantage.float()
    clipped = ppo_clip(log_ratio, advantage, clip=clip)
    return torch.where(a < 0, torch.minimum(clipped, -bound * a), clipped)


def masked(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    clip: float = 0.2,
    divergence: Tensor | None = None,
) -> Tensor:
    """Return the unclipped surrogate without the samples that left the trust region and would leave it further.

    Its gradient with `divergence=None` is `ppo_clip`'s. With a divergence of the two policies at each step, that one
    decides instead of the ratio, which is noise in many dimensions (Flow-DPPO: KL below 1e-5).

    Args:
        log_ratio: [*].
        advantage: [*].
        clip: largest |ratio - 1|, or largest divergence.
        divergence: [*], at least 0, such as the KL of two Gaussians; it gets no gradient.
    """
    _check_shapes(log_ratio, advantage)
    r, a = ratio(log_ratio), advantage.float()
    outside = (r.detach() - 1).abs() > clip if divergence is None else divergence.detach() > clip
    moves_away = a * log_ratio.detach().float() > 0
    return torch.where(outside & moves_away, torch.zeros_like(r), -r * a)


def spo(log_ratio: Tensor, advantage: Tensor, *, clip: float = 0.2) -> Tensor:
    """Return the surrogate of Simple Policy Optimization (Xie et al. 2024, arXiv:2401.16025).

    A parabola whose best ratio is 1 + sign(advantage) * clip: outside, the gradient leads back, where a clip has none.
    """
    _check_shapes(log_ratio, advantage)
    r, a = ratio(log_ratio), advantage.float()
    return -(r * a - a.abs() / (2 * clip) * (r - 1).square())


def asymmetric_trust_region(log_ratio: Tensor, advantage: Tensor, *, clip: float = 0.05) -> Tensor:
    """Return `ppo_clip` where the advantage is not negative, `spo` where it is (ASPO of FPO++, arXiv:2602.02481)."""
    _check_shapes(log_ratio, advantage)
    return torch.where(
        advantage >= 0,
        ppo_clip(log_ratio, advantage, clip=clip),
        spo(log_ratio, advantage, clip=clip),
    )


def discovered_drift(
    log_ratio: Tensor, advantage: Tensor, *, alpha: float = 2.0, beta: float = 0.6
) -> Tensor:
    """Return the loss of Discovered Policy Optimisation (Lu et al. 2022, arXiv:2210.05639).

    The drift was found by meta-learning and then written down: it is 0 while the ratio moves against the advantage's
    wish, and bends the surrogate by a tanh where it goes along.

    Args:
        log_ratio: [*].
        advantage: [*].
        alpha: width for positive advantages, on the scale of (ratio - 1) * advantage.
        beta: width for negative ones, on the scale of log_ratio * advantage.
    """
    _check_shapes(log_ratio, advantage)
    r, a, log_r = ratio(log_ratio), advantage.float(), log_ratio.float()
    wished, unwished = (r - 1) * a, log_r * a
    drift = torch.where(
        a >= 0,
        F.relu(wished - alpha * torch.tanh(wished / alpha)),
        F.relu(unwished - beta * torch.tanh(unwished / beta)),
    )
    return -(r * a - drift)


def learned_drift(log_ratio: Tensor, advantage: Tensor, *, drift: LearnedDrift) -> Tensor:
    """Return the loss of Learnt Policy Optimisation (Lu et al. 2022, arXiv:2210.05639): a drift that evolution found.

    Args:
        log_ratio: [*].
        advantage: [*].
        drift: see `agents.core.drift`.
    """
    _check_shapes(log_ratio, advantage)
    r, a = ratio(log_ratio), advantage.float()
    return -(r * a - drift(r, log_ratio.float(), a))


def kl_estimate(log_ratio: Tensor, *, estimator: Divergence = "k3") -> Tensor:
    """Return an estimate per sample of KL(old || new) from steps of the old policy; all have gradients.

    Args:
        log_ratio: [*].
        estimator: `k1` is unbiased and may be negative, `k2` is the squared log-ratio over 2 (biased), `k3` is unbiased
            and never negative (Schulman 2020, "Approximating KL divergence").
    """
    x = log_ratio.float()
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    return _k3(x, ratio(x))


def _k3(x: Tensor, r: Tensor) -> Tensor:
    """Return r - 1 - x of a log-ratio and its ratio."""
    # Near 0 the terms cancel: at 1e-4, float32 would be three times off. The series is exact there.
    near = x.square() * (0.5 + x * (1 / 6 + x / 24))
    return torch.where(x.abs() < 1e-2, near, r - 1 - x)


def kl_penalty(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    coefficient: float | Tensor = 1.0,
    estimator: Divergence = "k3",
) -> Tensor:
    """Return the unclipped surrogate with a penalty on KL(old || new) (Schulman et al. 2017, arXiv:1707.06347, eq. 8).

    The paper's penalty is the KL of the two distributions; this one is an estimate from the steps that were taken, and
    bounds some of them only. With `k3` a sample's gradient, ratio * (coefficient - advantage) - coefficient, turns at
    the ratio coefficient / (coefficient - advantage) where the advantage is below the coefficient. Where it is not, the
    gradient never turns: more of such a step is asked for, however far its ratio is, and only the other steps of its
    state, which become less likely, hold it back.

    Args:
        log_ratio: [*].
        advantage: [*].
        coefficient: of the penalty, at least 0 (the paper's table 1: fixed 1); an agent that adapts it gives a 0-d
            tensor.
        estimator: see `kl_estimate`.
    """
    _check_shapes(log_ratio, advantage)
    penalty = kl_estimate(log_ratio, estimator=estimator)
    return coefficient * penalty - ratio(log_ratio) * advantage.float()


class VMPOLoss(NamedTuple):
    """What `vmpo` returns, 0-d each."""

    policy: Tensor
    """Weighted negative log-likelihood of the better half; gradient to the policy only."""
    temperature: Tensor
    """The dual; gradient to the temperature only."""


def vmpo(
    log_prob: Tensor, advantage: Tensor, temperature: Tensor, *, epsilon: float = 0.01
) -> VMPOLoss:
    """Return V-MPO's losses (Song et al. 2019, arXiv:1909.12238).

    The better half of a batch is imitated with weights softmax(advantage / temperature); the temperature is such that
    these weights are `epsilon` nats away from equal ones.

    Args:
        log_prob: [B], under the policy that learns.
        advantage: [B], at least 2.
        temperature: 0-d, positive, requires grad.
        epsilon: nats (paper .01 for control, .02 for Atari).

    Raises:
        ValueError: fewer than two samples, or no batch of them.
    """
    if log_prob.ndim != 1 or log_prob.shape != advantage.shape:
        shapes = f"{tuple(log_prob.shape)} and {tuple(advantage.shape)}"
        raise ValueError(f"V-MPO ranks a batch: log-probabilities and advantages [B]; got {shapes}")
    if len(advantage) < 2:
        raise ValueError(
            f"V-MPO halves a batch; it got {len(advantage)} sample(s), give at least 2"
        )
    best, chosen = advantage.detach().float().topk(len(advantage) // 2)
    weights = torch.softmax(best / temperature.detach(), 0)
    policy = -(weights * log_prob.float()[chosen]).sum()
    mean_exp = torch.logsumexp(best / temperature, 0) - math.log(len(best))
    return VMPOLoss(policy, temperature * (epsilon + mean_exp))


def rebel(log_ratio: Tensor, reward: Tensor, *, eta: float = 0.5) -> Tensor:
    """Return REBEL's regression of relative rewards (Gao et al. 2024, arXiv:2404.16767), one loss per pair.

    Args:
        log_ratio: [2, N], of two answers to the same question: actions in one state, images of one prompt.
        reward: [2, N], or advantages.
        eta: step size: after the regression, log-ratios differ by `eta` times the rewards' difference (.5 is ours: with
            rewards of spread 1, a KL of about .02 an update, as PPO's).

    Returns:
        [N].

    Raises:
        ValueError: the first axis is not a pair.
    """
    if log_ratio.shape != reward.shape or log_ratio.shape[0] != 2:
        shapes = f"{tuple(log_ratio.shape)} and {tuple(reward.shape)}"
        raise ValueError(f"REBEL compares pairs: log-ratios and rewards [2, N]; got {shapes}")
    x, r = log_ratio.float(), reward.float()
    return ((x[0] - x[1]) / eta - (r[0] - r[1])).square()


def ratio_metrics(log_ratio: Tensor, *, clip: float | Tensor) -> dict[str, Tensor]:
    """Return what tells whether steps are too large, 0-d and detached, under the names that every agent logs.

    `ratio/outside` between .1 and .2 is a good step size for clipped surrogates; a `ratio/largest_deviation` above 0 at
    the very first inner step says that the policy that learns is not the one that acted (dropout, another precision,
    another batch size).
    """
    x = log_ratio.detach().float()
    r = ratio(x)
    deviation = (r - 1).abs()
    return {
        "ratio/outside": (deviation > clip).float().mean(),
        "ratio/largest_deviation": deviation.max(),
        "ratio/kl": _k3(x, r).mean(),
    }
