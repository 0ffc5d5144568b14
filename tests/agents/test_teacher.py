"""The teacher's term against its formulas, and PPO with a teacher that counts for nothing against PPO."""

import copy
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.distributions import Categorical, Gaussian
from agents.core.errors import UserError
from agents.core.fields import step_fields
from agents.core.rollout import TEACHER_ACTION, Rollout
from agents.on_policy.ppo import PPO, PPOConfig
from agents.on_policy.teacher import teacher_loss, teacher_weight

ENVS, STEPS = 3, 16
STATE = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
SPACES = {
    "continuous": gym.spaces.Box(-1, 1, (2,), np.float32),
    "chunk": gym.spaces.Box(-1, 1, (4, 2), np.float32),
    "discrete": gym.spaces.Discrete(3),
}
TINY = PPOConfig(rollout_length=STEPS, minibatch_size=12, epochs=2, hidden=(16,))


def test_a_gaussian_is_drawn_by_the_squared_difference_of_its_mean():
    torch.manual_seed(0)
    mean, action = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    log_std = torch.zeros(3, requires_grad=True)
    loss = teacher_loss(Gaussian(mean, log_std), action)
    rows = [((m - a) ** 2).sum().item() / 3 for m, a in zip(mean, action, strict=True)]
    assert loss.item() == pytest.approx(sum(rows) / 6)
    gradients = torch.autograd.grad(loss, [mean, log_std], allow_unused=True)
    torch.testing.assert_close(gradients[0], 2 * (mean.detach() - action) / 18)
    assert gradients[1] is None, "the paper's term leaves the spread alone"


def test_a_categorical_is_drawn_by_cross_entropy():
    torch.manual_seed(0)
    logits, action = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 1, 1, 2, 0])
    loss = teacher_loss(Categorical(logits), action)
    expected = torch.nn.functional.cross_entropy(logits, action)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    one_hot = torch.nn.functional.one_hot(action, 4)
    torch.testing.assert_close(gradient, (logits.detach().softmax(-1) - one_hot) / 6)


def test_its_weight_stays_or_falls_along_half_a_cosine():
    assert teacher_weight(0.7, 0, 10**9) == 0.7
    falls = [teacher_weight(0.5, 1000, step) for step in (0, 250, 500, 750, 1000, 10**6)]
    expected = [0.5, 0.25 + math.sqrt(0.5) / 4, 0.25, 0.25 - math.sqrt(0.5) / 4, 0, 0]
    assert falls == pytest.approx(expected)


def collect(agent, action_space, teach):
    """Let an agent act in noise, and return its rollout; `teach` draws the teacher's actions."""
    rng = np.random.default_rng(0)
    taught = {TEACHER_ACTION: step_fields(action_space)["action"]} if teach else {}
    rollout = Rollout(
        STATE, action_space, length=STEPS, num_envs=ENVS, extras=dict(agent.extras) | taught,
        log=lambda _: None,
    )  # fmt: skip
    seen = rng.normal(size=(ENVS, 4)).astype(np.float32)
    rollout.start(seen)
    while not rollout.is_full:
        action, _, extras = agent.act({"state": torch.from_numpy(seen)}, explore=True)
        seen = rng.normal(size=(ENVS, 4)).astype(np.float32)
        extras |= {TEACHER_ACTION: teach(action)} if teach else {}
        never = np.zeros(ENVS, bool)
        rollout.add(action, rng.normal(size=ENVS), never, never, seen, extras=extras)
    return rollout.experience()


def opposite(action):
    return 2 - action if action.dtype == np.int64 else np.clip(-action, -1, 1)


@pytest.mark.parametrize("action_space", SPACES.values(), ids=SPACES)
def test_a_teacher_that_counts_for_nothing_changes_no_bit(action_space):
    weights = {}
    for name, coefficient, decay, teach in (
        ("alone", 1.0, 0, None),
        ("watched", 0.0, 0, opposite),
        ("faded", 1.0, 100, opposite),
        ("taught", 1.0, 0, opposite),
    ):
        config = dataclasses.replace(TINY, teacher_coefficient=coefficient, teacher_decay=decay)
        agent = PPO(STATE, action_space, config, num_envs=ENVS)
        agent.set_progress(200)
        metrics = agent.update(collect(agent, action_space, teach))
        assert ("loss/teacher" in metrics) == bool(teach)
        weights[name] = torch.cat([p.detach().flatten() for p in agent.network.parameters()])
    assert torch.equal(weights["alone"], weights["watched"])
    assert torch.equal(weights["alone"], weights["faded"])
    assert not torch.equal(weights["alone"], weights["taught"])


@pytest.mark.parametrize("action_space", SPACES.values(), ids=SPACES)
def test_a_step_has_the_gradient_of_ppos_loss_and_of_the_term(action_space):
    """By finite steps of the weight: the gradient is linear in it."""
    whole = dataclasses.replace(TINY, minibatch_size=ENVS * STEPS, epochs=1, max_gradient_norm=1e9)
    gradients, network = {}, None
    for weight in (0.0, 0.5):
        config = dataclasses.replace(whole, teacher_coefficient=weight)
        agent = PPO(STATE, action_space, config, num_envs=ENVS)
        network = copy.deepcopy(agent.network)
        experience = collect(agent, action_space, opposite)
        agent.update(experience)
        gradients[weight] = [p.grad.clone() for p in agent.network.parameters()]
    seen = experience.observation(torch.arange(ENVS * STEPS))
    taught = experience.extras[TEACHER_ACTION].flatten(0, 1)
    policy, _ = network(seen)
    if isinstance(action_space, gym.spaces.Discrete):
        term = torch.nn.functional.cross_entropy(policy.logits, taught)
    else:
        term = (policy.mean - taught.flatten(1)).square().mean()
    own = torch.autograd.grad(term, list(network.parameters()), allow_unused=True)
    moved = 0
    for without, with_it, gradient in zip(gradients[0.0], gradients[0.5], own, strict=True):
        gradient = torch.zeros_like(without) if gradient is None else gradient
        torch.testing.assert_close(with_it - without, 0.5 * gradient, rtol=1e-3, atol=1e-6)
        moved += gradient.abs().sum() > 0
    assert moved > 2


@pytest.mark.parametrize("change", [{"teacher_coefficient": math.inf}, {"teacher_decay": -1}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(TINY, **change)
