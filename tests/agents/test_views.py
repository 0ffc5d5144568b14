"""Agents that see several views side by side: sizes go by a view's height, and borders are every view's own."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.errors import UserError
from agents.core.fields import camera_names, join_cameras
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


# ------------------------------------------------------------------------------ parts by camera's name


def test_cameras_are_joined_in_the_order_of_the_settings_whatever_that_of_the_parts():
    random = np.random.default_rng(0)
    parts = {
        name: random.integers(0, 256, (2, 9, SIZE, SIZE), np.uint8) for name in ("arm", "top", "1")
    }
    names = camera_names({"camera": ["top", 1, "arm"], "observation": "both"})
    assert names == ("top", "1", "arm")
    seen = join_cameras({"state": np.zeros((2, 3)), **parts}, names)
    assert sorted(seen) == ["pixels", "state"]
    for place, name in enumerate(names):
        own = seen["pixels"][..., place * SIZE : (place + 1) * SIZE]
        assert np.array_equal(own, parts[name])


@pytest.mark.parametrize(
    ("task", "observation"),
    [
        ({"camera": "front", "observation": "pixels"}, np.zeros((9, 24, 24), np.uint8)),
        ({"camera": None}, {"front": np.zeros(1), "arm": np.zeros(1)}),  # a third party's own parts
        ({"camera": ["a", "b"], "observation": "state"}, {"state": np.zeros(3)}),
        ({"camera": ["a", "b"], "observation": "both"}, {"pixels": np.zeros(1), "state": 0}),
        ({"camera": ["a", "b"], "observation": "pixels"}, np.zeros((9, 24, 48), np.uint8)),
    ],
)
def test_other_observations_are_left_as_they_are(task, observation):
    assert join_cameras(observation, camera_names(task)) is observation


def test_a_missing_camera_is_named():
    with pytest.raises(UserError, match="shows left, and nothing from camera right, 0; give an"):
        join_cameras({"left": np.zeros((3, 8, 8))}, ("right", "left", "0"))


def test_agents_of_one_picture_say_how_several_cameras_become_one():
    box = gym.spaces.Box(0, 255, (9, SIZE, SIZE), np.uint8)
    parts = gym.spaces.Dict({"left": box, "right": box})
    with pytest.raises(UserError, match=r"no use for 'left', 'right'.*side_by_side=True"):
        small_agent("drq", parts)
    named = gym.spaces.Dict({"pixels": box, "words": gym.spaces.Box(-1, 1, (3,))})
    with pytest.raises(UserError, match=r"no use for 'words'; leave .* another agent$"):
        small_agent("drq", named)
