"""PPO's update against its formulas, and its state against itself."""

import copy
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.advantages import generalized_advantage
from agents.core.distributions import Categorical, Gaussian
from agents.core.errors import UserError
from agents.core.rollout import Rollout
from agents.on_policy.losses import regularization_loss
from agents.on_policy.ppo import PPO, SURROGATES, PPOConfig
from tests.agents.on_policy import (
    BOTH,
    CHUNK,
    CONTINUOUS,
    DISCRETE,
    ENVS,
    PIXELS,
    STATE,
    STEPS,
    TINY,
    collect,
)  # fmt: skip


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE, CHUNK])
@pytest.mark.parametrize("surrogate", ["ppo_clip", "spo"])
def test_the_ratio_is_one_at_the_first_inner_step(space, action_space, surrogate):
    """In the second rollout too, when statistics have changed what is seen and paid."""
    config = dataclasses.replace(TINY, surrogate=surrogate)
    agent = PPO(space, action_space, config, num_envs=ENVS)
    for seed in range(2):
        metrics = agent.update(collect(agent, space, action_space, seed).experience())
        assert metrics["ratio/first_deviation"] < 1e-5
        assert metrics["ratio/largest_deviation"] > 1e-4
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())


def test_one_step_is_the_gradient_of_the_written_loss():
    config = PPOConfig(
        rollout_length=STEPS, minibatch_size=ENVS * STEPS, epochs=1, hidden=(8,), entropy_coefficient=0.01,
        max_gradient_norm=1e9, discount=0.9, gae_lambda=0.8,
    )  # fmt: skip
    agent = PPO(STATE, CONTINUOUS, config, num_envs=ENVS)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    network = copy.deepcopy(agent.network)
    everything = torch.arange(ENVS * STEPS)
    with torch.no_grad():
        following = network(experience.next_observation(everything))[1].reshape(STEPS, ENVS)
    value = experience.extras["value"]
    advantage = generalized_advantage(
        experience.reward, value, following, experience.terminated, experience.truncated,
        discount=0.9, gae_lambda=0.8,
    ).flatten()  # fmt: skip
    scaled = (advantage - advantage.mean()) / advantage.std()
    policy, now = network(experience.observation(everything))
    log_prob = policy.log_prob(experience.action.flatten(0, 1))
    ratio = (log_prob - experience.extras["log_prob"].flatten()).exp()
    surrogate = torch.min(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
    error = (now - (advantage + value.flatten())).square().mean()
    loss = -surrogate + 0.5 * error - 0.01 * policy.entropy().mean()
    expected = torch.autograd.grad(loss, list(network.parameters()))
    agent.update(experience)
    for parameter, gradient in zip(agent.network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_gradients_are_scaled_down_to_the_largest_norm():
    agent = PPO(STATE, CONTINUOUS, dataclasses.replace(TINY, max_gradient_norm=0.01), num_envs=ENVS)
    agent.update(collect(agent, STATE, CONTINUOUS).experience())
    squares = sum(p.grad.square().sum() for p in agent.network.parameters())
    assert squares.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_passes_stop_when_the_policy_is_too_far():
    counts = {}
    for limit in (math.inf, 1e-9):
        agent = PPO(
            STATE, CONTINUOUS, dataclasses.replace(TINY, target_kl=limit, epochs=6), num_envs=ENVS
        )
        steps = []
        real = agent.optimizer.step
        agent.optimizer.step = lambda real=real, steps=steps: (steps.append(1), real())
        agent.update(collect(agent, STATE, CONTINUOUS).experience())
        counts[limit] = len(steps)
    assert counts == {math.inf: 24, 1e-9: 4}


@pytest.mark.parametrize("space", [BOTH, STATE])
def test_a_restored_agent_goes_on_bit_for_bit(space):
    first = PPO(space, CONTINUOUS, TINY, num_envs=ENVS, seed=3)
    first.update(collect(first, space, CONTINUOUS, 0).experience())
    second = PPO(space, CONTINUOUS, TINY, num_envs=ENVS, seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for agent in (first, second):
        agent.update(collect(agent, space, CONTINUOUS, 1).experience())
    ours, theirs = (agent.networks() for agent in (first, second))
    for name, module in ours.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, theirs[name].state_dict()[key]), f"{name}.{key}"


def test_weights_load_whatever_the_number_of_environments():
    first = PPO(STATE, CONTINUOUS, TINY, num_envs=ENVS)
    first.update(collect(first, STATE, CONTINUOUS).experience())
    other = PPO(STATE, CONTINUOUS, TINY)
    other.load_state_dict(first.state_dict(weights_only=True))
    seen = {"state": torch.randn(5, 4)}
    assert (other.act(seen, explore=False)[0] == first.act(seen, explore=False)[0]).all()


def test_a_rollout_of_lost_steps_teaches_nothing():
    agent = PPO(STATE, CONTINUOUS, dataclasses.replace(TINY, rollout_length=1), num_envs=ENVS)
    rollout = Rollout(
        STATE, CONTINUOUS, length=1, num_envs=ENVS, extras=agent.extras, log=lambda _: None
    )
    seen, never = np.zeros((ENVS, 4), np.float32), np.zeros(ENVS, bool)
    rollout.start(seen)
    action, _, extras = agent.act({"state": torch.from_numpy(seen)}, explore=True)
    rollout.add(action, np.zeros(ENVS), never, never, seen, dropped=~never, extras=extras)
    before = copy.deepcopy(agent.network.state_dict())
    assert agent.update(rollout.experience()) == {}
    assert all(torch.equal(v, before[k]) for k, v in agent.network.state_dict().items())


def test_the_greedy_action_is_the_mode_and_draws_differ():
    agent = PPO(STATE, DISCRETE, TINY)
    seen = {"state": torch.randn(50, 4)}
    greedy = agent.act(seen, explore=False)[0]
    assert greedy.dtype == np.int64
    assert (greedy == agent.act(seen, explore=False)[0]).all()
    assert (greedy != agent.act(seen, explore=True)[0]).any()


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_dracs_term_is_the_divergence_and_stops_at_the_picture_as_it_is(kind):
    torch.manual_seed(0)
    clean, shifted = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    value, seen_value = torch.randn(6, requires_grad=True), torch.randn(6)
    if kind == "gaussian":
        log_std = torch.tensor([0.1, -0.5, 0.7])
        policies = Gaussian(clean, log_std), Gaussian(shifted, log_std)
        reference = [torch.distributions.Normal(p.mean, log_std.exp()) for p in policies]
        divergence = torch.distributions.kl_divergence(*reference).sum(-1)
    else:
        policies = Categorical(clean), Categorical(shifted)
        reference = [torch.distributions.Categorical(logits=p.logits) for p in policies]
        divergence = torch.distributions.kl_divergence(*reference)
    loss = regularization_loss(policies[0], value, policies[1], seen_value)
    expected = divergence.mean() + (value - seen_value).square().mean()
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, [clean, value, shifted], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is None
    assert gradients[2].abs().sum() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("clip", 0.0),
        ("clip", 2.0),
        ("initial_log_std", math.nan),
        ("learning_rate", math.inf),
        ("hidden", (0,)),
        ("discount", 1.5),
        ("entropy_coefficient", -1.0),
        ("surrogate", "pop_clip"),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field) as refused:
        dataclasses.replace(TINY, **{field: value})
    assert "\n" not in str(refused.value)


def test_spaces_that_fit_no_head_are_refused():
    with pytest.raises(UserError, match="Box and Discrete"):
        PPO(STATE, gym.spaces.MultiBinary(3), TINY)


def test_every_surrogate_can_be_named():
    import typing

    from agents.on_policy.ppo import Surrogate

    assert set(typing.get_args(Surrogate)) == set(SURROGATES)


def test_it_tells_where_its_value_looks():
    agent = PPO(BOTH, CONTINUOUS, dataclasses.replace(TINY, normalize_observation=False))
    seen = {
        "pixels": torch.randint(0, 256, (5, 6, 24, 24), dtype=torch.uint8),
        "state": torch.randn(5, 4),
    }
    before = agent.generator.get_state()
    saliency = agent.saliency(seen, torch.zeros(5, 2))
    assert saliency.shape == (5, 2, 24, 24)
    assert (saliency >= 0).all()
    assert saliency.sum() > 0
    assert agent.images(seen, torch.zeros(5, 2))["saliency"].dtype == np.uint8
    assert torch.equal(agent.generator.get_state(), before)
    assert (
        PPO(STATE, CONTINUOUS, TINY).saliency({"state": seen["state"]}, torch.zeros(5, 2)) is None
    )
