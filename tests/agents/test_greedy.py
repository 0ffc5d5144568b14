"""The module that leaves the house does what the agent does."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import AGENTS, make_agent
from agents.core.agent import Agent
from agents.core.errors import UserError
from agents.core.greedy import GreedyPolicy, freeze
from tests.agents.helpers import ACTION, BOTH, PIXELS, STATE, observation, small_agent

SPACES = {"pixels": PIXELS, "state": STATE, "both": BOTH}
LAST = {"ppo": "4.weight", "sac": "head.4.weight", "ddpg": "head.4.weight"}
"""The last layer's weights, which begin small."""
CHUNK = gym.spaces.Box(-1, 1, (4, 2), np.float32)


def greedy_and_own(agent, seen):
    freeze(agent.networks())
    own, _, _ = agent.act(seen, explore=False)
    return agent.greedy()(**seen), torch.as_tensor(own)


def kinds_of_agents():
    """Return every agent with every kind of observation that it takes."""
    for name, spec in AGENTS.items():
        if spec.offline or spec.fine_tunes or spec.needs_base:  # these have tests of their own
            continue
        needs_pixels = any(type(c).__name__ in ("SVEAConfig", "SGQNConfig") for c in spec.configs)
        yield from ((name, space) for space in SPACES if space != "state" or not needs_pixels)


@pytest.mark.parametrize(("name", "space"), list(kinds_of_agents()))
def test_every_agent_of_the_registry_says_how_it_acts_on_tensors(name, space):
    agent = small_agent(name, SPACES[space])
    with torch.no_grad():  # fresh policies act near zero, where clamping and squashing do nothing
        for parameter in agent.greedy().networks.parameters():
            parameter.mul_(3)
    for batch in (1, 7):
        module, own = greedy_and_own(agent, observation(SPACES[space], batch))
        assert torch.equal(module, own)
        assert module.dtype == torch.float32
        assert module.abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "action"),
    [("ppo", gym.spaces.Discrete(3)), ("ppo", CHUNK), ("sac", CHUNK), ("ddpg", CHUNK)],
    ids=["ppo-discrete", "ppo-chunk", "sac-chunk", "ddpg-chunk"],
)
def test_actions_keep_their_shape(name, action):
    agent = make_agent(name, STATE, action)
    with torch.no_grad():
        agent.greedy().networks[-1].get_parameter(LAST[name]).mul_(1000)
    module, own = greedy_and_own(agent, observation(STATE, 64))
    assert torch.equal(module, own)
    assert module.shape == (64, *action.shape)
    assert module.unique().numel() > 1
    assert module.dtype == (torch.int64 if action.shape == () else torch.float32)


def test_a_state_is_normalized_inside():
    from dataclasses import replace

    (config,) = AGENTS["ppo"].configs
    agent = make_agent("ppo", STATE, ACTION, configs=[replace(config, normalize_observation=True)])
    agent.network.moments.update(torch.randn(100, 5) * 4 + 9)
    seen = observation(STATE, 7)
    module, own = greedy_and_own(agent, seen)
    assert torch.equal(module, own)
    greedy = agent.greedy()
    greedy.moments = None
    assert (greedy(**seen) - own).abs().max() > 1e-3


def test_only_what_acting_needs_is_in_it():
    agent = small_agent("sgqn")
    held = sum(p.numel() for p in agent.greedy().parameters())
    expected = [*agent.critic.encoder.parameters(), *agent.actor.parameters()]
    assert held == sum(p.numel() for p in expected)


def test_freezing_leaves_constants_in_float32_and_in_plain_order():
    agent = small_agent("drq", precision="bf16")
    assert agent.critic.encoder.bf16
    first = agent.critic.encoder.convs[0].weight
    assert not first.is_contiguous()
    before = first.clone()
    freeze(agent.networks())
    assert not agent.critic.encoder.bf16
    assert first.is_contiguous()
    assert torch.equal(first, before)
    assert not agent.greedy()(**observation()).requires_grad


def test_an_agent_that_does_not_say_so_is_refused_in_one_line():
    class Silent(type(small_agent("sac", STATE))):
        greedy = Agent.greedy

    with pytest.raises(UserError, match="Silent cannot be exported: it does not say") as raised:
        Silent.greedy(object.__new__(Silent))
    assert "\n" not in str(raised.value)


def test_a_window_is_the_center():
    seen = torch.zeros(2, 9, 24, 24, dtype=torch.uint8)
    seen[..., 2:22, 2:22] = 1
    inner = small_agent("drq", gym.spaces.Box(0, 255, (9, 20, 20), np.uint8)).critic.encoder
    act = torch.nn.Identity()
    whole = GreedyPolicy(act, (), [], encoder=inner)(seen[..., 2:22, 2:22])
    assert torch.equal(GreedyPolicy(act, (), [], encoder=inner, crop=20)(seen), whole)
