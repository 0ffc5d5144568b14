"""A base hands its chunks out one by one as it would execute them, episode by episode, and only its caller decides."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import envs
from agents import AGENTS, make_agent
from agents.core.agent import Agent, as_observation
from agents.core.base_policy import BasePolicy, BaseStream
from agents.core.errors import UserError
from agents.core.tree_rows import count_rows, on_device, rows_of, with_rows

CPU = torch.device("cpu")
TASK: dict[str, Any] = {"size": 24, "observation": "both", "episode_length": 11, "seed": 5}
SMALL = {
    "horizon": 4, "denoiser": "mlp", "width": 16, "blocks": 1, "time_features": 8, "feature_dim": 8,
    "encoder": "small", "denoising_steps": 2,
}  # fmt: skip
STATE = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Counter(Agent):
    """Plans [name, 0], [name, 1], [name, 2] in hundredths, and remembers how often it did so in an episode."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)
        self.seeds: list[int] = []
        self.plans: list[list[float]] = []

    def act(self, observation, state=None, *, explore):  # type: ignore[no-untyped-def]
        seen = observation["state"][:, 0]
        self.plans.append(seen.tolist())
        state = torch.zeros(len(seen), 1) if state is None else state
        steps = torch.arange(3).expand(len(seen), 3)
        action = torch.stack([(100 * state + seen[:, None]).expand(-1, 3), steps], -1) / 1000
        return action.numpy(), state + 1, {}

    def seed_actions(self, seed: int) -> None:
        self.seeds.append(seed)

    def update(self, batch: Any) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}


def counter() -> BasePolicy:
    return BasePolicy(Counter(), STATE, gym.spaces.Box(-1, 1, (3, 2)))


def seen(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def imitator(name: str, space: gym.Space, action: gym.Space, **changes: Any) -> Agent:
    configs = [
        dataclasses.replace(
            config,
            **{
                f.name: (SMALL | changes)[f.name]
                for f in dataclasses.fields(config)
                if f.name in SMALL | changes
            },
        )
        for config in AGENTS[name].configs
    ]
    return make_agent(name, space, action, configs=configs, seed=1)


@pytest.mark.parametrize(
    ("name", "changes"), [("bc", {}), ("flow-policy", {}), ("flow-policy", {"inpaint": True})]
)
def test_its_steps_are_those_of_the_chunks_that_it_would_execute(
    name: str, changes: dict[str, Any]
) -> None:
    """Chunks of 3 in episodes of 11 steps, seen in stacks of 2; the steps are seen in stacks of 3, bit for bit."""
    chunks = envs.make_vec("toy/reach", 2, action_chunk=3, frame_stack=2, **TASK)
    singles = envs.make_vec("toy/reach", 2, frame_stack=3, **TASK)
    space, action_space = chunks.single_observation_space, chunks.single_action_space
    agent = imitator(name, space, action_space, **changes)
    stream = BaseStream(BasePolicy(agent, space, action_space, frame_stack=2), seed=7)
    random = np.random.default_rng(7)

    whole, state = [], None
    observation, _ = chunks.reset(seed=3)
    for _ in range(9):  # two episodes of 3 + 3 + 3 + 2 steps, and one step more
        agent.seed_actions(int(random.integers(2**31)))
        action, state, _ = agent.act(as_observation(observation, CPU), state, explore=False)
        observation, reward, terminated, truncated, _ = chunks.step(action)
        state = agent.reset_state(state, terminated | truncated)
        whole.append((action, reward))
    single, total = [], np.zeros(2)
    observation, _ = singles.reset(seed=3)
    stream.begin(np.ones(2, bool))
    for t in range(2 * 11 + 3):
        single.append(stream.act(observation))
        observation, reward, terminated, truncated, _ = singles.step(single[-1])
        stream.begin(terminated | truncated)
        total += reward
        if t % 11 in (2, 5, 8, 10):
            action, expected = whole.pop(0)
            taken = np.stack(single, 1)
            np.testing.assert_array_equal(taken, action[:, : taken.shape[1]])
            np.testing.assert_allclose(total, expected, atol=1e-6)
            single, total = [], np.zeros(2)
    assert len(whole) == 0
    chunks.close()
    singles.close()


def test_every_episode_has_a_queue_of_its_own() -> None:
    base = counter()
    stream = BaseStream(base, seed=0)
    rows = []
    for t in range(7):
        rows.append(np.round(1000 * stream.act(seen(10 + t, 20 + t))).astype(int).tolist())
        if t == 1:
            stream.begin(np.array([False, True]))
    first = [[10, 0], [10, 1], [10, 2], [113, 0], [113, 1], [113, 2], [216, 0]]
    second = [[20, 0], [20, 1], [22, 0], [22, 1], [22, 2], [125, 0], [125, 1]]
    assert [row[0] for row in rows] == first
    assert [row[1] for row in rows] == second
    assert base.agent.plans == [[10, 20], [22], [13], [25], [16]]  # type: ignore[attr-defined]


def test_what_comes_after_an_episode_is_told_without_counting() -> None:
    stream = BaseStream(counter(), seed=0)
    for t in range(3):
        stream.act(seen(10 + t, 20 + t, 30 + t))
    stream.begin(np.array([True, False, False]))
    before = stream.get_state()["episodes"]
    copy = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
    last = stream.last(seen(33, 23), np.array([2, 1]))
    np.testing.assert_allclose(1000 * last, [[133, 0], [123, 0]], atol=1e-3)
    after = stream.get_state()["episodes"]
    assert all(torch.equal(value, after[name]) for name, value in copy.items())
    np.testing.assert_allclose(1000 * stream.act(seen(1, 2, 3))[:, 0], [1, 102, 103], atol=1e-3)


def test_it_goes_on_in_mid_chunk_from_its_state() -> None:
    agent = imitator("flow-policy", gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-1, 1, (3, 2)))
    base = BasePolicy(agent, gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-1, 1, (3, 2)))
    random = np.random.default_rng(0)
    shown = random.normal(size=(20, 2, 4)).astype(np.float32)
    stream = BaseStream(base, seed=1)
    for t in range(7):
        stream.act(shown[t])
    state = stream.get_state()
    expected = [stream.act(shown[t]) for t in range(7, 20)]
    agent.seed_actions(99)  # whatever the agent itself drew in between
    other = BaseStream(base, seed=2)
    other.set_state(state)
    np.testing.assert_array_equal([other.act(shown[t]) for t in range(7, 20)], expected)
    assert not np.array_equal(expected[0], BaseStream(base, seed=3).act(shown[7]))


def test_actions_are_cut_to_their_range_and_weights_are_frozen() -> None:
    base = counter()
    assert not any(p.requires_grad for p in base.agent.networks()["network"].parameters())
    action, _ = base.step({"state": torch.full((1, 1), 5000.0)}, None, np.random.default_rng(0))
    assert action.tolist() == [[1.0, 0.0]]


def test_other_numbers_of_episodes_are_refused() -> None:
    stream = BaseStream(counter(), seed=0)
    stream.act(seen(1, 2))
    with pytest.raises(UserError, match="3 observations are given to a base that remembers 2"):
        stream.act(seen(1, 2, 3))


def test_choices_are_no_base() -> None:
    with pytest.raises(UserError, match="needs a base with continuous actions"):
        BasePolicy(Counter(), STATE, gym.spaces.Discrete(3))


def test_rows_of_trees() -> None:
    tree = {"a": torch.arange(4), "b": {"c": torch.arange(8).view(4, 2)}, "d": None}
    index = torch.tensor([3, 1])
    rows = rows_of(tree, index)
    assert rows["a"].tolist() == [3, 1]
    assert rows["b"]["c"].tolist() == [[6, 7], [2, 3]]
    assert rows["d"] is None
    changed = with_rows(tree, index, {"a": -rows["a"], "b": {"c": 0 * rows["b"]["c"]}, "d": None})
    assert changed["a"].tolist() == [0, -1, 2, -3]
    assert changed["b"]["c"].tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]
    assert tree["a"].tolist() == [0, 1, 2, 3]
    assert (count_rows(tree), count_rows(None), count_rows(torch.zeros(3))) == (4, None, 3)
    assert on_device(tree, CPU)["b"]["c"].device == CPU
