"""REBEL's two forms against its closed form on bandits, and its update against its formulas."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from agents.core.distributions import Categorical, Gaussian, kl
from agents.core.errors import UserError
from agents.on_policy.losses import normalized
from agents.on_policy.rebel import REBEL, REBELConfig, baseline_loss, sampled_loss
from tests.agents.on_policy import (
    BOTH,
    CHUNK,
    CONTINUOUS,
    DISCRETE,
    ENVS,
    PIXELS,
    STATE,
    STEPS,
    collect,
)

TINY = REBELConfig(
    rollout_length=STEPS, minibatch_size=12, epochs=2, hidden=(16,), feature_dim=8, encoder="small",
)  # fmt: skip


def build(space=STATE, action_space=CONTINUOUS, seed=0, **changes):
    config = dataclasses.replace(TINY, **changes)
    return REBEL(space, action_space, config, num_envs=ENVS, seed=seed)


def bandits(states, actions, seed=0):
    """Logits of an old policy and its advantages, whose mean in every state is 0, [states, actions] each."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    return old, reward - (old.softmax(-1) * reward).sum(-1, keepdim=True)


def mirror_descent(old, advantage, eta):
    """pi_old exp(eta A) / Z."""
    return (old.log_softmax(-1) + eta * advantage).softmax(-1)


def minimize(loss, old, steps=100):
    """Return the probabilities that minimize a loss of logits."""
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, tolerance_grad=1e-14, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def every_action(old, logits):
    """Return log-ratios [S, A] and KL(old || new) [S]."""
    log_ratio = logits.log_softmax(-1) - old.log_softmax(-1)
    return log_ratio, kl(Categorical(old), Categorical(logits))


@pytest.mark.parametrize("eta", [0.1, 1.0, 3.0])
def test_against_the_average_the_solution_is_mirror_descent_in_every_state(eta):
    """Here the loss is exact: steps of all actions, as often as the old policy takes them."""
    old, advantage = bandits(states=3, actions=3)

    def loss(logits):
        log_ratio, divergence = every_action(old, logits)
        each = [
            probability * baseline_loss(x[None], a[None], d[None], eta)
            for p, xs, advantages, d in zip(
                old.softmax(-1), log_ratio, advantage, divergence, strict=True
            )
            for probability, x, a in zip(p, xs, advantages, strict=True)
        ]
        return torch.stack(each).sum()

    solution = minimize(loss, old)
    torch.testing.assert_close(solution, mirror_descent(old, advantage, eta), rtol=0, atol=1e-4)


def test_against_the_average_half_the_papers_loss_is_kept():
    """Averaged over both actions of a state, the paper's pairs are twice the steps against their average."""
    old, advantage = bandits(states=1, actions=4)
    torch.manual_seed(1)
    logits = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    log_ratio, divergence = every_action(old, logits)
    x, a, p = log_ratio[0], advantage[0], old.softmax(-1)[0]
    eta = 0.7
    papers = sum(
        p[i] * p[j] * ((x[i] - x[j]) / eta - (a[i] - a[j])).square()
        for i, j in itertools.product(range(4), repeat=2)
    )
    ours = sum(p[i] * baseline_loss(x[i : i + 1], a[i : i + 1], divergence, eta) for i in range(4))
    # Only up to float32, in which surrogates compute.
    torch.testing.assert_close(ours.double() / (eta / 2), papers / 2, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, papers)]
    torch.testing.assert_close(gradients[0] / (eta / 2), gradients[1] / 2, rtol=1e-3, atol=1e-5)


def all_pairs(log_ratio, advantage, eta):
    """Return the paper's loss over all ordered pairs of a batch, in a loop."""
    pairs = list(itertools.permutations(range(len(log_ratio)), 2))
    squares = [
        ((log_ratio[i] - log_ratio[j]) / eta - (advantage[i] - advantage[j])).square()
        for i, j in pairs
    ]
    return torch.stack(squares).mean()


def test_sampled_pairs_average_to_all_pairs_and_these_are_twice_a_variance():
    torch.manual_seed(0)
    x, a = torch.randn(6), torch.randn(6)
    orders = list(itertools.permutations(range(6)))
    drawn = (
        torch.stack([sampled_loss(x[list(o)], a[list(o)], 0.4) for o in orders]).mean() * 4 / 0.4
    )
    torch.testing.assert_close(drawn, all_pairs(x, a, 0.4))
    torch.testing.assert_close(drawn, 2 * (x / 0.4 - a).var())
    odd = sampled_loss(torch.cat([x, torch.tensor([99.0])]), torch.cat([a, torch.zeros(1)]), 0.4)
    torch.testing.assert_close(odd, sampled_loss(x, a, 0.4), msg="an odd one is left out")


def drawn_bandit(old, steps, seed=0):
    """Return states and actions of a rollout, int64 [steps] each."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(len(old), (steps,), generator=generator)
    action = torch.multinomial(old.softmax(-1)[state], 1, generator=generator)[:, 0]
    return state, action


def sampled_solution(old, advantage, eta, batch=4096, passes=300):
    """Minimize over freshly paired steps, as the agent does."""
    state, action = drawn_bandit(old, batch)
    logits = old.clone().float().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.03)
    generator = torch.Generator().manual_seed(1)
    for _ in range(passes):
        order = torch.randperm(batch, generator=generator)
        s, a = state[order], action[order]
        log_ratio, _ = every_action(old.float(), logits)
        loss = sampled_loss(log_ratio[s, a], advantage.float()[s, a], eta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1).double()


def test_in_one_state_sampled_pairs_find_mirror_descent_too():
    old, advantage = bandits(states=1, actions=4)
    solution = sampled_solution(old, advantage, eta=1.0)
    torch.testing.assert_close(solution, mirror_descent(old, advantage, 1.0), rtol=0, atol=0.01)
    assert (solution - old.softmax(-1)).abs().max() > 0.1, "it had to move"


def test_across_states_sampled_pairs_are_wrong_in_second_order_of_eta():
    """What the docstring owns up to: log Z differs where one state's actions matter and another's do not."""
    old, advantage = bandits(states=2, actions=3, seed=3)
    advantage[0] *= 3
    advantage[1] *= 0.1
    errors = {}
    for eta in (0.1, 0.8):
        found = sampled_solution(old, advantage, eta)
        exact = mirror_descent(old, advantage, eta)
        errors[eta] = (found - exact).abs().max() / eta
    assert errors[0.1] < 0.05
    assert errors[0.8] > 2 * errors[0.1]


@pytest.mark.parametrize("form", ["baseline", "sampled"])
def test_at_the_policy_that_acted_the_gradient_is_the_policy_gradient(form):
    torch.manual_seed(0)
    head = torch.randn(1000, 2)
    weight = torch.zeros(2, requires_grad=True)
    old, new = Gaussian(head, torch.zeros(2)), Gaussian(head + weight, torch.zeros(2))
    action = old.sample(torch.Generator().manual_seed(0))
    advantage = normalized((action - head)[:, 0] + torch.randn(1000))
    log_ratio = new.log_prob(action) - old.log_prob(action)
    if form == "baseline":
        loss = baseline_loss(log_ratio, advantage, kl(old, new), 0.3)
    else:
        draws = [
            torch.randperm(1000, generator=torch.Generator().manual_seed(i)) for i in range(200)
        ]
        loss = torch.stack([sampled_loss(log_ratio[o], advantage[o], 0.3) for o in draws]).mean()
    surrogate = -(log_ratio.exp() * advantage).mean()
    expected = torch.autograd.grad(surrogate, weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE, CHUNK])
@pytest.mark.parametrize("pairs", ["baseline", "sampled"])
def test_the_ratio_is_one_at_the_first_inner_step(space, action_space, pairs):
    agent = build(space, action_space, pairs=pairs, normalize_observation=True, scale_reward=True)
    for seed in range(2):
        metrics = agent.update(collect(agent, space, action_space, seed).experience())
        assert metrics["ratio/first_deviation"] < 1e-5
        assert metrics["ratio/largest_deviation"] > 1e-4
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())


def test_one_step_is_the_gradient_of_the_written_loss():
    agent = build(
        minibatch_size=ENVS * STEPS, max_gradient_norm=1e9, entropy_coefficient=0.01, epochs=3
    )
    experience = collect(agent, STATE, CONTINUOUS).experience()
    agent.update(experience)  # away from the policy that acted
    samples, everything = agent.credit(experience), torch.arange(ENVS * STEPS)
    network = copy.deepcopy(agent.network)
    policy, value = network(experience.observation(everything))
    old = Gaussian.unpacked(experience.extras["policy"].flatten(0, 1))
    normals = [
        torch.distributions.Normal(p.mean, p.log_std.exp().expand_as(p.mean)) for p in (old, policy)
    ]
    divergence = torch.distributions.kl_divergence(*normals).sum(-1)
    log_ratio = normals[1].log_prob(samples.action).sum(-1) - samples.log_prob
    residual = (log_ratio + divergence) / 0.5 - normalized(samples.advantage)
    error = (value - samples.target).square().mean()
    entropy = normals[1].entropy().sum(-1).mean()
    loss = 0.25 * residual.square().mean() + 0.5 * error - 0.01 * entropy
    expected = torch.autograd.grad(loss, list(network.parameters()))
    agent.step(
        experience.observation(everything),
        samples.at(everything),
        agent.acted(experience, everything),
    )
    for parameter, gradient in zip(agent.network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eta", 0.0),
        ("eta", math.inf),
        ("entropy_coefficient", -1.0),
        ("pairs", "pears"),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field) as refused:
        dataclasses.replace(TINY, **{field: value})
    assert "\n" not in str(refused.value)
