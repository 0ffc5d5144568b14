"""How much better than expected a step turned out: credit from rewards and values.

Along time, arrays are [T, N], time first; `next_value` is the value of what truly followed each step, which at a time
limit is the episode's own last observation and not the next episode's first. Terminations end the future, time limits
only end what was seen of it: there, and at the rollout's last row, the rest is estimated by `next_value`. Across
samples of one prompt or state, arrays are [B] with the group of every sample.

Everything is computed in float32 and without gradient. Where samples are compared, a reward that is not finite would
silently make those of all others so, or would be left out as if it said nothing: it is refused by its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agents.core.errors import NotFiniteError

Spread = Literal["group", "batch", "none"]


def discounted_sum(terms: Tensor, factors: Tensor) -> Tensor:
    """Return x [T, *] with x[t] = terms[t] + factors[t] * x[t + 1], in log2(T) steps instead of T.

    Args:
        terms: float [T, *].
        factors: float [T, *], in [0, 1]; the last row's has nothing to act on.
    """
    sums, products = terms.clone(), factors.clone()
    reach = 1
    while reach < len(terms):
        # Every entry covers `reach` steps from its own; join it with the one that begins where it ends.
        later, further = sums[reach:].clone(), products[reach:].clone()
        sums[:-reach] += products[:-reach] * later
        products[:-reach] *= further
        products[-reach:] = 0
        reach *= 2
    return sums


@torch.no_grad()
def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float = 0.99,
    gae_lambda: float = 0.95,
) -> Tensor:
    """Return generalized advantage estimates (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    Args:
        reward: [T, N].
        value: [T, N], of each step's observation.
        next_value: [T, N], see the module.
        terminated: bool [T, N], the episode truly ended with this step.
        truncated: bool [T, N], it was cut off after this step.
        discount: gamma, in [0, 1].
        gae_lambda: 0 is the one-step error, 1 the Monte Carlo return minus the value.

    Returns:
        [T, N]; added to `value` it is the critic's target.
    """
    error = reward.float() + discount * next_value.float() * ~terminated - value.float()
    goes_on = ~(terminated | truncated)
    return discounted_sum(error, discount * gae_lambda * goes_on.float())


@torch.no_grad()
def n_step_return(
    reward: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float = 0.99,
    steps: int | None = None,
) -> Tensor:
    """Return discounted rewards of `steps` steps and the value of what follows, [T, N].

    Fewer steps are summed where an episode or the rollout ends earlier; None sums all (Monte Carlo).

    Args:
        reward: [T, N].
        next_value: [T, N], see the module.
        terminated: bool [T, N].
        truncated: bool [T, N].
        discount: gamma, in [0, 1].
        steps: at least 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1, or None for all")
    reward, last = reward.float(), len(reward) - 1
    bootstrap = reward + discount * next_value.float() * ~terminated
    ended = terminated | truncated
    if steps is None:
        ended = ended.clone()
        ended[last] = True
        return discounted_sum(torch.where(ended, bootstrap, reward), discount * (~ended).float())
    result = bootstrap
    for _ in range(steps - 1):
        following = torch.cat([result[1:], next_value[last:].float()])
        longer = reward + discount * following
        result = torch.where(ended, bootstrap, longer)
        result[last] = bootstrap[last]
    return result


class GroupAdvantage(NamedTuple):
    """Advantages within groups."""

    advantage: Tensor
    """float32 [B]; 0 where not kept."""
    kept: Tensor
    """bool [B]: the sample's group says something about it; leave out the others, do not average their zeros in."""


@torch.no_grad()
def group_relative(
    reward: Tensor,
    group: Tensor,
    *,
    spread: Spread = "group",
    limit: float | None = 5.0,
    epsilon: float = 1e-4,
) -> GroupAdvantage:
    """Return rewards relative to their group's (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.1).

    Groups whose rewards are all alike are not kept: nothing can be learned from them, and their rounding errors divided
    by epsilon would be noise of full size.

    Args:
        reward: [B].
        group: int64 [B], samples of one prompt or state have one number.
        spread: what to divide by: the standard deviation of the group, of the whole batch (Flow-GRPO), or nothing
            (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
        limit: largest magnitude (Flow-GRPO 5); None for none.
        epsilon: added to the standard deviation (Flow-GRPO 1e-4).

    Raises:
        NotFiniteError: a reward is not finite; names its place and its group.
    """
    reward = reward.float()
    _check_finite("reward", reward, "group", group)
    index, count, mean = _by_group(reward, group)
    centered = reward - mean[index]
    variance = torch.zeros_like(mean).index_add_(0, index, centered.square()) / count
    size = torch.zeros_like(mean).index_add_(0, index, reward.abs()) / count
    kept = (variance.sqrt() > 1e-6 * (1 + size))[index]  # more than the rounding of equal rewards
    if spread == "group":
        centered = centered / (variance.sqrt()[index] + epsilon)
    elif spread == "batch":
        centered = centered / (reward.std(correction=0) + epsilon)
    if limit is not None:
        centered = centered.clamp(-limit, limit)
    return GroupAdvantage(torch.where(kept, centered, 0.0), kept)


@torch.no_grad()
def leave_one_out(reward: Tensor, group: Tensor) -> GroupAdvantage:
    """Return each reward minus the mean of the others of its group (RLOO, Kool et al. 2019; arXiv:2402.14740).

    Unlike `group_relative`'s mean, that baseline does not depend on the sample itself, so the gradient is unbiased.
    Samples that are alone are not kept.

    Args:
        reward: [B].
        group: int64 [B].

    Raises:
        NotFiniteError: as `group_relative`.
    """
    reward = reward.float()
    _check_finite("reward", reward, "group", group)
    index, count, mean = _by_group(reward, group)
    others = (count - 1)[index]
    kept = others > 0
    advantage = (reward - mean[index]) * count[index] / others.clamp(min=1)
    return GroupAdvantage(torch.where(kept, advantage, 0.0), kept)


@torch.no_grad()
def set_level(score: Tensor, members: Tensor, start: Tensor, rollouts: int) -> GroupAdvantage:
    """Return advantages of rollouts from scores of sets of them (polychromic objectives, arXiv:2509.25424).

    A set's score may reward that its members differ, which no reward of a single rollout can. Its advantage, over the
    mean score of the sets from the same start, is that of all its members; a rollout in several sets gets their mean.

    Args:
        score: [M], one for each set.
        members: int64 [M, n], numbers of the rollouts in each set.
        start: int64 [M], sets that began in the same state have one number.
        rollouts: how many there are.

    Returns:
        Advantages [rollouts]; not kept are rollouts in no set, or only in sets that nothing is compared with.

    Raises:
        NotFiniteError: a score is not finite; names its place and its start.
    """
    score = score.float()
    _check_finite("score", score, "start", start)
    index, sets, mean = _by_group(score, start)
    compared = sets[index] > 1
    advantage = (score - mean[index])[compared, None].expand(-1, members.shape[1]).reshape(-1)
    place = members[compared].reshape(-1)
    total = score.new_zeros(rollouts).index_add_(0, place, advantage)
    count = score.new_zeros(rollouts).index_add_(0, place, torch.ones_like(advantage))
    return GroupAdvantage(total / count.clamp(min=1), count > 0)


class ConditionStatistics:
    """Running mean and spread of rewards for every condition (DDPO, Black et al. 2023, arXiv:2305.13301, section 5).

    Conditions differ in what can be reached under them; a reward is compared with the last ones of its own. As long as
    a condition was seen too rarely, with the batch.
    """

    def __init__(self, window: int = 32, at_least: int = 16) -> None:
        """Remember the last `window` rewards of a condition; use them from `at_least` on (DDPO 32 and 16)."""
        if not 1 <= at_least <= window:
            raise ValueError(f"at_least is {at_least}; expected 1 to the window, {window}")
        self.window, self.at_least = window, at_least
        self._rewards: dict[str, deque[float]] = {}

    def advantage(self, reward: Tensor, condition: Sequence[str], epsilon: float = 1e-6) -> Tensor:
        """Take in rewards [B] of their conditions, and return their advantages, float32 [B] on the same device.

        Raises:
            NotFiniteError: a reward is not finite; names its place and its condition, and nothing is taken in.
        """
        values = reward.detach().double().cpu()
        _check_finite("reward", values, "condition", condition)
        for name, value in zip(condition, values.tolist(), strict=True):
            self._rewards.setdefault(name, deque(maxlen=self.window)).append(value)
        batch = (float(values.mean()), float(values.std(correction=0)))
        known = {name: self._moments(name, batch) for name in dict.fromkeys(condition)}
        mean, spread = torch.tensor([known[name] for name in condition], dtype=torch.float64).T
        return ((values - mean) / (spread + epsilon)).float().to(reward.device)

    def _moments(self, name: str, batch: tuple[float, float]) -> tuple[float, float]:
        rewards = torch.tensor(self._rewards[name], dtype=torch.float64)
        if len(rewards) < self.at_least:
            return batch
        return float(rewards.mean()), float(rewards.std(correction=0))

    def state_dict(self) -> dict[str, Any]:
        """Return what was remembered, as a tree."""
        return {"rewards": {name: list(values) for name, values in self._rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        rewards = state["rewards"]
        self._rewards = {name: deque(values, self.window) for name, values in rewards.items()}


def _check_finite(name: str, values: Tensor, of: str, owners: Tensor | Sequence[str]) -> None:
    """Raise a NotFiniteError that names the first of values [B] that is not finite, and whose it is."""
    finite = values.isfinite()
    if not bool(finite.all()):
        place = int((~finite).nonzero()[0, 0])
        owner = owners[place].item() if isinstance(owners, Tensor) else repr(owners[place])
        raise NotFiniteError(
            f"'{name}' is {values[place].item()} in sample {place} of {len(values)} ({of} {owner})"
        )


def _by_group(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for [B] values each one's group [B] from 0, and by group count and mean [G]."""
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    count = values.new_zeros(groups).index_add_(0, index, torch.ones_like(values))
    total = values.new_zeros(groups).index_add_(0, index, values)
    return index, count, total / count
