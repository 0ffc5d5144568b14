"""ReinFlow against its formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from agents.core.policy_gradient import ppo_clip
from tests.agents.fine_tuning import collect, make, move, remembered


def asked_at(module: Any, times: list[float]) -> None:
    """Note the times at which a network is asked."""
    forward = module.forward

    def noting(x: Any, t: Any, condition: Any) -> Any:
        times.extend(t.unique().tolist())
        return forward(x, t, condition)

    module.forward = noting


def test_sampling_and_log_probabilities_ask_at_the_same_times() -> None:
    """The authors' code draws at k / (K - 1) and evaluates at k / K, or the other way round."""
    agent = make("reinflow")
    flow: list[float] = []
    noise: list[float] = []
    asked_at(agent.policy.denoiser, flow)
    asked_at(agent.noise, noise)
    seen, extras = remembered(agent)
    drawn = sorted(set(flow)), sorted(set(noise))
    flow.clear()
    noise.clear()
    agent.policy_loss(seen, extras, torch.ones(5))
    assert (sorted(set(flow)), sorted(set(noise))) == drawn
    assert drawn[0] == drawn[1] == [0.25, 0.5, 0.75, 1.0]


def test_the_chains_log_probability_is_the_mean_over_steps_and_numbers() -> None:
    """x - v / K, with the learned spread, by torch's Normal; and the entropy of the noise."""
    agent = make("reinflow", horizon=6, entropy_coefficient=0.5, clip=0.05)
    move(agent.noise, 0.5)
    seen, extras = remembered(agent)
    move(agent.policy, 0.1)
    condition = agent.policy.condition(seen)
    chain, logs, entropies = extras["chain"], [], []
    for k, t in enumerate((1.0, 0.75, 0.5, 0.25)):
        at = torch.full((5,), t)
        x = chain[:, k].clamp(-1, 1) if k else chain[:, k]
        mean = x - agent.policy.denoiser(x, at, condition) / 4
        normal = Normal(mean, agent.noise(x, at, condition))
        logs.append(normal.log_prob(chain[:, k + 1])[:, :4].flatten(1).mean(1))
        entropies.append(normal.entropy()[:, :4].mean())
    log_ratio = torch.stack(logs).mean(0) - extras["log_prob"]
    advantage = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0])
    said = agent.policy_loss(seen, extras, advantage)
    torch.testing.assert_close(said.log_ratio, log_ratio, atol=1e-5, rtol=1e-4)
    entropy = torch.stack(entropies).mean()
    torch.testing.assert_close(said.metrics["policy/entropy"], entropy, atol=1e-5, rtol=1e-4)
    written = ppo_clip(log_ratio, advantage, clip=0.05).mean() - 0.5 * entropy
    torch.testing.assert_close(said.loss, written, atol=1e-5, rtol=1e-4)


def test_the_noise_stays_between_its_bounds_and_depends_on_observation_and_time() -> None:
    agent = make("reinflow", smallest_noise=0.1, largest_noise=0.3)
    move(agent.noise, 3.0)
    condition = torch.randn(100, 3)
    std = agent.noise(torch.zeros(100, 4, 2), torch.rand(100), condition).detach()
    assert std.shape == (100, 4, 2)
    assert 0.1 - 1e-6 <= float(std.min()) < 0.12
    assert 0.28 < float(std.max()) <= 0.3 + 1e-6
    same = agent.noise(torch.ones(100, 4, 2), torch.full((100,), 0.5), condition[:1].expand(100, 3))
    assert torch.equal(same[0], same[-1])


def test_what_is_drawn_has_the_learned_spread() -> None:
    agent = make("reinflow", clip_samples=0.0)
    seen = {"state": torch.zeros(4000, 3)}
    chain = agent.act(seen, explore=True)[2]["chain"]
    at, condition = torch.full((4000,), 1.0), agent.policy.condition(seen)
    mean = chain[:, 0] - agent.policy.denoiser(chain[:, 0], at, condition) / 4
    spread = agent.noise(chain[:, 0], at, condition)[0]
    torch.testing.assert_close((chain[:, 1] - mean).std(0), spread, rtol=0.06, atol=0)


def test_the_noise_network_is_not_asked_when_nothing_is_explored() -> None:
    agent = make("reinflow", start_noise=0.0)
    asked: list[float] = []
    asked_at(agent.noise, asked)
    seen = {"state": torch.randn(5, 3)}
    first, second = (agent.act(seen, explore=False)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not asked
    agent.act(seen, explore=True)
    assert asked


def test_samples_are_clipped_in_evaluations_too() -> None:
    agent = make("reinflow", denoising_steps=2)
    seen: list[torch.Tensor] = []
    forward = agent.policy.denoiser.forward

    def strong(x: Any, t: Any, condition: Any) -> Any:
        seen.append(x)
        return 0 * forward(x, t, condition) - 100

    agent.policy.denoiser.forward = strong
    agent.act({"state": torch.randn(5, 3)}, explore=False)
    assert seen[1].max() == 1.0


def test_the_distance_to_the_base_is_that_of_two_flows_from_one_noise() -> None:
    agent = make("reinflow", w2_coefficient=0.7, entropy_coefficient=0.0)
    seen, extras = remembered(agent)
    assert agent.policy_loss(seen, extras, torch.zeros(5)).loss.item() == 0
    move(agent.policy, 0.1)
    ends = []
    for policy in (agent.policy, agent.base):
        x, condition = extras["chain"][:, 0], policy.condition(seen)
        for k, t in enumerate((1.0, 0.75, 0.5, 0.25)):
            x = x.clamp(-1, 1) if k else x
            x = x - policy.denoiser(x, torch.full((5,), t), condition) / 4
        ends.append(x.clamp(-1, 1))
    said = agent.policy_loss(seen, extras, torch.zeros(5))
    expected = 0.7 * (ends[0] - ends[1]).square().mean()
    torch.testing.assert_close(said.loss, expected, atol=1e-6, rtol=1e-4)
    said.loss.backward()
    assert all(p.grad is None for p in agent.base.parameters())


def test_the_upper_bound_falls_between_rollouts_only() -> None:
    agent = make("reinflow", noise_hold_steps=100, noise_decay_steps=100)
    told = []
    for seed, steps in enumerate((0, 100, 150, 500)):
        agent.set_progress(steps)
        before = agent.noise.bounds.clone()
        rollout = collect(agent, seed=seed)
        assert torch.equal(agent.noise.bounds, before)
        metrics = agent.update(rollout.experience())
        assert metrics["ratio/first_deviation"] < 1e-5
        told.append(agent.noise.bounds.tolist())
    assert [low for low, _ in told] == pytest.approx([0.1] * 4)
    assert [high for _, high in told] == pytest.approx([0.24, 0.24, 0.17, 0.1])
