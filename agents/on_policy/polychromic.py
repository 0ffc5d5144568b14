"""Polychromic PPO: sets of trajectories are rewarded for success and diversity together.

Hamid et al. 2025, "Polychromic objectives for reinforcement learning" (https://arxiv.org/abs/2509.25424). From some
states several rollouts go out (`agents.core.vines`). Sets of them score mean return times diversity; a set's score over
the mean score of the sets from its state is the advantage of its members' first steps. Other steps have PPO's own.

The abstract and summaries of the paper were read, and re-implementations that name its algorithm 2 and table 3, whose
numbers are the defaults here; the paper's own text was not at hand. As there: random sets, a window of steps behind the
branch, a penalty on KL(old || new) in every state. Different or derived:
- Branch states are drawn uniformly from stretches of every environment's steps.
- A trajectory in several sets gets the mean of their advantages, instead of one copy for each set.
- Returns end where the vine ends; a vine that was cut off, by its length or by a time limit, gets the value of what
  follows, as everywhere in this suite.
- Returns are brought to [0, 1] by the lowest and highest that the config names.
- Advantages of sets are brought to the spread of the others. As they are they were a sixth of it on toy/goals, as each
  is a mean, and what sets prefer was lost among what single steps do.
- What follows a vine's own episode within its steps is not learned from: there are many times more such steps at the
  begin of episodes than branches there, and they have no sets.
- The value learns from all steps, as PPO's does; a vine that is in no set, or that lost its worker, keeps PPO's
  advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.core.advantages import set_level
from agents.core.behaviors import BEHAVIORS, diversity
from agents.core.errors import UserError
from agents.core.policy_gradient import kl_estimate
from agents.core.rollout import Experience
from agents.core.vines import EXTRAS, VinePlan, Vines
from agents.on_policy.actor_critic import Samples
from agents.on_policy.config import Ranges, at_least_one, not_negative
from agents.on_policy.ppo import PPO, PPOConfig


@dataclass(frozen=True)
class PolychromicConfig(PPOConfig):
    """Polychromic PPO; defaults of its own fields from the paper's table 3 unless a field says otherwise."""

    branches: int = 2
    """States of every environment from which vines go, in a rollout."""
    vines: int = 8
    """Rollouts from each of them."""
    vine_length: int = 64
    """Steps of a vine, of which it uses those of its own episode (the paper goes to the episode's end)."""
    set_size: int = 4
    """Trajectories in a set; fewer than vines, or all sets would be one."""
    sets: int = 4
    """Random sets from every state, which are compared with one another."""
    window: int = 5
    """Steps after a vine's first one that have its sets' advantage as well."""
    behavior: str = "ended"
    """When trajectories count as alike, told|ended|visited; see `agents.core.behaviors`. Told where the task tells."""
    cell: float = 0.25
    """Width of the cells that ended and visited tell apart, in units of the state; of pictures, of colors in [0, 1]."""
    set_weight: float = 1.0
    """Spread of the sets' advantages, over that of PPO's (ours)."""
    lowest_return: float = 0.0
    """Return that counts as no success."""
    highest_return: float = 1.0
    """Return that counts as full success."""
    behavior_kl: float = 0.01
    """Weight of the penalty on KL(old || new) (the paper tries .005 to .1)."""

    RANGES: ClassVar[Ranges] = (
        ("branches vine_length", at_least_one, "a positive number"),
        ("sets", lambda value: value >= 2, "at least 2: a set is compared with its state's others"),
        ("vines", lambda value: value >= 3, "at least 3: sets of 2 must be able to differ"),
        ("set_size", lambda value: value >= 2, "at least 2: a single trajectory has no diversity"),
        ("window behavior_kl set_weight", not_negative, "0 or more"),
        ("cell", lambda value: 0 < value < math.inf, "a positive number"),
        ("lowest_return highest_return", math.isfinite, "a finite number"),
    )

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        if self.behavior not in BEHAVIORS:
            raise UserError.unknown("behavior", self.behavior, BEHAVIORS)
        if self.memory_size:
            raise UserError(
                f"memory_size is {self.memory_size}, but polychromic PPO learns without a memory; give 0"
            )
        if self.set_size >= self.vines:
            raise UserError(
                f"set_size is {self.set_size} and there are {self.vines} vines to draw from, so sets could not differ; "
                f"give at most {self.vines - 1}, or more vines"
            )
        if self.lowest_return >= self.highest_return:
            raise UserError(
                f"lowest_return is {self.lowest_return} and highest_return {self.highest_return}; give two "
                "that differ, the lower one first"
            )

    def surrogate_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the surrogate with this config's settings, and the penalty."""
        surrogate, weight = super().surrogate_loss(), self.behavior_kl
        return lambda log_ratio, advantage: (
            surrogate(log_ratio, advantage) + weight * kl_estimate(log_ratio)
        )


def set_scores(
    value: np.ndarray, behavior: np.ndarray, members: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean return times diversity of sets (the paper's eq. 7), and the diversity, float64 [M] each.

    Args:
        value: [R], returns in [0, 1].
        behavior: int64 [R].
        members: int64 [M, n], the rollouts in each set.
    """
    spread = diversity(behavior[members])
    return value[members].mean(1) * spread, spread


class PolychromicPPO(PPO):
    """The agent; see the module's docstring, and `OnPolicyActorCritic` for arguments."""

    config: PolychromicConfig

    def prepare(self) -> None:
        """Plan the vines, too."""
        super().prepare()
        config = self.config
        self.vines = VinePlan(config.branches, config.vines, config.vine_length)
        self.needs_behavior, self.jumps = config.behavior == "told", self.vines.jumps
        self.extras = {**self.extras, **EXTRAS}
        self._set_metrics: dict[str, Tensor] = {}

    def update(self, batch: Experience) -> dict[str, Tensor]:
        """Learn from a rollout, and tell how its sets scored."""
        return super().update(batch) | self._set_metrics

    def gradient_sizes(self) -> set[int]:
        """See `Agent.gradient_sizes`."""
        raise UserError(
            "polychromic PPO learns from as many steps as its vines' episodes have, which no compiled minibatch fits; "
            "use --compile off"
        )

    def learn(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Take several passes of minibatches, without what came after the vines' own episodes."""
        vines = Vines.of(experience, self.vines)
        kept = experience.kept.clone()
        for (v, n), last in np.ndenumerate(vines.last):
            kept[last + 1 : vines.first[v] + self.vines.length, n] = False
        return super().learn(replace(experience, kept=kept), samples)

    def credit(self, experience: Experience) -> Samples:
        """Return PPO's advantages, and those of sets where vines begin."""
        samples = super().credit(experience)
        vines = Vines.of(experience, self.vines)
        members, start = self._draw_sets(vines)
        self._set_metrics = {}
        if not len(members):
            return samples
        config = self.config
        value = self._vine_returns(experience, vines)
        span = config.highest_return - config.lowest_return
        value = ((value - config.lowest_return) / span).clip(0, 1).reshape(-1)
        behavior = BEHAVIORS[config.behavior](experience, vines, config.cell).reshape(-1)
        score, share = set_scores(value, behavior, members)
        credit = set_level(
            torch.from_numpy(score),
            torch.from_numpy(members),
            torch.from_numpy(start),
            vines.last.size,
        )
        advantage = samples.advantage.clone().view(experience.reward.shape)
        spread = advantage[experience.kept].std() / credit.advantage[credit.kept].std().clamp(
            min=1e-6
        )
        shared = config.set_weight * spread * credit.advantage.view(vines.last.shape).to(advantage)
        known = credit.kept.numpy().reshape(vines.last.shape)
        for (v, n), last in np.ndenumerate(vines.last):
            if known[v, n]:
                first = vines.first[v]
                advantage[first : min(first + config.window, last) + 1, n] = shared[v, n]
        self._set_metrics = {
            "sets/score": samples.advantage.new_tensor(score.mean()),
            "sets/diversity": samples.advantage.new_tensor(share.mean()),
        }
        return replace(samples, advantage=advantage.flatten())

    def _draw_sets(self, vines: Vines) -> tuple[np.ndarray, np.ndarray]:
        """Draw sets of whole vines: members int64 [M, n] and the number of each one's start [M]."""
        size, rollout = self.config.set_size, np.arange(vines.last.size)
        start = vines.start.reshape(-1)
        members, starts = [np.zeros((0, size), np.int64)], [np.zeros(0, np.int64)]
        for number in range(int(start.max(initial=-1)) + 1):
            own = rollout[(start == number) & vines.whole.reshape(-1)]
            if len(own) > size:  # sets of all of them would be one, and say nothing
                draws = [self.order.permutation(own)[:size] for _ in range(self.config.sets)]
                members.append(np.stack(draws))
                starts.append(np.full(self.config.sets, number))
        return np.concatenate(members), np.concatenate(starts)

    def _vine_returns(self, experience: Experience, vines: Vines) -> np.ndarray:
        """Return discounted returns float64 [V, N], in the task's units; 0 where a worker was lost."""
        discount, count = self.config.discount, vines.last.shape[1]
        reward = experience.reward.double().cpu().numpy()
        returns = np.zeros(vines.last.shape)
        for v, n in zip(*np.nonzero(vines.whole), strict=True):
            own = reward[vines.first[v] : vines.last[v, n] + 1, n]
            returns[v, n] = discount ** np.arange(len(own)) @ own
        place = vines.last.reshape(-1), np.tile(np.arange(count), len(vines.last))
        cut = ~experience.terminated.cpu().numpy()[place] & vines.whole.reshape(-1)
        if cut.any():
            following = self._values(experience.next_observation(vines.last_index()[cut]))
            scale = self.rewards.spread if self.config.scale_reward else 1.0
            steps = (vines.last - vines.first[:, None] + 1).reshape(-1)[cut]
            returns.reshape(-1)[cut] += discount**steps * (following.double() * scale).cpu().numpy()
        return returns
