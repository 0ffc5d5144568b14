"""DPPO against its formulas."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from agents.core.policy_gradient import ppo_clip
from agents.generative_policies.dppo import clip_schedule
from tests.agents.fine_tuning import STATE, make, move, remembered


def test_the_clip_grows_along_the_chain() -> None:
    """Eq. in the authors' code: base + (last - base) * (e^(3 i / (K' - 1)) - 1) / (e^3 - 1)."""
    told = clip_schedule(5, 0.001, 0.01)
    expected = [0.001 + 0.009 * (math.exp(3 * i / 4) - 1) / (math.exp(3) - 1) for i in range(5)]
    np.testing.assert_allclose(told, expected, rtol=1e-5)


def test_a_single_fine_tuned_step_has_the_last_ones_clip() -> None:
    """There, the schedule is 0/0 and every loss NaN."""
    assert clip_schedule(1, 0.001, 0.01).tolist() == pytest.approx([0.01])
    agent = make("dppo", fine_tuned_steps=1)
    seen, extras = remembered(agent)
    said = agent.policy_loss(seen, extras, torch.ones(5))
    assert said.log_ratio.shape == (5, 1)
    assert said.loss.isfinite()


def test_one_step_is_ppo_on_a_gaussian() -> None:
    """A chain of one step draws from N(predicted x0, floor^2): loss and gradient are those of PPO written out."""
    settings = {
        "denoising_steps": 1,
        "prediction": "x0",
        "clip_x0": 0.0,
        "clip": 0.2,
        "clip_base": 0.2,
    }
    agent = make(
        "dppo", exploration_std=0.3, log_prob_std=0.3, lowest_log_prob=-1e6, **settings
    )  # fmt: skip
    seen, extras = remembered(agent, 64)
    start, drawn = extras["chain"].unbind(1)
    condition = agent.policy.condition(seen)

    def log_prob() -> torch.Tensor:
        mean = agent.policy.denoiser(start, torch.ones(64), condition)
        return Normal(mean, 0.3).log_prob(drawn).flatten(1).mean(1)

    old = log_prob().detach()
    torch.testing.assert_close(extras["log_prob"][:, 0], old, atol=1e-5, rtol=1e-5)
    spread = (drawn - agent.policy.denoiser(start, torch.ones(64), condition)).std()
    assert spread.item() == pytest.approx(0.3, rel=0.1)
    move(agent.policy, 0.1)
    condition = agent.policy.condition(seen)
    advantage = torch.randn(64, generator=torch.Generator().manual_seed(0))
    ratio = (log_prob() - old).exp()
    written = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    parameters = list(agent.policy.denoiser.parameters())
    expected = torch.autograd.grad(written, parameters)
    said = agent.policy_loss(seen, extras, advantage)
    torch.testing.assert_close(said.loss, written, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(said.loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    outside = ((ratio - 1).abs() > 0.2).float().mean()
    assert 0 < outside < 1, "some are clipped, some are not"


def test_every_pair_of_decision_and_step_is_a_sample() -> None:
    """Against a loop over steps with torch's Normal: clamp, mean over what is executed, discount, clip."""
    agent = make(
        "dppo", horizon=6, clip=0.05, clip_base=0.01, denoising_discount=0.5, lowest_log_prob=-1.0,
        highest_log_prob=1.2,
    )  # fmt: skip
    seen, extras = remembered(agent)
    move(agent.policy, 0.1)
    advantage = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0])
    chain, losses, ratios = extras["chain"], [], []
    assert chain.shape == (5, 4, 6, 2)
    condition = agent.policy.condition(seen)
    for i in range(3):
        step = agent.sampler.step(agent.policy.denoise, chain[:, i], 1 + i, condition)
        assert step.std >= 0.1
        each = Normal(step.mean, step.std).log_prob(chain[:, i + 1])[:, :4].clamp(-1.0, 1.2)
        log_ratio = each.flatten(1).mean(1) - extras["log_prob"][:, i]
        weight = 0.5 ** (2 - i)
        clip = float(clip_schedule(3, 0.01, 0.05)[i])
        losses.append(ppo_clip(log_ratio, weight * advantage, clip=clip))
        ratios.append(log_ratio)
    said = agent.policy_loss(seen, extras, advantage)
    torch.testing.assert_close(said.log_ratio, torch.stack(ratios, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(said.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


def test_the_base_begins_and_the_policy_goes_on() -> None:
    """With other weights in the policy, the first step of the chain is still the base's."""
    agent = make("dppo")
    seen = {"state": torch.randn(5, 3)}
    state = agent.generator.get_state()
    before = agent.act(seen, explore=True)[2]["chain"]
    move(agent.policy)
    agent.generator.set_state(state)
    after = agent.act(seen, explore=True)[2]["chain"]
    assert torch.equal(before[:, 0], after[:, 0]), "drawn by the base"
    assert not torch.equal(before[:, 1], after[:, 1])
    move(agent.base)
    agent.generator.set_state(state)
    assert not torch.equal(agent.act(seen, explore=True)[2]["chain"][:, 0], after[:, 0])


@pytest.mark.parametrize("noise_correlation", [0.0, 0.5])
def test_what_does_not_explore_begins_with_the_base_too(noise_correlation: float) -> None:
    """The base takes the first step of the four, the policy the other three, as in what is learned from."""
    agent = make(
        "dppo", noise_level=0.5, start_noise=0.5, noise_correlation=noise_correlation, clip_x0=0.0
    )
    if noise_correlation:
        chunks = torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)
        for policy in (agent.policy, agent.base):
            policy.noise.fit([chunks])
    move(agent.policy)
    seen, generator = {"state": torch.randn(5, 3)}, torch.Generator().manual_seed(8)
    x = 0.5 * torch.randn(5, 4, 2, generator=generator)
    for index in range(4):
        policy = agent.base if index == 0 else agent.policy
        step = policy.acting.step(policy.denoise, x, index, policy.condition(seen))
        x = step.mean
        if step.std:
            x = x + step.std * torch.randn(5, 4, 2, generator=generator)
    expected = agent.policy.colored(x).clamp(-1, 1).detach().numpy()
    agent.seed_actions(8)
    np.testing.assert_allclose(agent.act(seen, explore=False)[0], expected, atol=1e-6)


def test_the_imitation_term_is_how_likely_the_bases_chains_are() -> None:
    agent = make("dppo", bc_coefficient=0.1)
    seen, extras = remembered(agent)
    move(agent.policy)
    state = agent.generator.get_state()
    said = agent.policy_loss(seen, extras, torch.zeros(5))
    agent.generator.set_state(state)
    twin = make("dppo")
    twin.policy.load_state_dict(agent.base.state_dict())
    twin.base.load_state_dict(agent.base.state_dict())
    twin.generator.set_state(state)
    chain = twin.act(seen, explore=True)[2]["chain"]
    likely = agent.policy_loss(
        seen, {"chain": chain, "log_prob": torch.zeros(5, 3)}, torch.zeros(5)
    )
    torch.testing.assert_close(said.loss, -0.1 * likely.log_ratio.mean(), atol=1e-5, rtol=1e-4)
    said.loss.backward()
    assert all(p.grad is None for p in agent.base.parameters())


@pytest.mark.parametrize("actions", [1, 32])
def test_a_clip_means_the_same_for_chunks_of_any_size(actions: int) -> None:
    """Where every number moves by delta, the mean's log-ratio is -delta^2 / (2 std^2) on average, the sum's d times."""
    space = gym.spaces.Box(-1, 1, (4, actions), np.float32)
    agent = make("dppo", STATE, space, prediction="x0", clip_x0=0.0, fine_tuned_steps=1)
    seen, extras = remembered(agent, 2000)
    network = agent.policy.denoiser.forward
    agent.policy.denoiser.forward = lambda *inputs: network(*inputs) + 0.05
    said = agent.policy_loss(seen, extras, torch.ones(2000))
    assert said.log_ratio.mean().item() == pytest.approx(-(0.05**2) / (2 * 0.1**2), abs=0.02)


def test_without_exploring_there_is_only_the_noise_that_the_policy_says() -> None:
    agent = make("dppo", start_noise=0.0)
    seen = {"state": torch.randn(5, 3)}
    first, second = (agent.act(seen, explore=False)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    agent = make("dppo", start_noise=0.0, noise_level=1.0)
    first, second = (agent.act(seen, explore=False)[0] for _ in range(2))
    assert not np.array_equal(first, second)
