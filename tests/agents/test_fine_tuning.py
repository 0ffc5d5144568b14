"""What all agents that fine-tune have in common: ratios that begin at 1, credit, the base, exact state."""

from __future__ import annotations

import copy
import math
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from agents.core.agent import as_observation
from agents.core.errors import UserError
from agents.core.rollout import Rollout
from tests.agents.fine_tuning import (
    ACTION,
    BOTH,
    CHUNK,
    ENVS,
    NAMES,
    PIXELS,
    STATE,
    STEPS,
    collect,
    make,
    move,
    remembered,
)  # fmt: skip


@pytest.mark.parametrize("space", [STATE, PIXELS, BOTH])
@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_one_at_the_first_inner_step(name: str, space: gym.Space) -> None:
    """In the second rollout too, when statistics have changed what is seen and paid."""
    agent = make(name, space)
    for seed in range(2):
        metrics = agent.update(collect(agent, space, seed=seed).experience())
        assert metrics["ratio/first_deviation"] < 1e-5
        assert metrics["ratio/largest_deviation"] > 1e-5
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_exactly_one_for_the_batch_that_acted(name: str) -> None:
    agent = make(name, fine_tuned_steps=1, denoising_steps=1, draws=1)
    seen, extras = remembered(agent)
    said = agent.policy_loss(seen, extras, torch.ones(5))
    assert (said.log_ratio == 0).all()
    assert any(p.grad is None for p in agent.policy.parameters())
    said.loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in agent.policy.denoiser.parameters()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_is_told_what_a_batch_of_many_is(name: str) -> None:
    agent = make(name, horizon=6, bc_coefficient=0.0, entropy_coefficient=0.0)
    seen, extras = remembered(agent)
    move(agent.policy)
    advantage = torch.linspace(-1, 1, 5)
    whole = agent.policy_loss(seen, extras, advantage)
    single = [
        agent.policy_loss(
            {"state": seen["state"][i : i + 1]},
            {key: value[i : i + 1] for key, value in extras.items()},
            advantage[i : i + 1],
        )
        for i in range(5)
    ]
    alone = torch.cat([part.log_ratio for part in single])
    torch.testing.assert_close(whole.log_ratio, alone, atol=1e-5, rtol=1e-4)
    loss = torch.stack([part.loss for part in single]).mean()
    torch.testing.assert_close(whole.loss, loss, atol=1e-5, rtol=1e-3)
    assert whole.log_ratio.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_weights_exploration_acting_and_order_have_streams_of_their_own(name: str) -> None:
    """One seed decides them all, and no two draw the same numbers."""
    agent, same, other = make(name), make(name), make(name, seed=2)
    networks = [agent.policy, agent.critic, *([agent.noise] if name == "reinflow" else [])]
    first = [next(p for p in net.parameters() if p.ndim > 1) for net in networks]
    draws = [agent.generator.initial_seed(), agent.acting.initial_seed(), agent.further_seed]
    draws.append(int(agent.order.integers(2**63)))
    assert len(set(draws)) == len(draws)
    for seed in (1, *draws[:2]):  # as if a network had been made from that number
        torch.manual_seed(seed)
        assert not torch.equal(torch.nn.Linear(*reversed(first[-1].shape)).weight, first[-1])
    for left, right in zip(agent.networks().values(), same.networks().values(), strict=True):
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b)
    assert draws[0] == same.generator.initial_seed() != other.generator.initial_seed()


@pytest.mark.parametrize("name", NAMES)
def test_single_actions_and_chunks_have_the_shape_of_the_task(name: str) -> None:
    for space, shape in ((ACTION, (5, 2)), (CHUNK, (5, 4, 2))):
        agent = make(name, STATE, space, horizon=4)
        seen = {"state": torch.randn(5, 3)}
        for explore in (True, False):
            action, state, extras = agent.act(seen, explore=explore)
            assert action.shape == shape
            assert action.dtype == np.float32
            assert np.abs(action).max() <= 1
            assert state is None
            assert set(extras) == (set(agent.extras) if explore else set())
        for field, value in agent.act(seen, explore=True)[2].items():
            assert value.shape == (5, *agent.extras[field].shape), field


def test_credit_ends_at_a_time_limit_with_the_value_of_the_last_observation() -> None:
    """DPPO's trainer lets the trace, and the value of what follows, run on into the next episode."""
    agent = make("dppo", scale_reward=False, rollout_length=8)
    rollout = Rollout(
        STATE, CHUNK, length=8, num_envs=ENVS, frame_stack=2, extras=agent.extras, log=lambda _: None
    )  # fmt: skip
    random = np.random.default_rng(0)
    states = random.normal(size=(9, ENVS, 3)).astype(np.float32)
    finals = random.normal(size=(8, ENVS, 3)).astype(np.float32)
    reward = random.normal(size=(8, ENVS))
    cut, end = np.zeros((2, 8, ENVS), bool)
    cut[2], end[5, 0] = True, True
    rollout.start(states[0])
    for t in range(8):
        action, _, extras = agent.act(as_observation(states[t], agent.device), explore=True)
        rollout.add(action, reward[t], end[t], cut[t], states[t + 1], finals[t], extras=extras)
    advantage, target = (x.view(8, ENVS) for x in agent.credit(rollout.experience()))

    def value(state: Any) -> Any:
        return agent.critic({"state": torch.from_numpy(state)}).detach().numpy()

    gamma, trace = agent.config.discount, agent.config.gae_lambda
    for env in range(ENVS):
        later = 0.0
        for t in reversed(range(8)):
            following = states[t + 1] if not cut[t, env] else finals[t]
            v_next = 0.0 if end[t, env] else value(following)[env]
            if cut[t, env] or end[t, env]:
                later = 0.0
            error = reward[t, env] + gamma * v_next - value(states[t])[env]
            later = error + gamma * trace * later
            assert advantage[t, env].item() == pytest.approx(later, abs=1e-4)
            assert target[t, env].item() == pytest.approx(later + value(states[t])[env], abs=1e-4)


def test_episodes_that_are_learned_from_begin_in_different_states() -> None:
    """FPO's training environments go back to their first state at every reset."""
    settings: dict[str, Any] = {"observation": "state", "action_chunk": 4, "episode_length": 8}
    with closing(envs.make_vec("toy/reach", ENVS, seed=1, **settings)) as vector:
        space = vector.single_observation_space
        agent = make("fpo", space, vector.single_action_space)
        rollout = Rollout(
            space, vector.single_action_space, length=STEPS, num_envs=ENVS, extras=agent.extras,
            log=lambda _: None,
        )  # fmt: skip
        seen, _ = vector.reset(seed=1)
        rollout.start(seen)
        while not rollout.is_full:
            action, _, extras = agent.act(as_observation(seen, agent.device), explore=True)
            seen, reward, terminated, truncated, info = vector.step(action)
            rollout.add(action, reward, terminated, truncated, seen, info.get("final_obs"), extras=extras)  # fmt: skip
    experience = rollout.experience()
    assert experience.truncated[1::2].all()
    begins = torch.arange(STEPS * ENVS).view(STEPS, ENVS)[::2].flatten()
    assert len(experience.observation(begins)["state"].unique(dim=0)) == len(begins)


@pytest.mark.parametrize("name", NAMES)
def test_learning_goes_on_exactly_from_a_saved_state(name: str) -> None:
    agent = make(name, noise_decay_steps=100)
    agent.set_progress(30)
    agent.update(collect(agent).experience())
    saved = copy.deepcopy(agent.state_dict())
    other = make(name, seed=9, noise_decay_steps=100)
    other.load_state_dict(saved)
    told = [a.update(collect(a, seed=1).experience()) for a in (agent, other)]
    assert told[0].keys() == told[1].keys()
    for key, value in told[0].items():
        assert torch.equal(value, told[1][key]), key
    ours, theirs = (a.state_dict()["networks"] for a in (agent, other))
    for network, tensors in ours.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, theirs[network][key]), f"{network}.{key}"
    seen = {"state": torch.randn(4, 3)}
    for explore in (True, False):
        actions = [a.act(seen, explore=explore)[0] for a in (agent, other)]
        np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_its_base_and_leaves_that_as_it_is(name: str) -> None:
    base = make(name, BOTH, seed=7).policy
    base.condition.ranges["state"].center.fill_(0.5)
    agent = make(name, BOTH)
    agent.start_from(base)
    before = copy.deepcopy(base.state_dict())
    seen = {"pixels": torch.randint(0, 255, (4, 6, 24, 24), dtype=torch.uint8), "state": torch.randn(4, 3)}  # fmt: skip
    agent.seed_actions(5)
    sampler = agent.evaluation_sampler()
    theirs = base.sample(seen, torch.Generator().manual_seed(5), sampler=sampler)
    np.testing.assert_array_equal(agent.act(seen, explore=False)[0], theirs.detach().numpy())
    torch.testing.assert_close(agent.critic.condition(seen), base.condition(seen))
    agent.update(collect(agent, BOTH).experience())
    held = [base.state_dict()] + ([agent.base.state_dict()] if agent.keeps_base else [])
    for weights in held:
        assert all(torch.equal(value, weights[key]) for key, value in before.items())
    learned = agent.policy.state_dict()
    assert torch.equal(learned["condition.ranges.state.center"], torch.full((3,), 0.5))
    assert any(not torch.equal(value, learned[key]) for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_only_the_critic_learns_at_first(name: str) -> None:
    agent = make(name, critic_warmup=1, normalize_observation=False)
    actor, critic = copy.deepcopy([agent.policy.state_dict(), agent.critic.state_dict()])
    metrics = agent.update(collect(agent).experience())
    assert "loss/policy" not in metrics
    assert all(torch.equal(value, agent.policy.state_dict()[key]) for key, value in actor.items())
    assert any(
        not torch.equal(value, agent.critic.state_dict()[key]) for key, value in critic.items()
    )
    assert "loss/policy" in agent.update(collect(agent, seed=1).experience())


def test_passes_end_when_the_policy_has_gone_too_far() -> None:
    whole = make("dppo", epochs=4, learning_rate=1e-2)
    whole.update(collect(whole).experience())
    early = make("dppo", epochs=4, learning_rate=1e-2, target_kl=1e-7)
    early.update(collect(early).experience())
    assert (early.gradient_updates, whole.gradient_updates) == (4, 16)


def test_without_a_base_states_are_normalized_by_what_was_seen() -> None:
    agent = make("fpo")
    rollout = collect(agent)
    agent.update(rollout.experience())
    state = rollout.observe(torch.arange(STEPS * ENVS), ahead=0)["state"]
    for network in (agent.policy, agent.critic):
        seen = network.condition({"state": state})
        torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dppo", {"clip": 0.0}, "clip is 0.0"),
        ("dppo", {"eta": 0.0}, "eta is 0.0"),
        (
            "dppo",
            {"lowest_log_prob": 2.0},
            "lowest_log_prob 2.0 and highest_log_prob 2.0; give two increasing",
        ),
        (
            "dppo",
            {"clip": 0.005},
            "from clip_base 0.01 to clip 0.005; lower clip_base or raise clip",
        ),
        ("dppo", {"exploration_std": 0.0}, "exploration_std is 0.0"),
        ("dppo", {"horizon": 2}, "horizon is 2, but the task executes chunks of 4"),
        ("fpo", {"draws": 0}, "draws is 0"),
        ("fpo", {"inpaint": True, "horizon": 6}, "give --no-inpaint"),
        ("fpo", {"surrogate": "clip"}, "surrogate"),
        ("reinflow", {"noise_correlation": 0.5}, "give --clip-samples 0"),
        ("reinflow", {"smallest_noise": 0.3}, "two increasing numbers"),
        ("reinflow", {"entropy_coefficient": -1.0}, "entropy_coefficient is -1.0"),
        ("reinflow", {"entropy_coefficient": math.inf}, "entropy_coefficient is inf"),
        ("reinflow", {"w2_coefficient": math.inf}, "w2_coefficient is inf"),
        ("dppo", {"bc_coefficient": math.inf}, "bc_coefficient is inf"),
        ("dppo", {"exploration_std": math.inf}, "exploration_std is inf"),
        ("dppo", {"log_prob_std": math.inf}, "log_prob_std is inf"),
    ],
)
def test_values_that_cannot_be_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(name, **changes)


def test_a_policy_that_draws_is_not_exported() -> None:
    with pytest.raises(UserError, match="draws its actions"):
        make("dppo").greedy()


def test_pixels_alone_need_no_statistics() -> None:
    agent = make("fpo", PIXELS)
    assert "moments" not in agent.networks()
