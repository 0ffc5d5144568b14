"""FPO and FPO++ against their formulas."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.policy_gradient import asymmetric_trust_region, ppo_clip
from tests.agents.fine_tuning import STATE, make, move, remembered


def losses_of(agent: Any, seen: Any, extras: Any, i: int) -> list[torch.Tensor]:
    """Return FPO's losses of a flow's chunk, one after the other: x_t = t * noise + (1 - t) * chunk."""
    condition, told = agent.policy.condition(seen)[i : i + 1], []
    for noise, t in zip(extras["noise"][i], extras["time"][i], strict=True):
        x = t * noise + (1 - t) * extras["chunk"][i]
        velocity = agent.policy.denoiser(x[None], t[None], condition)[0]
        x0 = x - t * velocity
        told.append(((noise - (x0 + velocity)) ** 2)[:4].mean())
    return told


@pytest.mark.parametrize("horizon", [4, 6])
def test_the_ratio_is_that_of_mean_losses(horizon: int) -> None:
    agent = make("fpo", horizon=horizon, difference_limit=0.0)
    seen, extras = remembered(agent)
    for i in range(5):
        told = torch.stack(losses_of(agent, seen, extras, i))
        torch.testing.assert_close(extras["loss"][i], told, atol=1e-5, rtol=1e-4)
    move(agent.policy, 0.1)
    said = agent.policy_loss(seen, extras, torch.ones(5))
    for i in range(5):
        new = torch.stack(losses_of(agent, seen, extras, i))
        expected = torch.exp((extras["loss"][i] - new).mean())
        torch.testing.assert_close(said.log_ratio[i].exp(), expected, atol=1e-5, rtol=1e-4)
    written = ppo_clip(said.log_ratio, torch.ones(5), clip=0.05).mean()
    torch.testing.assert_close(said.loss, written)


def test_fpo_plus_plus_clips_every_pair_in_an_asymmetric_trust_region() -> None:
    agent = make("fpo++", loss_limit=0.0, difference_limit=0.0)
    seen, extras = remembered(agent)
    move(agent.policy, 0.1)
    advantage = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0])
    said = agent.policy_loss(seen, extras, advantage)
    assert said.log_ratio.shape == (5, 5)
    condition = agent.policy.condition(seen)
    terms = []
    for i in range(5):
        for j in range(5):
            noise, t = extras["noise"][i, j], extras["time"][i, j]
            x = t * noise + (1 - t) * extras["chunk"][i]
            velocity = agent.policy.denoiser(x[None], t[None], condition[i : i + 1])[0]
            new = ((velocity - (noise - extras["chunk"][i])) ** 2).mean()
            log_ratio = extras["loss"][i, j] - new
            torch.testing.assert_close(said.log_ratio[i, j], log_ratio, atol=1e-4, rtol=1e-3)
            terms.append(asymmetric_trust_region(log_ratio, advantage[i], clip=0.05))
    torch.testing.assert_close(said.loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-4)


def test_losses_are_bounded_before_their_difference_is() -> None:
    agent = make("fpo++", loss_limit=10.0, difference_limit=3.0)
    old = torch.tensor([[12.0, 9.0, 1.0, 1.0]])
    new = torch.tensor([[11.0, 11.0, 9.0, 0.5]])
    np.testing.assert_allclose(agent.log_ratio(old, new), [[0.0, -1.0, -3.0, 0.5]])
    np.testing.assert_allclose(make("fpo").log_ratio(old, new), [(1 - 2 - 8 + 0.5) / 4])


def test_fpos_mean_ratio_is_not_bounded_and_fpo_plus_plus_is_as_published() -> None:
    """FPO's code clips differences to 3 only where every pair has a ratio of its own."""
    old, new = torch.zeros(1, 2), torch.tensor([[9.0, 1.0]])
    np.testing.assert_allclose(make("fpo").log_ratio(old, new), [-5.0])
    np.testing.assert_allclose(make("fpo++").log_ratio(old, new), [[-3.0, -1.0]])


def test_a_scaled_loss_has_a_scaled_log_ratio() -> None:
    """A sum over four actions is four times the mean; the scale is all that differs."""
    found = []
    for scale in (1.0, 4.0):
        agent = make("fpo", loss_scale=scale, difference_limit=0.0)
        seen, extras = remembered(agent)
        move(agent.policy, 0.1)
        found.append(agent.policy_loss(seen, extras, torch.ones(5)).log_ratio)
    torch.testing.assert_close(4 * found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("actions", [1, 32])
def test_a_clip_means_the_same_for_chunks_of_any_size(actions: int) -> None:
    """Where every number's loss grows by as much, the log-ratio is that, not d times it."""
    space = gym.spaces.Box(-1, 1, (4, actions), np.float32)
    agent = make("fpo", STATE, space, regression="velocity", difference_limit=0.0)
    seen, extras = remembered(agent, 1000)
    network = agent.policy.denoiser.forward
    agent.policy.denoiser.forward = lambda *inputs: 0 * network(*inputs) + 0.2
    condition = agent.policy.condition(seen)
    old = agent._losses(condition, extras["chunk"], extras["noise"], extras["time"])
    agent.policy.denoiser.forward = lambda *inputs: 0 * network(*inputs) + 0.4
    said = agent.policy_loss(seen, extras | {"loss": old}, torch.ones(1000))
    target = extras["noise"] - extras["chunk"][:, None]
    expected = ((0.2 - target) ** 2 - (0.4 - target) ** 2).mean()
    assert said.log_ratio.mean().item() == pytest.approx(expected.item(), abs=1e-3)
    assert abs(said.log_ratio.mean().item()) < 0.3


def test_a_diffusion_is_fine_tuned_by_its_own_losses() -> None:
    agent = make("fpo", path="diffusion", train_steps=20, prediction="noise")
    seen, extras = remembered(agent)
    path, condition = agent.policy.path, agent.policy.condition(seen)
    for i in range(5):
        chunk = extras["chunk"][i].expand(5, 4, 2)
        x = path.mix(chunk, extras["noise"][i], extras["time"][i])
        said = agent.policy.denoiser(x, extras["time"][i], condition[i].expand(5, -1))
        loss = (said - extras["noise"][i]).square().flatten(1).mean(1)
        torch.testing.assert_close(extras["loss"][i], loss, atol=1e-5, rtol=1e-4)


def test_only_fpo_plus_plus_evaluates_without_noise() -> None:
    seen = {"state": torch.randn(5, 3)}
    for name, equal in (("fpo", False), ("fpo++", True)):
        agent = make(name)
        first, second = (agent.act(seen, explore=False)[0] for _ in range(2))
        assert np.array_equal(first, second) is equal
        explored = [agent.act(seen, explore=True)[0] for _ in range(2)]
        assert not np.array_equal(*explored)
