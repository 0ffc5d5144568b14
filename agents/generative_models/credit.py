"""Rewards of images as advantages of their denoising steps: against the group, the prompt's history, or a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.core.advantages import (
    ConditionStatistics,
    GroupAdvantage,
    group_relative,
    leave_one_out,
)
from agents.core.denoisers import TimeEmbedding
from agents.core.errors import UserError
from agents.core.networks import mlp
from agents.generative_models.tuning_config import TuningConfig

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]
"""(images [B, 3, H, W] in [0, 1], B prompts) -> [B]."""

VALUE_FEATURES = 64
"""Of the time embedding of a value."""


def checked_reward(reward: RewardFunction, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return rewards float32 [B] on the images' device.

    Raises:
        UserError: the reward's shape is not [B], or a number of it is not finite; the text names the prompt.
    """
    name = getattr(reward, "name", getattr(reward, "__name__", type(reward).__name__))
    return checked_values(reward(images, prompts), prompts, name).to(images.device)


def checked_values(values: Any, prompts: Sequence[str], name: str) -> Tensor:
    """Return what a reward has returned as finite float32 [B].

    Args:
        values: a tensor, an array, or a list of numbers.
        prompts: B of them.
        name: the reward's.

    Raises:
        UserError: it is something else, not one number for each image, or a number is not finite; the text says which.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None or found.is_complex() or found.shape != (len(prompts),):
        what = f"a {type(values).__name__}" if values is not None else "nothing"
        shape = "" if found is None else f" of shape {tuple(found.shape)}"
        raise UserError(
            f"reward '{name}' returned {what}{shape} for {len(prompts)} images; return one number for each, "
            f"({len(prompts)},)"
        )
    if not (finite := torch.isfinite(found)).all():
        place = int((~finite).nonzero()[0])
        raise UserError(
            f"reward '{name}' is {float(found[place].detach())} for the prompt '{prompts[place]}'; mend the reward"
        )
    return found.float()


def rewards_in_batches(
    reward: RewardFunction,
    images: Tensor,
    prompts: Sequence[str],
    *,
    batch: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return rewards float32 [N] on the CPU of any number of images, without gradient; see `checked_reward`.

    Args:
        reward: sees at most `batch` images at once.
        images: [N, 3, H, W], anywhere.
        prompts: N of them.
        batch: images at once.
        device: where the reward sees them: a reward that is a network follows.
    """
    found = [torch.empty(0)]
    with torch.no_grad():
        for first in range(0, len(prompts), batch):
            some = slice(first, first + batch)
            found.append(checked_reward(reward, images[some].to(device), prompts[some]).cpu())
    return torch.cat(found)


class ChainValue(nn.Module):
    """DPOK's value of a step of a chain: what reward to expect of x_t, t and the prompt, [B].

    **Difference from DPOK**: the time is embedded beside the latent instead of scaling it.

    Args:
        dimension: d, numbers of a sample.
        condition: F, features of a prompt's words; their mean goes in.
        hidden: width of its layers (DPOK: 256, four of them).
    """

    def __init__(self, dimension: int, condition: int, hidden: int = 256) -> None:
        super().__init__()
        self.time = TimeEmbedding(VALUE_FEATURES, VALUE_FEATURES, VALUE_FEATURES)
        self.head = mlp([dimension + condition + VALUE_FEATURES, hidden, hidden, hidden, 1])

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return values [B] of x [B, ...], t [B] and condition [B, L, F]."""
        return self.head(torch.cat([x.flatten(1), condition.mean(1), self.time(t)], 1))[:, 0]


def image_advantage(
    reward: Tensor,
    group: Tensor,
    prompts: Sequence[str],
    config: TuningConfig,
    history: ConditionStatistics,
) -> GroupAdvantage:
    """Return every image's advantage [B] and whether it says anything; for `value` the reward itself.

    Args:
        reward: [B], of a whole iteration.
        group: int64 [B].
        prompts: B of them.
        config: says what is compared with what.
        history: of the prompts' rewards; `history` takes these into it.
    """
    limit = config.advantage_limit
    if config.credit == "group":
        return group_relative(reward, group, spread=config.spread, limit=limit)
    if config.credit == "leave_one_out":
        said = leave_one_out(reward, group)
        return GroupAdvantage(said.advantage.clamp(-limit, limit), said.kept)
    kept = torch.ones_like(reward, dtype=torch.bool)
    if config.credit == "history":
        return GroupAdvantage(history.advantage(reward, prompts).clamp(-limit, limit), kept)
    return GroupAdvantage(reward, kept)


def best_and_worst(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places int64 [P] of the best and the worst image of each group whose rewards differ.

    Of equal ones the first counts, so that the choice does not depend on the device.
    """
    best, worst = [], []
    for number in group.unique().tolist():
        places = (group == number).nonzero()[:, 0]
        values = reward[places]
        if values.max() > values.min():
            best.append(places[int((values == values.max()).nonzero()[0])])
            worst.append(places[int((values == values.min()).nonzero()[0])])
    if not best:
        nothing = torch.zeros(0, dtype=torch.long, device=reward.device)
        return nothing, nothing
    return torch.stack(best), torch.stack(worst)


def best_of_group(reward: Tensor, group: Tensor, count: int) -> Tensor:
    """Return the places int64 of the `count` best images of each group whose rewards differ."""
    chosen = []
    for number in group.unique().tolist():
        places = (group == number).nonzero()[:, 0]
        values = reward[places]
        if values.max() > values.min():
            order = torch.argsort(values, descending=True, stable=True)
            chosen.append(places[order[:count]])
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=reward.device)
