"""A teacher's actions beside PPO's loss: refined policy distillation (Jülg et al. 2025, https://arxiv.org/abs/2503.05833).

The student acts, and learns from what its actions are worth; the teacher says what it would have done in the same
observations. As the term fades (`teacher_decay`), the student may become better than its teacher.

Differences from the paper and its code:
- Discrete actions are learned by cross-entropy; the paper has continuous ones alone.
- The teacher is asked once for each step, while acting, and not again in every minibatch: it may have a memory.
- A weight that fades keeps `teacher_coefficient` as its start; the code's goes from 1.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from agents.core.distributions import Categorical, Gaussian


def teacher_loss(policy: Gaussian | Categorical, action: Tensor) -> Tensor:
    """Return how far a policy is from a teacher's actions, 0-d.

    Args:
        policy: of the observations in which the teacher was asked.
        action: float32 [B, A], or int64 [B].

    Returns:
        The mean squared difference of a Gaussian's means, over parts of the action too; the cross-entropy in nats of a
        Categorical.
    """
    if isinstance(policy, Categorical):
        return -policy.log_prob(action).mean()
    return F.mse_loss(policy.mean, action)


def teacher_weight(coefficient: float, decay: int, agent_steps: int) -> float:
    """Return the weight of the term: it falls to 0 along half a cosine in `decay` steps; 0 keeps it."""
    if not decay:
        return coefficient
    return coefficient * 0.5 * (1 + math.cos(math.pi * min(1.0, agent_steps / decay)))
