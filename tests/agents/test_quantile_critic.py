"""Quantile critics: the loss against loops, targets against their distribution, quantiles against known returns."""

import copy
import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from agents.core.advantages import generalized_advantage
from agents.core.errors import UserError
from agents.core.rollout import Rollout
from agents.on_policy.ppo import PPO, PPOConfig
from agents.on_policy.quantile_critic import (
    QuantileCritic,
    draw_horizons,
    quantile_huber_loss,
    quantiles_of,
    return_samples,
)
from agents.registry import AGENTS
from tests.agents.on_policy import (
    BOTH,
    CONTINUOUS,
    DISCRETE,
    ENVS,
    PIXELS,
    STATE,
    STEPS,
    TINY,
    collect,
)

QUANTILE = dataclasses.replace(TINY, critic="quantile", quantiles=5, quantile_embedding=8)
DISTILLED = dataclasses.replace(QUANTILE, critic="distilled")


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_a_loop(threshold):
    torch.manual_seed(0)
    quantiles, fractions, target = torch.randn(6, 3), torch.rand(6, 3), torch.randn(6, 4)
    total = 0.0
    for b in range(6):
        for i in range(3):
            for j in range(4):
                error = (target[b, j] - quantiles[b, i]).item()
                fraction = fractions[b, i].item()
                size = abs(error)
                if threshold:
                    small = abs(error) <= threshold
                    size = error**2 / 2 if small else threshold * (abs(error) - threshold / 2)
                    size /= threshold
                total += abs(fraction - (error < 0)) * size
    loss = quantile_huber_loss(quantiles, fractions, target, threshold=threshold)
    assert loss.item() == pytest.approx(total / (6 * 3 * 4), rel=1e-5)


def test_the_median_s_loss_is_half_of_torchs_huber_and_absolute_losses():
    torch.manual_seed(0)
    quantile, target = torch.randn(8, 1), torch.randn(8, 1)
    half = torch.full((8, 1), 0.5)
    plain = quantile_huber_loss(quantile, half, target, threshold=0.0)
    torch.testing.assert_close(plain, F.l1_loss(quantile, target) / 2)
    smooth = quantile_huber_loss(quantile, half, target, threshold=0.7)
    torch.testing.assert_close(smooth, F.huber_loss(quantile, target, delta=0.7) / 1.4)


def test_the_plain_loss_is_least_at_the_quantile_and_gives_the_target_no_gradient():
    samples = torch.randn(1, 10001, generator=torch.Generator().manual_seed(0)).double()
    for fraction in (0.1, 0.5, 0.8):
        at = torch.quantile(samples[0], fraction)
        fractions = torch.full((1, 1), fraction, dtype=torch.float64)
        least, *others = (
            quantile_huber_loss((at + shift).view(1, 1), fractions, samples, threshold=0.0)
            for shift in (0.0, -0.05, 0.05)
        )
        assert least < min(others)
    target = torch.zeros(1, 2, requires_grad=True)
    quantiles = torch.ones(1, 1, requires_grad=True)
    loss = quantile_huber_loss(quantiles, torch.rand(1, 1), target)
    assert torch.autograd.grad(loss, [quantiles, target], allow_unused=True)[1] is None


def test_an_embedded_fraction_multiplies_the_state_as_written():
    torch.manual_seed(0)
    critic = QuantileCritic(3, (7, 5), quantiles=4, embedding=6, is_distilled=False)
    features, fractions = torch.randn(2, 3), torch.rand(2, 4)
    found = critic.quantiles(features, fractions)
    for b in range(2):
        for i in range(4):
            cosines = torch.tensor([math.cos(math.pi * k * fractions[b, i]) for k in range(6)])
            product = critic.state(features[b]) * torch.relu(critic.fraction(cosines))
            torch.testing.assert_close(found[b, i], critic.head(product)[0])
    midpoints = torch.tensor([0.125, 0.375, 0.625, 0.875])
    mean = critic.quantiles(features, midpoints).mean(-1, keepdim=True)
    torch.testing.assert_close(critic(features), mean)


def test_a_distilled_value_is_a_function_of_value_times_quantiles_and_leaves_these_alone():
    torch.manual_seed(0)
    critic = QuantileCritic(3, (7,), quantiles=4, embedding=6, is_distilled=True)
    features = torch.randn(2, 3)
    quantiles = critic.quantiles(features, critic.midpoints)
    value = critic(features)
    torch.testing.assert_close(value, critic.distill(critic.scalar(features) * quantiles))
    value.sum().backward()
    assert all(p.grad is None for p in [*critic.head.parameters(), *critic.fraction.parameters()])
    assert all(p.grad is not None for p in critic.scalar.parameters())


def random_steps(seed):
    rng = np.random.default_rng(seed)
    shape = (9, 2)
    reward, value, following = (torch.from_numpy(rng.normal(size=shape)).float() for _ in range(3))
    terminated = torch.from_numpy(rng.random(shape) < 0.15)
    truncated = torch.from_numpy(rng.random(shape) < 0.15) & ~terminated
    return reward, value, following, terminated, truncated


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_sampled_returns_have_the_mean_of_lambda_returns(gae_lambda):
    """GAE needs the value of each next step to be that step's own value, so the two are made to agree."""
    reward, value, following, terminated, truncated = random_steps(0)
    inside = ~(terminated | truncated)
    following[:-1] = torch.where(inside[:-1], value[1:], following[:-1])
    advantage = generalized_advantage(
        reward, value, following, terminated, truncated, discount=0.9, gae_lambda=gae_lambda
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([-1.0, 0.0, 1.0])  # quantiles of what follows, around its value
    draws = 4000 if 0 < gae_lambda < 1 else 1
    total = 0.0
    for _ in range(draws):
        horizon = draw_horizons(terminated, truncated, gae_lambda, generator)
        samples = return_samples(
            reward, following[..., None] + spread, terminated, horizon, discount=0.9
        )
        total = total + samples.mean(-1)
    torch.testing.assert_close(total / draws, advantage + value, rtol=0, atol=0.05)


def test_samples_of_the_return_are_those_of_a_loop():
    reward, _, _, terminated, truncated = random_steps(1)
    following = torch.randn(*reward.shape, 3)
    horizon = draw_horizons(terminated, truncated, 0.6, torch.Generator().manual_seed(1))
    assert not (horizon & terminated).any()
    assert (horizon | terminated)[-1].all()
    assert horizon[truncated].all()
    found = return_samples(reward, following, terminated, horizon, discount=0.8)
    for t in range(len(reward)):
        for n in range(2):
            total, factor, at = torch.zeros(3), 1.0, t
            while True:
                total = total + factor * reward[at, n]
                if terminated[at, n]:
                    break
                if horizon[at, n]:
                    total = total + factor * 0.8 * following[at, n]
                    break
                at, factor = at + 1, factor * 0.8
            torch.testing.assert_close(found[t, n], total)


RETURNS = {
    "gaussian": (lambda rng, n: rng.normal(1.0, 2.0, n), lambda f: NormalDist(1.0, 2.0).inv_cdf(f)),
    "two points": (lambda rng, n: np.where(rng.random(n) < 0.3, -1.0, 2.0), lambda f: -1.0 if f < 0.3 else 2.0),
}  # fmt: skip
ASKED = (0.1, 0.2, 0.5, 0.8, 0.9)


def learned_quantiles(draw, *, updates=40, num_envs=64, **changes):
    """Let an agent see one state and returns of one step, and return what it takes for their quantiles."""
    config = dataclasses.replace(
        PPOConfig(), rollout_length=4, minibatch_size=256, epochs=8, hidden=(32,), learning_rate=5e-3,
        quantiles=16, quantile_threshold=0.0, max_gradient_norm=10.0,
        **{"critic": "quantile"} | changes,
    )  # fmt: skip
    agent = PPO(STATE, DISCRETE, config, num_envs=num_envs)
    rng, seen = np.random.default_rng(0), np.ones((num_envs, 4), np.float32)
    always, observation = np.ones(num_envs, bool), {"state": torch.ones(1, 4)}
    for _ in range(updates):
        rollout = Rollout(
            STATE, DISCRETE, length=4, num_envs=num_envs, extras=agent.extras, log=lambda _: None
        )
        rollout.start(seen)
        while not rollout.is_full:
            action, _, extras = agent.act({"state": torch.from_numpy(seen)}, explore=True)
            reward = draw(rng, num_envs)
            rollout.add(action, reward, always, ~always, seen, seen, extras=extras)
        metrics = agent.update(rollout.experience())
    value = agent.network(observation)[1].item()
    if config.critic == "mean":
        return value, [value] * len(ASKED), metrics
    return value, quantiles_of(agent.network, observation, torch.tensor(ASKED))[0].tolist(), metrics


def error_of(found, quantile):
    return float(np.mean([abs(a - quantile(f)) for a, f in zip(found, ASKED, strict=True)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RETURNS)
def test_the_critic_learns_the_quantiles_of_known_returns_and_a_mean_cannot(kind):
    """Mean errors of five quantiles: 0.2 (Gaussian) and 0.01; of one value for all of them 1.7 and 1.4."""
    draw, quantile = RETURNS[kind]
    mean = {"gaussian": 1.0, "two points": 1.1}[kind]
    for critic in ("quantile", "distilled"):
        value, found, metrics = learned_quantiles(draw, critic=critic)
        assert error_of(found, quantile) < 0.4
        assert value == pytest.approx(mean, abs=0.4)
        assert metrics["loss/quantile"].isfinite()
    value, found, _ = learned_quantiles(draw, critic="mean")
    assert value == pytest.approx(mean, abs=0.4)
    assert error_of(found, quantile) > 1.0
    _, found, _ = learned_quantiles(draw, value_coefficient=0.0)  # its loss left out
    assert error_of(found, quantile) > 1.0


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
@pytest.mark.parametrize("config", [QUANTILE, DISTILLED], ids=["quantile", "distilled"])
def test_the_ratio_is_one_at_the_first_inner_step(space, config):
    agent = PPO(space, CONTINUOUS, config, num_envs=ENVS)
    for seed in range(2):
        metrics = agent.update(collect(agent, space, CONTINUOUS, seed).experience())
        assert metrics["ratio/first_deviation"] < 1e-5
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())
        assert metrics["loss/quantile"] > 0


@pytest.mark.parametrize("config", [QUANTILE, DISTILLED], ids=["quantile", "distilled"])
def test_a_restored_agent_goes_on_bit_for_bit(config):
    first = PPO(STATE, CONTINUOUS, config, num_envs=ENVS, seed=3)
    first.update(collect(first, STATE, CONTINUOUS, 0).experience())
    second = PPO(STATE, CONTINUOUS, config, num_envs=ENVS, seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for agent in (first, second):
        agent.update(collect(agent, STATE, CONTINUOUS, 1).experience())
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key]), key


def test_gradients_reach_every_part_of_the_critic():
    agent = PPO(PIXELS, CONTINUOUS, DISTILLED, num_envs=ENVS)
    agent.update(collect(agent, PIXELS, CONTINUOUS).experience())
    critic = agent.network.critic
    for part in (critic.state, critic.fraction, critic.head, critic.scalar, critic.distill):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())


def test_pg_rainbow_is_ppo_with_the_distilled_critic():
    (config,) = AGENTS["pg-rainbow"].configs
    assert config == PPOConfig(critic="distilled")


@pytest.mark.parametrize(
    ("field", "value"),
    [("critic", "quantil"), ("quantiles", 0), ("quantile_threshold", -1.0), ("quantile_embedding", 0)],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(TINY, **{field: value})


ON_POLICY = [
    name
    for name, spec in AGENTS.items()
    if spec.on_policy and spec.loop is None and not spec.fine_tunes
]


@pytest.mark.parametrize("name", ON_POLICY)
def test_every_on_policy_algorithm_takes_a_quantile_critic(name):
    spec = AGENTS[name]
    changes = {
        "rollout_length": STEPS,
        "minibatch_size": 12,
        "epochs": 2,
        "hidden": (16,),
        "quantiles": 5,
    }
    config = dataclasses.replace(spec.configs[0], critic="distilled", **changes)
    agent = spec.build(STATE, CONTINUOUS, config, num_envs=ENVS)
    before = copy.deepcopy(agent.network.critic.state_dict())
    metrics = agent.update(collect(agent, STATE, CONTINUOUS).experience())
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["loss/quantile"] > 0
    after = agent.network.critic.state_dict()
    assert any((value != before[key]).any() for key, value in after.items())
