"""Agents that see several views side by side: sizes go by a view's height, and borders are every view's own."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.greedy import freeze
from tests.agents.helpers import PIXELS, SIZE, small_agent, transitions

WIDE = gym.spaces.Box(0, 255, (9, SIZE, 2 * SIZE), np.uint8)


def wide_batch():
    """Return transitions whose pictures are two views, of different batches."""
    left, right = transitions(seed=1), transitions(seed=5)
    pixels, following = (
        torch.cat([getattr(batch, part)["pixels"] for batch in (left, right)], dim=3)
        for part in ("observation", "next_observation")
    )
    seen = {"observation": {"pixels": pixels}, "next_observation": {"pixels": following}}
    return dataclasses.replace(left, **seen)


@pytest.mark.parametrize("name", ["rad", "drq", "svea", "sgqn"])
def test_agents_learn_from_two_views_and_their_modules_act_as_they_do(name):
    agent, batch = small_agent(name, WIDE), wide_batch()
    before = {k: v.clone() for k, v in agent.critic.state_dict().items()}
    for _ in range(2):
        metrics = agent.update(batch)
    assert all(value.isfinite().all() for value in metrics.values())
    assert any(not torch.equal(v, before[k]) for k, v in agent.critic.state_dict().items())
    freeze(agent.networks())
    action = agent.act(batch.observation, explore=False)[0]
    assert torch.equal(agent.greedy()(**batch.observation), torch.as_tensor(action))
    assert agent.saliency(batch.observation, batch.action).shape == (8, 3, SIZE, 2 * SIZE)


def test_what_a_shift_moves_and_an_overlay_covers_is_measured_in_views():
    for name in ("drq", "ppo"):
        assert small_agent(name, WIDE).pad == small_agent(name, PIXELS).pad == 1
    agent = small_agent("svea", WIDE)
    agent.update(wide_batch())
    assert agent.method.view._images.images.shape[2:] == (30, 30)


def test_a_cropped_border_of_any_view_is_never_looked_at():
    agent, batch = small_agent("rad", WIDE), wide_batch()
    assert agent.crop == 20
    seen = agent.saliency(batch.observation, batch.action).unflatten(3, (2, SIZE))
    assert (seen[..., 2:22, :, 2:22].amax((0, 1, 2, 4)) > 0).all(), "in both views"
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[2:22, 2:22] = False
    assert not seen.transpose(2, 3)[..., border].any()
