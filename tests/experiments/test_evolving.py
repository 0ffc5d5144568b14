"""What evolution stands on: tasks against Gymnasium, learners against a loop, the strategy against formulas."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import nn

from agents.core import policy_gradient as pg
from agents.core.errors import UserError
from experiments.evolving import learners as learners_module
from experiments.evolving.learners import (
    LearnerConfig,
    draw,
    final_return,
    first_networks,
    learn,
)
from experiments.evolving.strategy import EvolutionStrategy, centered_ranks
from experiments.evolving.tasks import TASKS, CartPole, Pendulum, Point

TINY = LearnerConfig(iterations=3, num_envs=3, epochs=2, minibatches=2, hidden=4)
SHORT = replace(Pendulum(), horizon=7)


def test_the_pendulum_moves_as_gymnasiums():
    env = gym.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    env.dt, task = 0.1, Pendulum()
    state = torch.tensor([2.5, -0.7])
    env.state = state.double().numpy()
    for action in (0.3, -1.0, 0.9, 2.0, -0.1, 1.0):
        env.step(np.array([2 * action]))
        state, _ = task.step(state, torch.tensor([action]))
        np.testing.assert_allclose(state, env.state, rtol=1e-4)


def test_the_cart_moves_as_gymnasiums():
    env = gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    env.tau, env.kinematics_integrator, task = 0.025, "semi-implicit", CartPole()
    state = torch.tensor([0.1, -0.2, 0.15, 0.3])
    env.state = state.double().numpy()
    for action in (1, 1, 0):
        for _ in range(2):
            env.step(action)
        state, _ = task.step(state, torch.tensor([2.0 * action - 1]))
        np.testing.assert_allclose(state, env.state, rtol=1e-4)


def test_the_point_moves_as_written_in_a_loop():
    task, place, speed = Point(), [1.0, -0.5], [0.2, 0.0]
    state = torch.tensor([*place, *speed])
    for action in ((1.0, -0.3), (5.0, 0.2)):
        state, reward = task.step(state, torch.tensor(action))
        cut = [min(max(a, -1), 1) for a in action]
        expected = 1 - np.hypot(*place) - 0.01 * sum(a * a for a in cut)
        speed = [0.97 * v + 0.2 * a for v, a in zip(speed, cut, strict=True)]
        place = [p + 0.1 * v for p, v in zip(place, speed, strict=True)]
        np.testing.assert_allclose(state, [*place, *speed], rtol=1e-5)
        assert reward.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_stay_finite_and_give_what_they_say(name):
    task, generator = TASKS[name], torch.Generator().manual_seed(0)
    state = task.reset(torch.rand(2, 5, task.state_size, generator=generator))
    for _ in range(task.horizon):
        action = 3 * torch.randn(2, 5, task.action_size, generator=generator)
        state, reward = task.step(state, action)
        assert state.shape == (2, 5, task.state_size)
        assert task.observe(state).shape == (2, 5, task.observation_size)
        assert reward.shape == (2, 5)
        assert state.isfinite().all()
        assert (reward <= 1).all()


class Reference(nn.Module):
    """One learner as anybody would write it: modules, one sample of chance at a time, no batch of learners."""

    def __init__(self, task, config, first):
        super().__init__()
        self.policy = self._perceptron(first.policy[:-1])
        self.value = self._perceptron(first.value)
        self.log_std = nn.Parameter(first.policy[-1][0, 0].clone())
        self.task, self.config = task, config

    def _perceptron(self, parameters):
        layers = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data.copy_(weight[0].T)
            linear.bias.data.copy_(bias[0, 0])
            layers += [linear, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def act(self, observation):
        return torch.distributions.Normal(self.policy(observation), self.log_std.exp())

    def iterate(self, draws, surrogate, optimizer):
        """Run every environment on its own, then take the gradient steps; return the mean return."""
        steps, envs = self.task.horizon, self.config.num_envs
        rows = {}
        total = 0.0
        for e in range(envs):
            state, path = self.task.reset(draws.first[0, e]), []
            with torch.no_grad():
                for t in range(steps):
                    seen = self.task.observe(state)
                    policy = self.act(seen)
                    action = policy.mean + policy.stddev * draws.noise[t, 0, e]
                    log_prob = policy.log_prob(action).sum()
                    value = self.value(seen)[0]
                    state, reward = self.task.step(state, action)
                    total += reward.item() / envs
                    path.append((seen, action, log_prob, value, 0.05 * reward))
                after, credit = self.value(self.task.observe(state))[0], 0.0
            for t in reversed(range(steps)):
                seen, action, log_prob, value, reward = path[t]
                credit = reward + 0.95 * after - value + 0.95 * 0.95 * credit
                after = value
                rows[t * envs + e] = (seen, action, log_prob, credit, credit + value)
        for order in draws.order[:, 0]:
            for index in order.chunk(self.config.minibatches):
                batch = [
                    torch.stack(part) for part in zip(*(rows[int(i)] for i in index), strict=True)
                ]
                seen, action, log_prob, advantage, target = batch
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                log_ratio = self.act(seen).log_prob(action).sum(-1) - log_prob
                error = nn.functional.mse_loss(self.value(seen)[:, 0], target)
                optimizer.zero_grad()
                (surrogate(log_ratio, advantage).mean() + 0.5 * error).backward()
                nn.utils.clip_grad_norm_(self.parameters(), self.config.max_gradient_norm)
                optimizer.step()
        return total


@pytest.mark.parametrize("task", [SHORT, replace(Point(), horizon=6)], ids=["pendulum", "point"])
def test_each_of_many_learners_is_the_loop_of_one(task):
    clips = torch.tensor([0.05, 0.2, 0.2])

    def surrogate(log_ratio, advantage):
        rows = [
            pg.ppo_clip(x, a, clip=c.item())
            for x, a, c in zip(log_ratio, advantage, clips, strict=True)
        ]
        return torch.stack(rows)

    together = learn(task, surrogate, [3, 3, 4], TINY)
    assert together[0, 0] == together[1, 0], "one seed: the same first rollout"
    assert together[0, -1] != together[1, -1], "and another policy, for another surrogate"
    for member, seed in enumerate((3, 3, 4)):
        generator = torch.Generator().manual_seed(seed)
        alone = Reference(task, TINY, first_networks(task, TINY, generator))
        optimizer = torch.optim.Adam(alone.parameters(), lr=TINY.learning_rate, eps=1e-5)
        loss = partial(pg.ppo_clip, clip=clips[member].item())
        returns = [
            alone.iterate(draw(task, TINY, generator), loss, optimizer)
            for _ in range(TINY.iterations)
        ]
        np.testing.assert_allclose(together[member], returns, rtol=1e-3, atol=1e-3)


def test_a_learner_learns_from_its_rewards_and_not_from_others(monkeypatch):
    task, config = Point(), LearnerConfig(iterations=10)
    returns = learn(task, pg.ppo_clip, [0, 1], config)
    assert (final_return(returns) > returns[:, 0] + 25).all()
    right = learners_module.generalized_advantage

    def shuffled(reward, *rest, **keywords):
        order = torch.randperm(reward.numel(), generator=torch.Generator().manual_seed(0))
        return right(reward.flatten()[order].view_as(reward), *rest, **keywords)

    monkeypatch.setattr(learners_module, "generalized_advantage", shuffled)
    lost = learn(task, pg.ppo_clip, [0, 1], config)
    assert (final_return(lost) < lost[:, 0] + 15).all()


def test_the_final_return_is_the_last_quarters():
    returns = torch.arange(16.0).reshape(2, 8)
    assert final_return(returns).tolist() == [6.5, 14.5]
    assert final_return(returns[:, :3]).tolist() == [2.0, 10.0]


def test_ranks_are_scipys_and_what_is_not_finite_is_worst():
    fitness = torch.tensor([3.0, -1.0, 3.0, 7.0, 0.0])
    expected = (rankdata(fitness) - 1) / 4 - 0.5
    np.testing.assert_allclose(centered_ranks(fitness), expected)
    assert centered_ranks(torch.tensor([1.0, torch.nan, 0.0])).tolist() == [0.5, -0.5, 0.0]
    assert centered_ranks(torch.full((4,), 2.0)).tolist() == [0.0] * 4


def climb(shuffle: bool, generations: int = 60, seed: int = 0) -> float:
    """Return the squared distance from the top of a bowl, from 10 at the start."""
    top = torch.ones(10)
    strategy = EvolutionStrategy(
        torch.zeros(10), population=16, spread=0.1, learning_rate=0.05, seed=seed
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(generations):
        fitness = -(strategy.ask() - top).square().sum(1)
        strategy.tell(fitness[torch.randperm(16, generator=generator)] if shuffle else fitness)
    return (strategy.mean - top).square().sum().item()


def test_evolution_climbs_a_bowl_and_not_when_fitness_is_shuffled():
    assert climb(shuffle=False) < 1
    assert climb(shuffle=True) > 5


def test_a_step_is_adams_along_the_papers_estimate():
    strategy = EvolutionStrategy(
        torch.zeros(3), population=4, spread=0.5, learning_rate=0.1, seed=2
    )
    members = strategy.ask()
    torch.testing.assert_close(members[:2], -members[2:])
    fitness = torch.tensor([2.0, 0.0, 1.0, 5.0])
    estimate = torch.zeros(3)
    for rank, member in zip((1 / 6, -0.5, -1 / 6, 0.5), members, strict=True):
        estimate += rank * member / (4 * 0.5**2)
    mean = torch.zeros(3, requires_grad=True)
    mean.grad = -estimate
    torch.optim.Adam([mean], lr=0.1).step()
    strategy.tell(fitness)
    torch.testing.assert_close(strategy.mean, mean.detach())
    assert not strategy.ask().sub(strategy.mean).equal(members), (
        "every generation has its own steps"
    )


def test_twins_need_an_even_population():
    with pytest.raises(ValueError, match="even"):
        EvolutionStrategy(torch.zeros(3), population=5, spread=0.1, learning_rate=0.1, seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"discount": 1.0}, "discount is 1.0"),
        ({"initial_log_std": float("nan")}, "initial_log_std is nan"),
    ],
)
def test_settings_that_teach_nothing_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        LearnerConfig(**change)
