"""A teacher beside policies that denoise: it begins episodes, its decisions have no ratio, its chunks are learned."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from agents.core.errors import UserError
from agents.core.rollout import TEACHER_ACTION
from agents.generative_policies.guidance import GUIDED, cloning_loss
from tests.agents.fine_tuning import ACTION, CHUNK, NAMES, STATE, collect, make, remembered

COUNT = 4000


def followed(agent: Any, decisions: int, state: Any = None) -> tuple[np.ndarray, Any]:
    """Return who decided, bool [decisions, COUNT], where the agent does -1 and the teacher 1; and the last state."""
    own, advice = -np.ones((COUNT, 4, 2), np.float32), np.ones((COUNT, 4, 2), np.float32)
    told = []
    for _ in range(decisions):
        extras: dict[str, torch.Tensor] = {}
        done, state = agent.follow(own, state, advice, extras)
        guided = extras[GUIDED].numpy()
        assert (done[guided] == 1).all()
        assert (done[~guided] == -1).all()
        assert done.dtype == np.float32
        told.append(guided)
    return np.array(told), state


def test_a_teacher_begins_a_share_of_the_episodes_and_hands_over_once() -> None:
    agent = make("fpo", guidance=0.6, guided_decisions=4.0)
    told, state = followed(agent, 60)
    begun = told[0]
    assert begun.mean() == pytest.approx(0.6, abs=4 * (0.24 / COUNT) ** 0.5)
    assert (np.diff(told.astype(int), axis=0) <= 0).all(), "who has handed over stays silent"
    lengths = told.sum(0)[begun]
    assert lengths.mean() == pytest.approx(4, abs=4 * (12 / len(lengths)) ** 0.5), (
        "geometric, variance 12"
    )
    assert (lengths == 1).mean() == pytest.approx(0.25, abs=0.04)
    half = np.arange(COUNT) % 2 == 0
    again, _ = followed(agent, 1, agent.reset_state(state, half))
    assert again[0][half].mean() == pytest.approx(0.6, abs=0.05), "a new episode is decided anew"
    assert not again[0][~half].any()


def test_the_share_falls_in_a_straight_line() -> None:
    agent = make("dppo", guidance=0.8, guidance_decay=1000)
    for steps, share in ((0, 0.8), (250, 0.6), (750, 0.2), (1000, 0.0), (9999, 0.0)):
        agent.set_progress(steps)
        assert followed(agent, 1)[0].mean() == pytest.approx(share, abs=0.035)


def test_without_guidance_nothing_is_drawn_and_nothing_more_is_remembered() -> None:
    agent = make("fpo")
    assert GUIDED not in agent.extras
    before = agent.generator.get_state()
    own = np.zeros((3, 4, 2), np.float32)
    done, state = agent.follow(own, None, own + 1, {})
    assert done is own
    assert state is None
    assert torch.equal(agent.generator.get_state(), before)


def weights(agent: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in agent.actor_parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_a_teachers_decisions_are_left_out_of_the_surrogate(name: str) -> None:
    """A step on all decisions is one on the policy's own, whatever the others are credited with."""
    guided = torch.tensor([False, True, False, True, False])
    advantage = torch.tensor([1.0, 50.0, -2.0, -70.0, 0.5])
    agents = [make(name, bc_coefficient=0.0, guidance=0.5) for _ in range(3)]
    seen, extras = remembered(agents[0])
    del extras[GUIDED]
    own = ~guided
    metrics = agents[0]._actor_step(seen, {**extras, GUIDED: guided}, advantage)
    agents[1]._actor_step(
        {"state": seen["state"][own]}, {k: v[own] for k, v in extras.items()}, advantage[own]
    )
    agents[2]._actor_step(seen, dict(extras), advantage)
    first, alone, everybody = (weights(agent) for agent in agents)
    assert all(torch.equal(a, b) for a, b in zip(first, alone, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, everybody, strict=True))
    assert metrics["ratio/largest_deviation"] < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_minibatch_of_a_teachers_decisions_teaches_the_critic_and_what_is_cloned(
    name: str,
) -> None:
    agent = make(name, guidance=0.5)
    before = weights(agent)
    seen, extras = remembered(agent)
    extras[GUIDED] = torch.ones(5, dtype=torch.bool)
    assert agent._actor_step(seen, dict(extras), torch.ones(5)) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, weights(agent), strict=True))
    extras[TEACHER_ACTION] = torch.zeros(5, 4, 2)
    assert set(agent._actor_step(seen, extras, torch.ones(5))) == {
        "loss/teacher",
        "gradient_norm/policy",
    }
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(agent), strict=True))


def test_a_rollout_that_the_teacher_decided_alone_is_learned_from() -> None:
    agent = make("fpo", guidance=1.0)
    experience = collect(agent).experience()
    experience.extras[GUIDED].fill_(True)
    experience.extras[GUIDED][0, 0] = False
    critic = copy.deepcopy(agent.critic.state_dict())
    metrics = agent.update(experience)
    assert metrics["policy/guided"].item() == pytest.approx(47 / 48)
    assert any(
        not torch.equal(value, agent.critic.state_dict()[key]) for key, value in critic.items()
    )
    assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())


@pytest.mark.parametrize("name", ["fpo", "reinflow"])
def test_a_teachers_chunk_is_learned_by_the_flows_own_loss(name: str) -> None:
    """Of what is executed alone: t and noise drawn as the policy draws them, the velocity written out."""
    agent = make(name, horizon=6)
    generator = torch.Generator().manual_seed(4)
    seen, taught = {"state": torch.randn(5, 3)}, torch.rand(5, 4, 2) * 2 - 1
    agent.generator.manual_seed(4)
    told = cloning_loss(agent.policy, seen, taught, agent.generator)
    t = (1 - torch.rand(5, generator=generator)).clamp(1e-5, 1)
    noise = torch.randn(5, 6, 2, generator=generator)
    condition, errors = agent.policy.condition(seen), []
    for i in range(5):
        chunk = torch.cat([taught[i], taught[i, -1:], taught[i, -1:]])
        x = t[i] * noise[i] + (1 - t[i]) * chunk
        velocity = agent.policy.denoiser(x[None], t[i : i + 1], condition[i : i + 1])[0]
        errors.append(((velocity - (noise[i] - chunk)) ** 2)[:4].mean())
    torch.testing.assert_close(told, torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", [CHUNK, ACTION])
def test_cloning_alone_brings_the_policy_to_its_teacher(name: str, space: Any) -> None:
    """Without credit: advantages are 0, and the teacher's action is the state's first two numbers."""
    changes: dict[str, Any] = {"learning_rate": 1e-2, "width": 32, "entropy_coefficient": 0.0}
    prediction = "x0" if name == "dppo" else "velocity"
    agent = make(
        name, STATE, space, normalize_advantage=False, fine_tuned_steps=0, prediction=prediction, **changes
    )  # fmt: skip
    state = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    wanted = state[:, :2] if space is ACTION else state[:, None, :2].expand(-1, 4, -1)
    seen = {"state": state}
    _, _, extras = agent.act(seen, explore=True)
    far = [np.abs(agent.act(seen, explore=False)[0] - wanted.numpy()).mean()]
    for _ in range(300):
        agent._actor_step(seen, {**extras, TEACHER_ACTION: wanted}, torch.zeros(64))
    far.append(np.abs(agent.act(seen, explore=False)[0] - wanted.numpy()).mean())
    assert far[1] < 0.15 < 0.3 < far[0]


def test_a_teacher_that_counts_for_nothing_leaves_learning_as_it_is() -> None:
    found = []
    for taught in (False, True):
        agent = make("fpo", teacher_coefficient=0.0)
        experience = collect(agent).experience()
        if taught:
            experience.extras[TEACHER_ACTION] = torch.ones(16, 3, 4, 2)
        metrics = agent.update(experience)
        assert "loss/teacher" not in metrics
        found.append(weights(agent))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_teachers_weight_falls() -> None:
    agent = make("fpo", teacher_decay=100)
    experience = collect(agent).experience()
    experience.extras[TEACHER_ACTION] = torch.ones(16, 3, 4, 2)
    assert "loss/teacher" in agent.update(experience)
    agent.set_progress(100)
    assert "loss/teacher" not in agent.update(experience)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance": 1.5}, r"guidance is 1.5; give a number in \[0, 1\]"),
        ({"guided_decisions": 0.5}, "guided_decisions is 0.5; give 1 or more"),
        ({"guidance_decay": -1}, "guidance_decay is -1; give 0 or more"),
        ({"teacher_coefficient": -1.0}, "teacher_coefficient is -1.0; give 0 or more"),
    ],
)
def test_values_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make("fpo", **changes)
