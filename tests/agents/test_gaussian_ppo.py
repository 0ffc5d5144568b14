"""PPO on a Gaussian around a denoising policy's chunk, against torch.distributions and the steps written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from agents.core.errors import UserError
from agents.core.policy_gradient import ppo_clip
from agents.generative_policies.gaussian import free_of
from agents.generative_policies.gaussian_ppo import Spread
from tests.agents.fine_tuning import make, move, remembered


def test_the_mean_is_where_the_flow_takes_zero_noise() -> None:
    agent = make("gaussian-ppo", horizon=6)
    seen, _ = remembered(agent)
    condition, x = agent.policy.condition(seen), torch.zeros(5, 6, 2)
    for t in (1.0, 0.75, 0.5, 0.25):
        x = x - agent.policy.denoiser(x, torch.full((5,), t), condition) / 4
    torch.testing.assert_close(agent.mean(seen), x, atol=1e-6, rtol=1e-5)
    action = torch.from_numpy(agent.act(seen, explore=False)[0])
    torch.testing.assert_close(action, x.clamp(-1, 1)[:, :4].detach(), atol=1e-6, rtol=1e-5)


def test_the_log_probability_is_the_executed_numbers_mean_and_the_loss_is_ppos() -> None:
    agent = make("gaussian-ppo", horizon=6, entropy_coefficient=0.5, clip=0.05)
    move(agent.spread, 0.5)
    seen, extras = remembered(agent)
    move(agent.policy, 0.1)
    move(agent.spread, 0.1)
    normal = Normal(agent.mean(seen), agent.spread().expand(5, -1, -1))
    log_prob = normal.log_prob(extras["chunk"])[:, :4].flatten(1).mean(1)
    advantage = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0])
    said = agent.policy_loss(seen, extras, advantage)
    log_ratio = log_prob - extras["log_prob"]
    torch.testing.assert_close(said.log_ratio, log_ratio, atol=1e-5, rtol=1e-4)
    entropy = normal.entropy()[:, :4].mean()
    torch.testing.assert_close(said.metrics["policy/entropy"], entropy.detach())
    written = ppo_clip(log_ratio, advantage, clip=0.05).mean() - 0.5 * entropy
    torch.testing.assert_close(said.loss, written, atol=1e-5, rtol=1e-4)
    said.loss.backward()
    gradients = [p.grad for p in agent.actor_parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients if g is not None)
    assert agent.spread.log_std.grad[:4].abs().min() > 0
    assert agent.spread.log_std.grad[4:].abs().max() == 0, "never executed"


def test_what_is_drawn_has_the_spread_that_is_learned_and_its_floor() -> None:
    agent = make("gaussian-ppo", exploration_std=0.2, smallest_std=0.05)
    with torch.no_grad():
        agent.spread.log_std[0] = -9.0
    seen = {"state": torch.zeros(20_000, 3)}
    chunk, extras = agent.draw(seen)
    std = chunk.std(0)
    torch.testing.assert_close(std[0], torch.full((2,), 0.05), rtol=0.05, atol=0)
    torch.testing.assert_close(std[1:], torch.full((3, 2), 0.2), rtol=0.05, atol=0)
    assert torch.equal(chunk, extras["chunk"])


def test_correlated_noise_ends_in_the_actions_coordinates() -> None:
    agent = make("gaussian-ppo", noise_correlation=0.5)
    factor = torch.eye(8) + 0.5 * torch.eye(8).roll(1, 0).tril()
    agent.policy.noise.factor.copy_(factor)
    agent.policy.noise.inverse.copy_(torch.linalg.inv(factor))
    seen, _ = remembered(agent)
    condition, x = agent.policy.condition(seen), torch.zeros(5, 4, 2)
    for t in (
        1.0,
        0.75,
        0.5,
        0.25,
    ):  # a linear change of coordinates leaves Euler's steps what they are
        x = x - agent.policy.denoiser(x, torch.full((5,), t), condition) / 4
    torch.testing.assert_close(agent.mean(seen), x, atol=1e-5, rtol=1e-4)


def test_the_spread_begins_as_told_and_grows_back_from_its_floor() -> None:
    """A clamp has no gradient at its floor; Adam brings a smooth one's back to the spread of what is likely, 0.5."""
    spread = Spread((3, 2), 0.1, 0.04)
    torch.testing.assert_close(spread(), torch.full((3, 2), 0.1), rtol=1e-6, atol=0)
    with torch.no_grad():
        spread.log_std.fill_(-9.0)
    assert spread().max().item() == pytest.approx(0.04, rel=0.01)
    chunks = 0.5 * torch.randn(2000, 3, 2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(spread.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        (-Normal(0, spread()).log_prob(chunks).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(spread(), chunks.std(0), rtol=0.05, atol=0)


def test_a_spread_that_begins_at_its_floor_is_refused() -> None:
    with pytest.raises(UserError, match=r"exploration_std 0.05.*smallest_std 0.05; give two incr"):
        make("gaussian-ppo", exploration_std=0.05, smallest_std=0.05)
    with pytest.raises(UserError, match="exploration_std inf"):
        make("gaussian-ppo", exploration_std=math.inf)
    with pytest.raises(ValueError, match="not above its floor"):
        free_of(0.05, 0.05)


@pytest.mark.parametrize("name", ["exploration_std", "smallest_std"])
def test_spreads_are_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0.0"):
        make("gaussian-ppo", **{name: 0.0})
