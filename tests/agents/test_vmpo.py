"""V-MPO's update against its formulas, its duals against what they solve."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from agents.core.distributions import Categorical, Gaussian, kl
from agents.core.errors import UserError
from agents.on_policy.losses import normalized
from agents.on_policy.vmpo import SMALLEST, VMPO, VMPOConfig, divergences
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

TINY = VMPOConfig(
    rollout_length=STEPS, minibatch_size=12, epochs=2, hidden=(16,), feature_dim=8, encoder="small",
    learning_rate=1e-3,
)  # fmt: skip


def build(space=STATE, action_space=CONTINUOUS, seed=0, **changes):
    config = dataclasses.replace(TINY, **changes)
    return VMPO(space, action_space, config, num_envs=ENVS, seed=seed)


def test_a_gaussians_kl_falls_into_a_part_of_means_and_one_of_covariances():
    """Against torch's multivariate normals; for one spread or one mean, a part is the whole."""
    torch.manual_seed(0)
    old = Gaussian(torch.randn(5, 3), torch.randn(3))
    new = Gaussian(torch.randn(5, 3), torch.randn(3))
    parts = divergences(old, new)

    def normal(mean, log_std):
        return MultivariateNormal(mean, torch.diag_embed(torch.exp(2 * log_std).expand_as(mean)))

    acted = normal(old.mean, old.log_std)
    torch.testing.assert_close(parts["mean"], kl_divergence(acted, normal(new.mean, old.log_std)))
    torch.testing.assert_close(
        parts["covariance"], kl_divergence(acted, normal(old.mean, new.log_std))
    )
    same_spread = Gaussian(new.mean, old.log_std)
    torch.testing.assert_close(divergences(old, same_spread)["mean"], kl(old, same_spread))
    same_mean = Gaussian(old.mean, new.log_std)
    torch.testing.assert_close(divergences(old, same_mean)["covariance"], kl(old, same_mean))


def test_each_part_of_the_kl_has_a_gradient_of_its_own():
    old = Gaussian(torch.zeros(4, 2), torch.zeros(2))
    mean = torch.randn(4, 2, requires_grad=True)
    log_std = torch.randn(2, requires_grad=True)
    parts = divergences(old, Gaussian(mean, log_std))
    for name, own, other in (("mean", mean, log_std), ("covariance", log_std, mean)):
        gradients = torch.autograd.grad(parts[name].sum(), [own, other], allow_unused=True)
        assert gradients[0].abs().sum() > 0
        assert gradients[1] is None, name


def test_one_step_is_the_gradient_of_the_written_loss():
    """Equations 3 to 5 in a loop over the better half, at a policy that is not the one that acted."""
    agent = build(minibatch_size=ENVS * STEPS, max_gradient_norm=1e9, value_coefficient=0.7)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    agent.update(experience)
    samples, everything = agent.credit(experience), torch.arange(ENVS * STEPS)
    network, duals = copy.deepcopy(agent.network), copy.deepcopy(agent.duals)
    policy, value = network(experience.observation(everything))
    advantage = normalized(samples.advantage)
    best = sorted(range(len(advantage)), key=lambda i: -advantage[i].item())[: len(advantage) // 2]
    temperature = duals.temperature
    weights = [math.exp(advantage[i].item() / temperature.item()) for i in best]
    log_prob = policy.log_prob(samples.action)
    imitation = -sum(w * log_prob[i] for w, i in zip(weights, best, strict=True)) / sum(weights)
    packed = experience.extras["policy"].flatten(0, 1)
    old_mean, old_log_std = packed[:, :2], packed[:, 2:]
    far = ((policy.mean - old_mean) / old_log_std.exp()).square().sum(-1).mean() / 2
    x = old_log_std - policy.log_std
    wide = ((2 * x).exp() - 1 - 2 * x).sum(-1).mean() / 2
    alpha = {name: p.item() for name, p in duals.multipliers.items()}
    error = (value - samples.target).square().mean()
    loss = imitation + alpha["mean"] * far + alpha["covariance"] * wide + 0.7 * error
    expected = torch.autograd.grad(loss, list(network.parameters()))
    best_advantage = advantage[best]
    dual = temperature * (0.01 + (best_advantage / temperature).exp().mean().log())
    slopes = [torch.autograd.grad(dual, temperature)[0], 0.01 - far.detach(), 5e-5 - wide.detach()]
    agent.step(
        experience.observation(everything),
        samples.at(everything),
        agent.acted(experience, everything),
    )
    for parameter, gradient in zip(agent.network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    multipliers = agent.duals.multipliers
    ours = [agent.duals.temperature, multipliers["mean"], multipliers["covariance"]]
    for parameter, slope in zip(ours, slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_multipliers_grow_while_a_limit_is_passed_and_fall_to_the_smallest_where_it_is_kept(
    action_space,
):
    for limit, learning_rate, is_passed in ((1e-7, 1e-2, True), (10.0, 1e-5, False)):
        agent = build(
            action_space=action_space, epochs=40, learning_rate=learning_rate, epsilon_policy=limit,
            epsilon_covariance=limit, initial_multiplier=0.5,
        )  # fmt: skip
        agent.update(collect(agent, STATE, action_space).experience())
        for name, multiplier in agent.duals.multipliers.items():
            if is_passed:
                assert multiplier > 0.6, name
            else:
                assert multiplier.item() == pytest.approx(SMALLEST), name


def test_the_kl_settles_near_its_limit_and_without_multipliers_it_does_not():
    """Many passes over one rollout, towards its better half."""
    reached = {}
    for weight in (1.0, 0.0):
        agent = build(
            epochs=150, minibatch_size=ENVS * STEPS, learning_rate=3e-3, dual_learning_rate=0.05
        )
        if not weight:
            agent.duals.project = lambda duals=agent.duals: [
                p.data.zero_() for p in duals.multipliers.parameters()
            ]
            agent.duals.project()
        experience = collect(agent, STATE, CONTINUOUS).experience()
        agent.update(experience)
        everything = torch.arange(ENVS * STEPS)
        policy = agent.network(experience.observation(everything))[0]
        parts = divergences(agent.acted(experience, everything), policy)
        reached[weight] = parts["mean"].mean().item()
    assert reached[1.0] < 0.03, "the limit is .01"
    assert reached[0.0] > 0.3


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE, CHUNK])
def test_the_ratio_is_one_at_the_first_inner_step_and_duals_stay_positive(space, action_space):
    agent = build(space, action_space, normalize_observation=True, scale_reward=True)
    for seed in range(2):
        metrics = agent.update(collect(agent, space, action_space, seed).experience())
        assert metrics["ratio/first_deviation"] < 1e-5
        assert metrics["ratio/largest_deviation"] > 1e-4
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())
        assert all(parameter > 0 for parameter in agent.duals.parameters())


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_a_restored_agent_goes_on_bit_for_bit_with_its_duals(action_space):
    first = build(action_space=action_space, seed=3)
    first.update(collect(first, STATE, action_space, 0).experience())
    second = build(action_space=action_space, seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    start = {name: p.clone() for name, p in second.duals.named_parameters()}
    for agent in (first, second):
        agent.update(collect(agent, STATE, action_space, 1).experience())
    for name, parameter in second.duals.named_parameters():
        assert torch.equal(parameter, dict(first.duals.named_parameters())[name]), name
        assert not torch.equal(parameter, start[name]), name
    for ours, theirs in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_minibatch_of_one_step_is_left_out():
    """Three steps in two minibatches: one of them has no better half."""
    agent = build(rollout_length=1, minibatch_size=2, epochs=1)
    metrics = agent.update(collect(agent, STATE, CONTINUOUS).experience())
    assert agent.gradient_updates == 1
    assert metrics["loss/policy"].isfinite()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("minibatch_size", 1),
        ("epsilon_temperature", 0.0),
        ("epsilon_policy", -1.0),
        ("epsilon_covariance", math.nan),
        ("initial_temperature", 0.0),
        ("initial_temperature", math.inf),
        ("initial_multiplier", math.inf),
        ("value_coefficient", math.inf),
        ("initial_multiplier", -1.0),
        ("dual_learning_rate", 0.0),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field) as refused:
        dataclasses.replace(TINY, **{field: value})
    assert "\n" not in str(refused.value)


def test_discrete_policies_have_one_kl():
    logits = torch.randn(2, 6, 3)
    parts = divergences(Categorical(logits[0]), Categorical(logits[1]))
    assert list(parts) == ["policy"]
    assert list(build(action_space=DISCRETE).duals.multipliers) == ["policy"]


def test_a_rollout_that_cannot_be_halved_is_refused_before_it_begins():
    config = dataclasses.replace(TINY, rollout_length=1)
    with pytest.raises(UserError, match="rollout_length 2 or more"):
        VMPO(STATE, CONTINUOUS, config, num_envs=1)
    VMPO(STATE, CONTINUOUS, config, num_envs=2)
