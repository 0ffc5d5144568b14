"""A teacher for policies that denoise: it begins episodes, and its chunks are cloned.

A base that hardly ever succeeds is not paid for anything, and has nothing to learn from. A teacher helps in two ways,
alone or together:

- `teacher_coefficient`: its chunk for every observation is learned by the policy's own denoising loss, beside the
  surrogate (the term of refined policy distillation, `agents.on_policy.teacher`, for policies that denoise).
- `guidance`: it begins a share of the episodes, and hands over after a number of decisions drawn anew for each; the
  share falls as training goes on. This is jump-start reinforcement learning (Uchendu et al. 2022,
  https://arxiv.org/abs/2204.02372, its random variant).

Differences from the paper: the share falls with steps, not with success, and the method is on-policy. Decisions of the
teacher have no ratio, so they are left out of the surrogate; they teach the critic what follows them, and the cloning
term its chunk. What the policy decides after them has its own ratio and is credited with what really followed: an
honest gradient, of the return from the states that a teacher leads to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.core.agent import Observation
from agents.generative_policies.policy import DenoisingPolicy

GUIDED = "guided"
"""The extra field that says which decisions were a teacher's."""
NOBODY, TEACHER, AGENT = 0.0, 1.0, 2.0
"""Who decides in an episode, as a number of an agent's state: nobody yet, as it begins; the teacher; the agent."""


def draw_guided(
    decides: Tensor, *, share: float, decisions: float, generator: torch.Generator
) -> Tensor:
    """Return which of the next decisions are the teacher's, bool [B].

    Args:
        decides: float32 [B], who has decided so far: `NOBODY`, `TEACHER` or `AGENT`, who keeps what was handed over.
        share: of new episodes that the teacher begins.
        decisions: mean number of them before it hands over, at least 1; geometrically distributed.
        generator: on the device of `decides`.
    """
    stays = 1 - 1 / decisions
    chance = torch.where(decides == NOBODY, share, torch.where(decides == TEACHER, stays, 0.0))
    return torch.rand(len(decides), generator=generator, device=decides.device) < chance


def cloning_loss(
    policy: DenoisingPolicy, observation: Observation, action: Tensor, generator: torch.Generator
) -> Tensor:
    """Return a policy's denoising loss of what a teacher would have done, 0-d.

    Args:
        policy: learns.
        observation: in which the teacher was asked.
        action: [M, h, A], or [M, A] where the environment takes no chunks; what would follow is not learned.
        generator: of noise and times.
    """
    horizon, (executed, _, is_chunk) = policy.config.horizon, policy.chunks
    chunk = action if is_chunk else action[:, None]
    chunk = torch.cat([chunk, chunk[:, -1:].expand(-1, horizon - executed, -1)], dim=1)
    mask = (torch.arange(horizon, device=chunk.device) < executed).expand(len(chunk), horizon)
    return policy.loss(observation, chunk.clamp(-1, 1), generator, mask=mask).mean()
