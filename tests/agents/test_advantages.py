"""Credit against plain loops, closed forms and, for GAE, Stable-Baselines3."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.core.advantages import (
    ConditionStatistics,
    discounted_sum,
    generalized_advantage,
    group_relative,
    leave_one_out,
    n_step_return,
    set_level,
)
from agents.core.errors import NotFiniteError


def rollout(seed=0, steps=37, envs=3, ends=0.15):
    """Return reward, value, next_value, terminated and truncated of random episodes, [T, N] each."""
    rng = np.random.default_rng(seed)
    reward, value, final = (
        torch.tensor(rng.normal(size=(steps, envs)), dtype=torch.float32) for _ in range(3)
    )
    terminated = torch.tensor(rng.random((steps, envs)) < ends)
    truncated = torch.tensor(rng.random((steps, envs)) < ends) & ~terminated
    last = torch.tensor(rng.normal(size=envs), dtype=torch.float32)
    following = torch.cat([value[1:], last[None]])
    next_value = torch.where(terminated | truncated, final, following)
    return reward, value, next_value, terminated, truncated


@given(st.integers(1, 70), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_discounted_sums_equal_a_loop(steps, seed):
    rng = np.random.default_rng(seed)
    terms, factors = (
        rng.normal(size=(steps, 2)),
        rng.random((steps, 2)) * (rng.random((steps, 2)) > 0.2),
    )
    expected, running = np.zeros((steps, 2)), np.zeros(2)
    for t in reversed(range(steps)):
        running = terms[t] + factors[t] * running
        expected[t] = running
    found = discounted_sum(torch.tensor(terms), torch.tensor(factors))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_generalized_advantages_equal_their_definition_summed_step_by_step(gae_lambda):
    reward, value, next_value, terminated, truncated = rollout()
    found = generalized_advantage(
        reward, value, next_value, terminated, truncated, discount=0.9, gae_lambda=gae_lambda
    )
    steps, envs = reward.shape
    for env in range(envs):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                future = 0.0 if terminated[k, env] else 0.9 * next_value[k, env].item()
                total += weight * (reward[k, env].item() + future - value[k, env].item())
                weight *= 0.9 * gae_lambda
                if terminated[k, env] or truncated[k, env]:
                    break
            assert found[t, env].item() == pytest.approx(total, abs=1e-4)


def test_time_limits_bootstrap_and_terminations_do_not():
    """DPPO's trainer ignored the final observation: the trace ran on into the next episode."""
    zero = torch.zeros(3, 1)
    end = torch.tensor([[False], [True], [False]])
    never = torch.zeros(3, 1, dtype=torch.bool)
    next_value = torch.tensor([[1.0], [10.0], [100.0]])
    cut = generalized_advantage(zero, zero, next_value, never, end, discount=0.5, gae_lambda=1.0)
    torch.testing.assert_close(cut[:2], torch.tensor([[0.5 + 0.5 * 5.0], [5.0]]))
    over = generalized_advantage(zero, zero, next_value, end, never, discount=0.5, gae_lambda=1.0)
    torch.testing.assert_close(over[:2], torch.tensor([[0.5], [0.0]]))
    assert cut[2] == over[2] == 50


def test_generalized_advantages_equal_stable_baselines3():
    """Its buffer adds the value at a time limit to the reward, and takes every end for a termination."""
    import gymnasium as gym
    from stable_baselines3.common.buffers import RolloutBuffer

    reward, value, next_value, terminated, truncated = rollout(seed=3, steps=64, envs=4)
    ended = terminated | truncated
    box = gym.spaces.Box(-1, 1, (1,), np.float32)
    buffer = RolloutBuffer(64, box, box, gae_lambda=0.95, gamma=0.99, n_envs=4)
    buffer.reset()
    started = torch.cat([torch.ones(1, 4, dtype=torch.bool), ended[:-1]])
    paid = reward + 0.99 * next_value * truncated
    for t in range(64):
        empty = np.zeros((4, 1), np.float32)
        buffer.add(empty, empty, paid[t].numpy(), started[t].numpy(), value[t], torch.zeros(4))
    buffer.compute_returns_and_advantage(next_value[-1], ended[-1].numpy())
    ours = generalized_advantage(
        reward, value, next_value, terminated, truncated, discount=0.99, gae_lambda=0.95
    )
    np.testing.assert_allclose(ours.numpy(), buffer.advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 100, None])
def test_n_step_returns_equal_a_loop(n):
    reward, _, next_value, terminated, truncated = rollout(seed=1)
    found = n_step_return(reward, next_value, terminated, truncated, discount=0.9, steps=n)
    steps, envs = reward.shape
    for env in range(envs):
        for t in range(steps):
            total, last = 0.0, min(t + (n or steps), steps) - 1
            for k in range(t, last + 1):
                total += 0.9 ** (k - t) * reward[k, env].item()
                if terminated[k, env] or truncated[k, env] or k == last:
                    if not terminated[k, env]:
                        total += 0.9 ** (k - t + 1) * next_value[k, env].item()
                    break
            assert found[t, env].item() == pytest.approx(total, abs=1e-4)


def test_a_lambda_of_one_is_the_monte_carlo_return():
    reward, value, next_value, terminated, truncated = rollout(seed=2)
    ends = (next_value, terminated, truncated)
    advantage = generalized_advantage(reward, value, *ends, discount=0.97, gae_lambda=1.0)
    torch.testing.assert_close(advantage + value, n_step_return(reward, *ends, discount=0.97))


GROUPS = torch.tensor([7, 7, 3, 7, 3, 9, 5, 5])
REWARDS = torch.tensor([1.0, 2.0, 0.0, 6.0, 4.0, 8.0, 2.0, 2.0])


@pytest.mark.parametrize("spread", ["group", "batch", "none"])
def test_group_relative_advantages_equal_a_loop(spread):
    result = group_relative(REWARDS, GROUPS, spread=spread, epsilon=0.0)
    for i in range(8):
        mine = REWARDS[GROUPS == GROUPS[i]].numpy()
        if mine.std() == 0:
            assert not result.kept[i]
            assert result.advantage[i] == 0
            continue
        assert result.kept[i]
        scale = {"group": mine.std(), "batch": REWARDS.numpy().std(), "none": 1.0}[spread]
        assert result.advantage[i].item() == pytest.approx(
            (REWARDS[i].item() - mine.mean()) / scale, rel=1e-5
        )


def test_groups_without_spread_are_dropped_whatever_the_rewards_size():
    """Rounding of equal rewards over an epsilon would be a full-sized advantage."""
    reward = torch.tensor([0.1, 0.1, 0.1, 1e6 + 0.1, 1e6 + 0.1, 1e6 + 0.1, 0.0, 1e-3])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    result = group_relative(reward, group)
    assert result.kept.tolist() == [False] * 6 + [True] * 2
    assert result.advantage[:6].abs().max() == 0


def test_extreme_advantages_are_limited():
    reward = torch.cat([torch.zeros(99), torch.ones(1)])
    result = group_relative(reward, torch.zeros(100, dtype=torch.int64))
    assert result.advantage.max() == 5
    unlimited = group_relative(reward, torch.zeros(100, dtype=torch.int64), limit=None)
    assert unlimited.advantage.max() == pytest.approx(9.94, abs=0.02)


def test_leave_one_out_compares_with_the_others():
    result = leave_one_out(REWARDS, GROUPS)
    for i in range(8):
        others = [REWARDS[j].item() for j in range(8) if j != i and GROUPS[j] == GROUPS[i]]
        assert bool(result.kept[i]) == bool(others)
        if others:
            assert result.advantage[i].item() == pytest.approx(
                REWARDS[i].item() - np.mean(others), abs=1e-6
            )


def test_leave_one_out_gives_the_policy_gradient_without_bias():
    """REINFORCE on a three-armed bandit, its expectation over all pairs of draws."""
    logits = torch.tensor([0.2, -0.3, 0.5], requires_grad=True)
    payoff = torch.tensor([1.0, 0.0, 3.0])
    (exact,) = torch.autograd.grad((logits.softmax(0) * payoff).sum(), logits)
    total = torch.zeros(3)
    group = torch.zeros(2, dtype=torch.int64)
    for i in range(3):
        for j in range(3):
            p = logits.softmax(0)
            draw = torch.tensor([i, j])
            advantage = leave_one_out(payoff[draw], group).advantage
            (gradient,) = torch.autograd.grad((p[draw].log() * advantage).mean(), logits)
            total += (p[i] * p[j]).item() * gradient
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=1e-6)


def test_set_level_advantages_are_shared_by_the_members_and_averaged_over_sets():
    score = torch.tensor([3.0, 1.0, 5.0, 5.0, 9.0])
    members = torch.tensor([[0, 1], [1, 2], [3, 4], [3, 5], [6, 6]])
    start = torch.tensor([0, 0, 1, 1, 2])
    result = set_level(score, members, start, rollouts=8)
    expected = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(result.advantage, expected)
    assert result.kept.tolist() == [True] * 6 + [False] * 2, (
        "one set alone is compared with nothing"
    )


def test_conditions_are_compared_with_their_own_past_once_it_is_long_enough():
    statistics = ConditionStatistics(window=6, at_least=4)
    first = torch.tensor([1.0, 3.0, 10.0, 14.0])
    names = ["easy", "easy", "hard", "hard"]
    found = statistics.advantage(first, names, epsilon=0.0)
    torch.testing.assert_close(found, (first - 7) / first.std(correction=0))
    second = torch.tensor([2.0, 4.0, 12.0, 16.0])
    found = statistics.advantage(second, names, epsilon=0.0)
    easy, hard = np.array([1, 3, 2, 4]), np.array([10, 14, 12, 16])
    expected = [(2 - easy.mean()) / easy.std(), (4 - easy.mean()) / easy.std(),
                (12 - hard.mean()) / hard.std(), (16 - hard.mean()) / hard.std()]  # fmt: skip
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)

    twin = ConditionStatistics(window=6, at_least=4)
    twin.load_state_dict(statistics.state_dict())
    third = torch.tensor([0.0, 0.0, 0.0, 20.0])
    torch.testing.assert_close(statistics.advantage(third, names), twin.advantage(third, names))
    assert all(len(values) == 6 for values in statistics.state_dict()["rewards"].values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_and_not_compared(bad):
    """One NaN would be left out of its group without a word, or make a whole batch NaN."""
    rewards = REWARDS.clone()
    rewards[3] = bad
    said = rf"'reward' is {bad} in sample 3 of 8 \(group 7\)"
    for spread in ("group", "batch", "none"):
        with pytest.raises(NotFiniteError, match=said):
            group_relative(rewards, GROUPS, spread=spread)
    with pytest.raises(NotFiniteError, match=said):
        leave_one_out(rewards, GROUPS)
    members = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(NotFiniteError, match=rf"'score' is {bad} in sample 1 of 2 \(start 4\)"):
        set_level(torch.tensor([0.5, bad]), members, torch.tensor([4, 4]), rollouts=3)


def test_a_reward_that_is_not_finite_does_not_poison_its_conditions_past():
    statistics = ConditionStatistics(window=4, at_least=2)
    names = ["easy", "hard", "easy", "hard"]
    statistics.advantage(torch.tensor([1.0, 2.0, 3.0, 5.0]), names)
    before = statistics.state_dict()
    with pytest.raises(
        NotFiniteError, match=r"'reward' is nan in sample 1 of 4 \(condition 'hard'\)"
    ):
        statistics.advantage(torch.tensor([1.0, float("nan"), 3.0, 5.0]), names)
    assert statistics.state_dict() == before
    assert statistics.advantage(torch.tensor([1.0, 2.0, 3.0, 5.0]), names).isfinite().all()


def test_a_window_shorter_than_what_is_needed_is_refused():
    with pytest.raises(ValueError, match="at_least is 9"):
        ConditionStatistics(window=8, at_least=9)
