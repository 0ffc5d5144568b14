"""PPO's adaptive KL penalty and REINFORCE, as settings of PPO."""

import copy
import dataclasses
import math

import pytest
import torch

from agents.core import policy_gradient
from agents.core.advantages import n_step_return
from agents.core.errors import UserError
from agents.on_policy.ppo import PPO, REINFORCE, PPOConfig, adapted_coefficient
from tests.agents.on_policy import CONTINUOUS, DISCRETE, ENVS, STATE, STEPS, collect

ADAPTIVE = PPOConfig(
    surrogate="kl_penalty", adaptive_kl_target=0.01, rollout_length=STEPS, minibatch_size=12, epochs=2,
    hidden=(16,),
)  # fmt: skip


def build(seed=0, action_space=CONTINUOUS, **changes):
    return PPO(
        STATE, action_space, dataclasses.replace(ADAPTIVE, **changes), num_envs=ENVS, seed=seed
    )


@pytest.mark.parametrize(
    ("divergence", "factor"),
    [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1), (0.01, 1), (0.0149, 1), (0.0151, 2), (1.0, 2)],
)
def test_the_rule_of_the_paper(divergence, factor):
    """Section 4: below target / 1.5 half, above 1.5 * target twice, and else as it was."""
    adapted = adapted_coefficient(torch.tensor(3.0), torch.tensor(divergence), target=0.01)
    assert adapted.item() == pytest.approx(3 * factor)


def test_a_coefficient_never_leaves_its_numbers_for_good():
    for divergence, limit in ((0.0, 1e-10), (math.inf, 1e10)):
        coefficient = torch.tensor(1.0)
        for _ in range(200):
            coefficient = adapted_coefficient(coefficient, torch.tensor(divergence), target=0.01)
        assert coefficient.item() == pytest.approx(limit)
        back = adapted_coefficient(
            coefficient, torch.tensor(1.0 - min(divergence, 1.0)), target=0.01
        )
        assert back != coefficient


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_updates_come_to_the_target_where_a_fixed_coefficient_leaves_them_far(action_space):
    """From a penalty that is far too small, and from one that is far too large."""
    for start in (0.03, 50.0):
        reached = {}
        for target in (0.01, math.inf):
            agent = build(
                action_space=action_space, kl_coefficient=start, adaptive_kl_target=target, epochs=8,
                learning_rate=3e-3,
            )  # fmt: skip
            divergences = []
            for seed in range(14):
                experience = collect(agent, STATE, action_space, seed).experience()
                agent.update(experience)
                policy = agent.network(experience.observation(torch.arange(ENVS * STEPS)))[0]
                samples = agent.credit(experience)
                log_ratio = policy.log_prob(samples.action) - samples.log_prob
                divergences.append(policy_gradient.kl_estimate(log_ratio).mean().item())
            reached[target] = sum(divergences[-5:]) / 5
        assert 0.004 < reached[0.01] < 0.025
        assert not 0.002 < reached[math.inf] < 0.04


def test_the_loss_uses_the_coefficient_of_now():
    agent = build(kl_coefficient=2.0)
    log_ratio, advantage = torch.tensor([0.3, -0.2]), torch.tensor([1.0, -1.0])
    expected = policy_gradient.kl_penalty(log_ratio, advantage, coefficient=2.0)
    torch.testing.assert_close(agent.surrogate(log_ratio, advantage), expected)
    metrics = agent.update(collect(agent, STATE, CONTINUOUS).experience())
    now = metrics["policy/kl_coefficient"].item()
    assert now == agent.kl_coefficient.item()
    expected = policy_gradient.kl_penalty(log_ratio, advantage, coefficient=now)
    torch.testing.assert_close(agent.surrogate(log_ratio, advantage), expected)


def test_the_coefficient_is_saved_and_goes_on_bit_for_bit():
    first = build(seed=3)
    for seed in range(3):
        first.update(collect(first, STATE, CONTINUOUS, seed).experience())
    assert first.kl_coefficient != 1
    second = build(seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.kl_coefficient == first.kl_coefficient
    metrics = [
        agent.update(collect(agent, STATE, CONTINUOUS, 9).experience()) for agent in (first, second)
    ]
    assert metrics[0] == metrics[1]
    for ours, theirs in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"surrogate": "ppo_clip"}, "kl_penalty"),
        ({"kl_coefficient": 0.0}, "kl_coefficient"),
        ({"adaptive_kl_target": 0.0}, "adaptive_kl_target"),
        ({"adaptive_kl_target": math.nan}, "adaptive_kl_target"),
    ],
)
def test_a_target_that_nothing_can_follow_is_refused(changes, said):
    with pytest.raises(UserError, match=said) as refused:
        dataclasses.replace(ADAPTIVE, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_takes_one_step_on_monte_carlo_returns(baseline):
    """Its gradient is that of -log pi times the discounted return, less the value where that is asked for."""
    config = dataclasses.replace(
        REINFORCE, rollout_length=STEPS, hidden=(8,), discount=0.9, normalize_advantage=False,
        baseline=baseline, max_gradient_norm=1e9, value_coefficient=0.0,
    )  # fmt: skip
    agent = PPO(STATE, CONTINUOUS, config, num_envs=ENVS)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    network, everything = copy.deepcopy(agent.network), torch.arange(ENVS * STEPS)
    value = experience.extras["value"]
    following = network(experience.next_observation(everything))[1].detach().reshape(value.shape)
    credit = n_step_return(
        experience.reward, following, experience.terminated, experience.truncated, discount=0.9
    )
    if baseline:
        credit = credit - value
    policy = network(experience.observation(everything))[0]
    loss = -(policy.log_prob(experience.action.flatten(0, 1)) * credit.flatten()).mean()
    actor = list(network.actor.parameters())
    expected = torch.autograd.grad(loss, actor)
    agent.update(experience)
    assert agent.gradient_updates == 1
    for parameter, gradient in zip(agent.network.actor.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
