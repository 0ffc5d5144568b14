"""What holds for every on-policy agent: bad input is named, state is exact, and nothing teaches nothing."""

import copy
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.errors import DivergedError, UserError
from agents.core.rollout import Rollout
from agents.on_policy.updates import mean_metrics
from agents.registry import AGENTS, make_agent
from tests.agents.on_policy import BOTH, CONTINUOUS, DISCRETE, ENVS, STATE, STEPS, collect

NAMES = [
    name
    for name, spec in AGENTS.items()
    if spec.on_policy and spec.loop is None and not spec.fine_tunes
]
"""Agents that learn from plain rollouts; vines stand in test_vines.py, chains in test_fine_tuning.py."""
SMALL = {
    "rollout_length": STEPS,
    "minibatch_size": 12,
    "epochs": 2,
    "hidden": (16,),
    "feature_dim": 8,
    "encoder": "small",
}


def build(name, space=STATE, action_space=CONTINUOUS, seed=0, device="cpu", **changes):
    (config,) = AGENTS[name].configs
    config = dataclasses.replace(config, **{**SMALL, **changes})
    return make_agent(
        name, space, action_space, configs=[config], seed=seed, device=device, num_envs=ENVS
    )


def test_the_first_rollouts_rewards_are_on_the_scale_of_the_later_ones():
    """At a spread of 1 they would be cut off at 10, and the value would begin with returns of another size."""
    agent = build("ppo", scale_reward=True)
    experience = collect(agent, STATE, CONTINUOUS).experience()
    large = dataclasses.replace(experience, reward=500 * experience.reward)
    seen, real = [], agent.rewards.scale
    agent.rewards.scale = lambda reward: seen.append(real(reward)) or seen[-1]
    agent.update(large)
    assert 0.1 < seen[0].std() < 2
    assert seen[0].abs().max() < 10
    torch.testing.assert_close(seen[0].double() * agent.rewards.spread, large.reward.double())


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_states_read_no_picture(name, monkeypatch):
    """Stacks of a whole rollout at once took a gigabyte to read a few numbers."""
    agent = build(name, BOTH, normalize_observation=True)
    experience = collect(agent, BOTH, CONTINUOUS).experience()
    index = experience.kept.flatten().nonzero()[:, 0]
    states = experience.observation(index)["state"].double()
    read, real = [], Rollout._gather
    monkeypatch.setattr(
        Rollout,
        "_gather",
        lambda self, field, slots: read.append(field) or real(self, field, slots),
    )
    agent._take_in(experience)
    assert read == ["state"]
    torch.testing.assert_close(agent.network.moments.mean, states.mean(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", [BOTH, STATE])
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_a_restored_agent_goes_on_bit_for_bit(name, space, action_space):
    first = build(name, space, action_space, seed=3)
    first.update(collect(first, space, action_space, 0).experience())
    second = build(name, space, action_space, seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    metrics = [
        agent.update(collect(agent, space, action_space, 1).experience())
        for agent in (first, second)
    ]
    assert metrics[0] == metrics[1]
    ours, theirs = (agent.networks() for agent in (first, second))
    for part, module in ours.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, theirs[part].state_dict()[key]), f"{part}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_of_lost_steps_teaches_nothing(name):
    agent = build(name, rollout_length=1)
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


@pytest.mark.parametrize("name", NAMES)
def test_lost_steps_are_left_out(name):
    """What a lost step holds changes nothing, whatever is looked at beside it."""
    updated = []
    for lost_reward in (0.0, 50.0):
        agent = build(name, rollout_length=8)
        rollout = Rollout(
            STATE, CONTINUOUS, length=8, num_envs=ENVS, extras=agent.extras, log=lambda _: None
        )
        rng = np.random.default_rng(0)
        seen, never = rng.normal(size=(ENVS, 4)).astype(np.float32), np.zeros(ENVS, bool)
        rollout.start(seen)
        for step in range(8):
            action, _, extras = agent.act({"state": torch.from_numpy(seen)}, explore=True)
            reward, dropped = rng.normal(size=ENVS), never.copy()
            if step in (2, 5):
                dropped[1], reward[1] = True, lost_reward
            seen = rng.normal(size=(ENVS, 4)).astype(np.float32)
            rollout.add(action, reward, never, never, seen, dropped=dropped, extras=extras)
        assert (~rollout.experience().kept).sum() == 2
        agent.update(rollout.experience())
        updated.append(agent.network.state_dict())
    assert all(torch.equal(value, updated[1][key]) for key, value in updated[0].items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("action_space", "said"),
    [
        (gym.spaces.MultiBinary(3), "Box and Discrete"),
        (gym.spaces.MultiDiscrete([2, 3]), "Box and Discrete"),
        (gym.spaces.Dict({"a": CONTINUOUS}), "Box and Discrete"),
        (gym.spaces.Discrete(3, start=1), "from 0"),
        (gym.spaces.Box(0, 5, (2,), np.int64), "real number"),
        (gym.spaces.Box(-1, 1, (0,), np.float32), "at least one"),
        (gym.spaces.Box(-2, 2, (2,), np.float32), r"acts in \[-1, 1\].*RescaleAction"),
        (gym.spaces.Box(-1, np.float32([1, 3]), (2,), np.float32), r"acts in \[-1, 1\]"),
        (gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), r"acts in \[-1, 1\]"),
    ],
)
def test_spaces_that_fit_no_head_are_refused(name, action_space, said):
    with pytest.raises(UserError, match=said) as refused:
        build(name, action_space=action_space)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_log_ratio_that_is_not_finite_is_named(name, action_space, bad):
    """Also where the actions' log-probabilities were broken while acting."""
    agent = build(name, action_space=action_space)
    experience = collect(agent, STATE, action_space).experience()
    experience.extras["log_prob"][3, 1] = bad
    with pytest.raises(DivergedError, match="a log-ratio is not finite") as stopped:
        agent.update(experience)
    assert "\n" not in str(stopped.value)
    assert "gradient step" in str(stopped.value)


def test_the_first_culprit_and_its_gradient_step_are_named():
    steps = [
        {"loss/value": torch.tensor(float(i)), "ratio/kl": torch.tensor(0.0)} for i in range(5)
    ]
    steps[3]["loss/value"] = torch.tensor(math.inf)
    steps[4] = {name: torch.tensor(math.nan) for name in steps[4]}
    with pytest.raises(DivergedError, match=r"^loss/value .*inf\) in gradient step 4 of 5"):
        mean_metrics(steps)
    steps[3]["ratio/kl"] = torch.tensor(math.nan)
    with pytest.raises(DivergedError, match=r"^a log-ratio .*nan\) in gradient step 4 of 5"):
        mean_metrics(steps)
    assert mean_metrics(steps[:3]) == {"loss/value": 1, "ratio/kl": 0}
    assert mean_metrics([]) == {}
