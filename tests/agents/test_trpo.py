"""TRPO's update against its promises: the limit, the line search, and who moves what."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.backends import cudnn

from agents.core import trust_region
from agents.core.distributions import kl
from agents.core.errors import UserError
from agents.on_policy import trpo
from agents.on_policy.memory import Memory
from agents.on_policy.trpo import TRPO, TRPOConfig
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

TINY = TRPOConfig(
    rollout_length=STEPS, minibatch_size=12, epochs=2, hidden=(16,), feature_dim=8, encoder="small",
)  # fmt: skip


def build(space=STATE, action_space=CONTINUOUS, seed=0, **changes):
    config = dataclasses.replace(TINY, **changes)
    return TRPO(space, action_space, config, num_envs=ENVS, seed=seed)


def moved(agent, before):
    """The names of parameters that are not as before."""
    after = agent.network.named_parameters()
    return {name for name, parameter in after if not torch.equal(parameter, before[name])}


def constants(agent):
    return copy.deepcopy(dict(agent.network.named_parameters()))


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE, CHUNK])
@pytest.mark.parametrize("max_kl", [0.01, 0.3])
def test_the_whole_update_keeps_the_limit_and_gains(space, action_space, max_kl):
    """Measured afresh against the policy that acted, value fits included."""
    agent = build(space, action_space, max_kl=max_kl, normalize_observation=True)
    for seed in range(3):
        rollout = collect(agent, space, action_space, seed)
        experience = rollout.experience()
        everything = torch.arange(ENVS * STEPS)
        samples = agent.credit(experience)
        moments = copy.deepcopy(agent.network.moments)
        metrics = agent.update(experience)
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())
        if moments is not None:  # those with which this update was made
            agent.network.moments.load_state_dict(moments.state_dict())
        with torch.no_grad():
            policy = agent.network(experience.observation(everything))[0]
            divergence = kl(agent.acted(experience, everything), policy).mean()
            ratio = (policy.log_prob(samples.action) - samples.log_prob).exp()
        centered = samples.advantage - samples.advantage.mean()
        assert metrics["trust_region/failed"] == 0
        assert 0.2 * max_kl < divergence <= max_kl * 1.0001
        assert divergence.item() == pytest.approx(metrics["trust_region/kl"].item(), rel=1e-3)
        assert ((ratio - 1) * centered).mean() > 0
        assert metrics["ratio/first_deviation"] < 1e-5


def test_the_step_is_the_natural_gradient_of_the_written_objective():
    """Against an explicit Fisher matrix and NumPy's solver, with as many iterations as parameters."""
    agent = build(hidden=(3,), cg_iterations=60, damping=1e-3, max_kl=1e-4)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    samples, everything = agent.credit(experience), torch.arange(ENVS * STEPS)
    parameters = agent.policy_parameters
    before = trust_region.flattened(parameters).detach()
    advantage = samples.advantage
    advantage = (advantage - advantage.mean()) / advantage.std()
    policy = agent.network(experience.observation(everything))[0]
    objective = (policy.log_prob(samples.action) * advantage).mean()
    gradient = trust_region.flattened(torch.autograd.grad(objective, parameters)).double()
    policy = agent.network(experience.observation(everything))[0]
    packed = policy.packed()
    fisher = torch.zeros(len(before), len(before), dtype=torch.float64)
    information = torch.cat([torch.exp(-2 * policy.log_std), torch.full((2,), 2.0)]).detach()
    for row in packed:
        for entry, weight in zip(row, information, strict=True):
            part = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
            score = trust_region.flattened(part).double()
            fisher += weight * torch.outer(score, score) / len(packed)
    fisher += 1e-3 * torch.eye(len(before))
    direction = torch.linalg.solve(fisher, gradient)
    expected = direction * torch.sqrt(2 * 1e-4 / (direction @ fisher @ direction))
    metrics = agent.update(experience)
    step = trust_region.flattened(parameters).detach() - before
    assert metrics["trust_region/fraction"] > 0
    torch.testing.assert_close(
        step / metrics["trust_region/fraction"], expected.float(), rtol=2e-2, atol=2e-4
    )


def test_a_failed_line_search_leaves_the_policy_and_is_counted(monkeypatch):
    agent = build()
    before = constants(agent)
    monkeypatch.setattr(
        TRPO, "gradient", lambda self, *given, real=TRPO.gradient: -real(self, *given)
    )
    metrics = agent.update(collect(agent, STATE, CONTINUOUS).experience())
    assert metrics["trust_region/failed"] == 1
    assert metrics["trust_region/fraction"] == 0
    assert metrics["trust_region/kl"] < 1e-12
    assert moved(agent, before) == {name for name in before if name.startswith("critic.")}


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
def test_the_policys_step_and_the_values_fit_move_different_parameters(space):
    agent = build(space)
    experience = collect(agent, space, CONTINUOUS).experience()
    samples = agent.credit(experience)
    names = set(constants(agent))
    critic = {name for name in names if name.startswith("critic.")}
    before = constants(agent)
    agent.move_policy(experience, agent.parts(experience, samples))
    assert moved(agent, before) == names - critic
    before = constants(agent)
    index = torch.arange(ENVS * STEPS)
    agent.fit_value(experience.observation(index), samples.at(index))
    assert moved(agent, before) == critic


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_rewards_in_a_small_unit_move_the_policy_as_far(action_space):
    agent = build(action_space=action_space, normalize_advantage=False)
    experience = collect(agent, STATE, action_space).experience()
    samples = agent.credit(experience)
    small = dataclasses.replace(samples, advantage=1e-6 * samples.advantage)
    metrics = agent.move_policy(experience, agent.parts(experience, small))
    assert metrics["trust_region/failed"] == 0
    assert metrics["trust_region/kl"] > 0.1 * agent.config.max_kl


@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_a_rollout_in_parts_moves_as_one(action_space, monkeypatch):
    whole, parts = build(action_space=action_space), build(action_space=action_space)
    rollout = collect(whole, STATE, action_space)
    whole.update(rollout.experience())
    monkeypatch.setattr(trpo, "MOST_AT_ONCE", 7)
    metrics = parts.update(rollout.experience())
    assert metrics["trust_region/failed"] == 0
    for ours, theirs in zip(whole.policy_parameters, parts.policy_parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_share_of_the_steps_makes_the_fisher_matrix_and_all_of_them_the_rest():
    agent = build(fisher_fraction=0.25)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    parts = agent.parts(experience, agent.credit(experience))
    few = agent.some(experience, parts)
    assert sum(len(part.index) for part in parts) == ENVS * STEPS
    assert sum(len(part.index) for part in few) == ENVS * STEPS // 4
    assert sum(part.share for part in few) == pytest.approx(1)
    metrics = agent.update(experience)
    assert metrics["trust_region/kl"] <= 0.01


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_kl", 0.0),
        ("max_kl", math.inf),
        ("cg_iterations", 0),
        ("attempts", 0),
        ("damping", -1.0),
        ("shrink", 1.0),
        ("fisher_fraction", 0.0),
        ("discount", 1.5),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field) as refused:
        dataclasses.replace(TINY, **{field: value})
    assert "\n" not in str(refused.value)


def test_a_memory_is_differentiated_twice_without_cudnn_and_only_then(monkeypatch):
    """cuDNN's recurrent layers have no second derivative; the rest of an update keeps what is fast."""
    allowed = []
    real = Memory.forward

    def forward(self, *args, **keywords):
        allowed.append(cudnn.enabled)
        return real(self, *args, **keywords)

    monkeypatch.setattr(Memory, "forward", forward)
    agent = build(memory_size=6)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    allowed.clear()
    assert agent.update(experience)["trust_region/failed"] == 0
    # As many products as there are iterations, and one for the length of the step.
    assert allowed.count(False) == TINY.cg_iterations + 1
    assert cudnn.enabled
    allowed.clear()
    agent.gradient(experience, agent.parts(experience, agent.credit(experience)))
    assert all(allowed)


@pytest.mark.gpu
def test_a_memory_takes_the_policys_step_on_a_gpu():
    agent = TRPO(
        STATE, CONTINUOUS, dataclasses.replace(TINY, memory_size=6), num_envs=ENVS, device="cuda"
    )
    metrics = agent.update(collect(agent, STATE, CONTINUOUS).experience())
    assert metrics["trust_region/failed"] == 0


def test_a_fisher_matrix_of_few_steps_is_still_a_mean(monkeypatch):
    """Weighed as in the whole rollout, fewer steps would be a smaller matrix, and steps too long."""
    monkeypatch.setattr(trpo, "MOST_AT_ONCE", 8)
    agent = build(fisher_fraction=0.3)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    parts = agent.parts(experience, agent.credit(experience))
    few = agent.some(experience, parts)
    count = sum(len(part.index) for part in few)
    assert len(few) > 1
    assert 0.3 * ENVS * STEPS <= count <= 0.5 * ENVS * STEPS
    assert [part.share for part in few] == [len(part.index) / count for part in few]
