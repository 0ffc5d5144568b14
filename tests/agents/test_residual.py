"""ResFiT against its equations: it begins as its base, stays near it, and learns from the smallest of two of ten."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from agents import make_agent
from agents.core.base_policy import BasePolicy
from agents.core.ensembles import MemberLinear, QEnsemble, subset_minimum
from agents.core.errors import UserError
from agents.core.replay import Batch
from agents.off_policy import residual
from agents.off_policy.residual import BASE_ACTION, ResFiT, combined, with_base_action
from tests.agents.helpers import ACTION, BOTH, PIXELS, STATE, observation, small_agent, transitions

SPACES = {"pixels": PIXELS, "state": STATE, "both": BOTH}
QUICK = {"critic_only_updates": 0, "actor_every": 1, "actor_learning_rate": 1e-2, "critics": 4}


def make(space: gym.Space = STATE, **changes: Any) -> ResFiT:
    agent = small_agent("resfit", space, **(QUICK | changes))
    assert isinstance(agent, ResFiT)
    return agent


def moved(agent: ResFiT, size: float = 1.0) -> ResFiT:
    """Give the residual's last layers weights, as learning does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (agent.actor, agent.target_actor):
            weight = network.get_submodule("last").get_parameter("weight")
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return agent


def with_base(seen: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    count = len(next(iter(seen.values())))
    return seen | {BASE_ACTION: 2 * torch.rand(count, 2, generator=generator) - 1}


def batch_of(space: gym.Space = STATE, seed: int = 0) -> Batch:
    batch = transitions(space, seed=seed)
    return dataclasses.replace(
        batch,
        observation=with_base(dict(batch.observation), seed),
        next_observation=with_base(dict(batch.next_observation), seed + 50),
        discount=torch.tensor([0.0, *[0.97] * 7]),
    )


def base_of(agent: str = "sac", space: gym.Space = STATE, seed: int = 7) -> BasePolicy:
    return BasePolicy(small_agent(agent, space, seed=seed), space, ACTION, frame_stack=3)


# ------------------------------------------------------------------------------------------ acting


@pytest.mark.parametrize("space", SPACES)
def test_it_begins_as_its_base_exactly(space: str) -> None:
    agent, base = make(SPACES[space]), base_of(space=SPACES[space])
    agent.take_base(base)
    seen = observation(SPACES[space])
    if "pixels" in seen:  # an episode begins with one picture, repeated
        seen["pixels"] = seen["pixels"][:, -3:].repeat(1, 3, 1, 1)
    own, _, _ = base.agent.act(seen, explore=False)
    np.testing.assert_array_equal(agent.act(seen, explore=False)[0], own)
    border = seen | {BASE_ACTION: torch.tensor([[1.0, -1.0]] * 8)}
    np.testing.assert_array_equal(agent.act(border, explore=False)[0], [[1.0, -1.0]] * 8)


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_it_stays_within_its_scale_of_the_base(scale: float) -> None:
    agent = moved(make(residual_scale=scale), 20.0)
    seen = with_base(observation(STATE, 500))
    base = seen[BASE_ACTION].numpy()
    action = agent.act(seen, explore=False)[0]
    distance = np.abs(action - base)
    assert distance.max() <= scale + 1e-6
    assert distance.max() > 0.99 * scale
    assert np.abs(action).max() <= 1
    noisy = agent.act(seen, explore=True)[0]
    assert 0.03 < np.std((noisy - action)[np.abs(action) < 0.8]) < 0.07


def test_actor_and_critics_see_the_base_action() -> None:
    agent = moved(make(residual_scale=1.0))
    seen, action = with_base(observation(STATE)), torch.zeros(8, 2)
    other = seen | {BASE_ACTION: -seen[BASE_ACTION]}
    features = [agent.joined(part)["state"] for part in (seen, other)]
    for network in (agent.actor, lambda x: agent.critic(x, action)):
        values = [network(part) for part in features]
        assert not torch.allclose(*values)


def test_an_action_beyond_the_range_is_cut_off_and_keeps_its_gradient() -> None:
    shift = torch.tensor([0.3, 0.3, -0.5], requires_grad=True)
    action = combined(torch.tensor([0.9, 0.1, -0.9]), shift)
    assert action.tolist() == pytest.approx([1.0, 0.4, -1.0])
    (gradient,) = torch.autograd.grad(action.sum(), shift)
    assert gradient.tolist() == [1, 1, 1]


def test_what_its_base_remembers_begins_anew_with_episodes() -> None:
    chunk = gym.spaces.Box(-1, 1, (3, 2), np.float32)
    base = BasePolicy(make_agent("ddpg", STATE, chunk), STATE, chunk)
    agent = make()
    agent.take_base(base)
    first, second = observation(STATE, 2, seed=1), observation(STATE, 2, seed=2)
    action, state, _ = agent.act(first, None, explore=False)
    assert state["used"].tolist() == [1, 1]
    state = agent.reset_state(state, np.array([False, True]))
    _, state, _ = agent.act(second, state, explore=False)
    assert state["used"].tolist() == [2, 1]
    own = base.agent.act(first, explore=False)[0]
    np.testing.assert_array_equal(action, own[:, 0])


def test_without_a_base_it_says_so() -> None:
    with pytest.raises(UserError, match="acts on top of a base"):
        make().act(observation(STATE), explore=False)
    assert make().act(with_base(observation(STATE)), explore=True)[1] is None


def test_a_base_of_other_actions_and_chunks_are_refused() -> None:
    wide = gym.spaces.Box(-1, 1, (3,), np.float32)
    base = BasePolicy(make_agent("ddpg", STATE, wide), STATE, wide)
    with pytest.raises(UserError, match="acts by 3 numbers, this task takes 2"):
        make().take_base(base)
    with pytest.raises(UserError, match="corrects single continuous actions"):
        make_agent("resfit", STATE, gym.spaces.Box(-1, 1, (4, 2)))
    with pytest.raises(UserError, match="corrects single continuous actions"):
        make_agent("resfit", STATE, gym.spaces.Discrete(3))


def test_it_is_not_exported() -> None:
    with pytest.raises(UserError, match=r"use Policy\.load"):
        make().greedy()


# ---------------------------------------------------------------------------------------- learning


def test_the_ensemble_is_ten_critics_side_by_side() -> None:
    ensemble = QEnsemble(3, 2, (8, 6), members=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    features = torch.randn(7, 3, generator=generator)
    action = torch.randn(7, 2, generator=generator)
    values = ensemble(features, action)
    assert values.shape == (5, 7)
    for member in range(5):
        layers: list[nn.Module] = []
        for layer in ensemble.layers:
            if not isinstance(layer, MemberLinear):
                layers.append(nn.ReLU())
                continue
            inputs, outputs = layer.weight.shape[1:]
            alone = nn.Linear(inputs, outputs)
            alone.weight.data = layer.weight[member].T
            alone.bias.data = layer.bias[member, 0]
            layers.append(alone)
            if layer.scale is not None:
                norm = nn.LayerNorm(outputs)
                norm.weight.data, norm.bias.data = layer.scale[member, 0], layer.shift[member, 0]
                layers.append(norm)
        expected = nn.Sequential(*layers)(torch.cat([features, action], 1))[:, 0]
        torch.testing.assert_close(values[member], expected)
    fresh = MemberLinear(2, 5, 8, norm=True).weight
    torch.testing.assert_close(fresh[0] @ fresh[0].T, torch.eye(5))
    assert not torch.equal(fresh[0], fresh[1])


def test_the_target_value_is_the_smallest_of_some_members_drawn_anew() -> None:
    values = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    pairs = set()
    for _ in range(300):
        smallest = subset_minimum(values, 2, generator)
        found = [
            (i, j)
            for i in range(10)
            for j in range(i)
            if torch.equal(smallest, torch.minimum(values[i], values[j]))
        ]
        assert len(found) == 1, "two different members, the same ones for the whole batch"
        pairs.update(found)
    assert len(pairs) == 45
    assert torch.equal(subset_minimum(values, 10, generator), values.amin(0))


def test_the_target_is_that_of_a_loop_over_samples() -> None:
    agent, batch = moved(make(critics=5, noise=0.4, noise_clip=0.3, reward_scale=0.5)), batch_of()
    generator = torch.Generator()
    generator.set_state(agent.generator.get_state())
    target = agent.target_value(batch)
    noise = 0.4 * torch.randn(8, 2, generator=generator)
    first, second = torch.randperm(5, generator=generator)[:2].tolist()
    for i in range(8):
        base = batch.next_observation[BASE_ACTION][i]
        features = torch.cat([batch.next_observation["state"][i], base])[None]
        shift = agent.target_actor(features)[0] + noise[i].clamp(-0.3, 0.3)
        values = agent.target(features, (base + shift).clamp(-1, 1)[None])[:, 0]
        follows = min(values[first].item(), values[second].item())
        expected = 0.5 * batch.reward[i].item() + batch.discount[i].item() * follows
        assert target[i].item() == pytest.approx(expected, abs=1e-5)
    assert target[0] == 0.5 * batch.reward[0], "a true termination"


def test_the_critics_loss_is_every_members_squared_error() -> None:
    agent, batch = make(critics=3), batch_of()
    seen, target = agent.joined(batch.observation), torch.randn(8)
    loss = agent.method.critic_loss(agent.critic, seen, batch.action, target, agent.generator).loss
    values = agent.critic(seen["state"], batch.action)
    expected = sum((values[k, i] - target[i]) ** 2 for k in range(3) for i in range(8)) / 8
    torch.testing.assert_close(loss, expected)


def test_the_actor_climbs_the_mean_of_all_critics_without_noise() -> None:
    agent, batch = moved(make(critics=3)), batch_of()
    features = agent.joined(batch.observation)["state"]
    base = batch.observation[BASE_ACTION]
    values = agent.critic(features, combined(base, agent.actor(features)))
    expected = torch.autograd.grad(-values.sum() / 24, list(agent.actor.parameters()))
    agent.updates = 1
    metrics = agent.update_actor(features)
    torch.testing.assert_close(metrics["loss/actor"], -values.detach().mean())
    for parameter, gradient in zip(agent.actor.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_only_the_critics_learn_at_first_and_the_actor_at_every_fourth_update_then() -> None:
    agent = make(critic_only_updates=6, actor_every=4)
    steps = ["loss/actor" in agent.update(batch_of(seed=seed)) for seed in range(16)]
    assert [i + 1 for i, step in enumerate(steps) if step] == [8, 12, 16]


def test_the_target_actor_is_a_moving_average() -> None:
    agent = make(critic_tau=0.25)
    before = copy.deepcopy(agent.target_actor.state_dict())
    agent.update(batch_of())
    for name, value in agent.target_actor.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * agent.actor.state_dict()[name]
        torch.testing.assert_close(value, expected)
    assert agent.target_actor.state_dict()["last.weight"].abs().sum() > 0


@pytest.mark.parametrize("space", SPACES)
def test_it_learns_from_every_observation_and_goes_on_bit_for_bit(space: str) -> None:
    agent = make(SPACES[space])
    for seed in range(3):
        metrics = agent.update(batch_of(SPACES[space], seed))
        assert all(v.ndim == 0 and torch.isfinite(v) for v in metrics.values())
    other = make(SPACES[space], seed=5)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for seed in range(3, 6):
        ours, theirs = (a.update(batch_of(SPACES[space], seed)) for a in (agent, other))
        assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in theirs.items()}
    for name, network in agent.networks().items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, other.networks()[name].state_dict()[key]), (name, key)
    seen = with_base(observation(SPACES[space]))
    noisy = [a.act(seen, explore=True)[0] for a in (agent, other)]
    np.testing.assert_array_equal(*noisy)


def test_where_it_looks_needs_no_base() -> None:
    agent, seen = make(PIXELS), observation()
    looks = agent.saliency(seen, torch.zeros(8, 2))
    assert looks is not None
    assert looks.shape == (8, 3, 24, 24)
    before = agent.generator.get_state()
    assert {"saliency", "augmentation"} <= agent.images(seen, torch.zeros(8, 2)).keys()
    assert torch.equal(agent.generator.get_state(), before)
    assert make().saliency(observation(STATE), torch.zeros(8, 2)) is None


def test_parts_that_it_would_not_look_at_are_refused() -> None:
    view = gym.spaces.Box(0, 255, (3, 24, 24), np.uint8)
    word = gym.spaces.Box(-1, 1, (4,), np.float32)
    space = gym.spaces.Dict({"front": view, "wrist": view, "state": STATE, "language": word})
    with pytest.raises(UserError, match="has no use for 'front', 'language', 'wrist'; leave these"):
        make(space)
    with pytest.raises(UserError, match="PPO learns from 'pixels' and 'state'"):
        make_agent("ppo", space, ACTION)


def test_the_replay_keeps_the_base_action_as_a_part_of_the_observation() -> None:
    for space, names in ((PIXELS, {"pixels"}), (STATE, {"state"}), (BOTH, {"pixels", "state"})):
        stored = make(space).stored_space(space, ACTION)
        assert isinstance(stored, gym.spaces.Dict)
        assert set(stored.spaces) == names | {BASE_ACTION}
        assert make(stored).critic.state_features == make(space).critic.state_features
    assert with_base_action(STATE, ACTION)[BASE_ACTION].shape == (2,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual_scale", -0.1),
        ("residual_scale", 1.5),
        ("demonstration_share", 2.0),
        ("demonstration_share", 1e-4),  # of a batch, that is none
        ("noise", float("nan")),
        ("random_residual", -1.0),
        ("critic_only_updates", -1),
        ("compared", 0),
        ("compared", 5),
        ("n_step", 0),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        make(**{field: value})


def test_the_actors_loss_is_the_ensembles_mean() -> None:
    values = torch.randn(4, 6)
    expected = -sum(values[k, i] for k in range(4) for i in range(6)) / 24
    torch.testing.assert_close(residual.actor_loss(values), expected)
