"""A rollout against plain lists of what happened, over random episodes and lost steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.core import rollout as rollouts
from agents.core.advantages import generalized_advantage
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.fields import Field
from agents.core.rollout import Rollout

ENVS, STACK = 3, 2
PIXELS = gym.spaces.Box(0, 255, (3 * STACK, 4, 4), np.uint8)
STATE = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
BOTH = gym.spaces.Dict({"pixels": PIXELS, "state": STATE})
ACTION = gym.spaces.Box(-1, 1, (2, 3), np.float32)  # a chunk of two actions
EXTRAS = {"log_prob": Field(), "chain": Field((4, 2, 3))}


class World:
    """Random episodes, and a list of everything that was seen in them."""

    def __init__(self, seed: int, ends: float = 0.2, lost: float = 0.1) -> None:
        self.rng, self.ends, self.lost = np.random.default_rng(seed), ends, lost
        self.frames: list[list[np.ndarray]] = [[] for _ in range(ENVS)]
        self.states = np.zeros((ENVS, 2), np.float32)
        self.steps: list[list[dict[str, Any]]] = [[] for _ in range(ENVS)]
        for env in range(ENVS):
            self._begin(env)

    def _frame(self) -> np.ndarray:
        return self.rng.integers(0, 256, (3, 4, 4), np.uint8)

    def _begin(self, env: int) -> None:
        self.frames[env] = [self._frame()] * STACK
        self.states[env] = self.rng.normal(size=2)

    def seen(self, env: int) -> dict[str, np.ndarray]:
        return {
            "pixels": np.concatenate(self.frames[env][-STACK:]),
            "state": self.states[env].copy(),
        }

    def observation(self) -> dict[str, np.ndarray]:
        parts = [self.seen(env) for env in range(ENVS)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def step(self) -> dict[str, Any]:
        """Return the arguments of `Rollout.add`, and remember them."""
        before = [self.seen(env) for env in range(ENVS)]
        action = self.rng.normal(size=(ENVS, 2, 3)).astype(np.float32)
        reward = self.rng.normal(size=ENVS).astype(np.float32)
        extras = {
            "log_prob": self.rng.normal(size=ENVS).astype(np.float32),
            "chain": self.rng.normal(size=(ENVS, 4, 2, 3)).astype(np.float32),
        }
        lost = self.rng.random(ENVS) < self.lost
        terminated = (self.rng.random(ENVS) < self.ends) & ~lost
        truncated = (self.rng.random(ENVS) < self.ends) & ~terminated & ~lost
        final: Any = np.array([None] * ENVS, dtype=object)
        for env in range(ENVS):
            if not lost[env]:
                self.frames[env].append(self._frame())
                self.states[env] = self.rng.normal(size=2)
            after = self.seen(env)
            self.steps[env].append({
                "seen": before[env], "after": after, "lost": lost[env], "action": action[env],
                "reward": reward[env], "terminated": terminated[env], "truncated": truncated[env],
                **{name: values[env] for name, values in extras.items()},
            })  # fmt: skip
            if terminated[env] or truncated[env] or lost[env]:
                final[env] = None if lost[env] else after
                self._begin(env)
        return {
            "action": action, "reward": reward, "terminated": terminated, "truncated": truncated,
            "observation": self.observation(), "final_observation": final, "dropped": lost,
            "extras": extras,
        }  # fmt: skip


def make(length: int, **settings: Any) -> Rollout:
    arguments = {"length": length, "num_envs": ENVS, "frame_stack": STACK, "extras": EXTRAS}
    return Rollout(BOTH, ACTION, storage="ram", log=lambda _: None, **(arguments | settings))


def fill(rollout: Rollout, world: World, steps: int) -> None:
    for _ in range(steps):
        rollout.add(**world.step())


def check(rollout: Rollout, world: World, steps: int) -> None:
    """Compare a rollout with the last steps of its world."""
    experience = rollout.experience()
    assert experience.reward.shape == (steps, ENVS)
    for env in range(ENVS):
        happened = world.steps[env][-steps:]
        for t, step in enumerate(happened):
            assert bool(experience.kept[t, env]) != step["lost"]
            if step["lost"]:
                assert experience.reward[t, env] == 0
                continue
            index = torch.tensor([t * ENVS + env])
            for found, wanted in (
                (experience.observation(index), step["seen"]),
                (experience.next_observation(index), step["after"]),
            ):
                for name in ("pixels", "state"):
                    np.testing.assert_array_equal(found[name][0].numpy(), wanted[name])
            np.testing.assert_array_equal(experience.action[t, env].numpy(), step["action"])
            np.testing.assert_array_equal(experience.extras["chain"][t, env], step["chain"])
            assert experience.reward[t, env].item() == step["reward"]
            assert bool(experience.terminated[t, env]) == step["terminated"]
            before_lost = t + 1 < steps and happened[t + 1]["lost"] and not step["terminated"]
            assert bool(experience.truncated[t, env]) == bool(step["truncated"] or before_lost)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_rollouts_hold_what_happened_one_after_the_other(seed, length, rollouts):
    world = World(seed)
    rollout = make(length)
    rollout.start(world.observation())
    for _ in range(rollouts):
        fill(rollout, world, length)
        assert rollout.is_full
        check(rollout, world, length)
        rollout.clear()
        assert not rollout.is_full


def test_next_values_are_evaluated_only_where_the_next_step_does_not_have_them() -> None:
    world = World(4)
    rollout = make(40)
    rollout.start(world.observation())
    fill(rollout, world, 40)
    experience = rollout.experience()
    everything = torch.arange(40 * ENVS)[experience.kept.flatten()]
    value = torch.zeros(40, ENVS)
    value.view(-1)[everything] = experience.observation(everything)["state"].sum(1)
    asked = []

    def evaluate(observation: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.append(len(observation["state"]))
        return observation["state"].sum(1)

    found = experience.next_values(value, evaluate)
    wanted = torch.zeros(40, ENVS)
    wanted.view(-1)[everything] = experience.next_observation(everything)["state"].sum(1)
    wanted[experience.terminated] = 0
    torch.testing.assert_close(found[experience.kept], wanted[experience.kept])
    ends = (experience.truncated & experience.kept).sum()
    assert 0 < asked[0] <= ends + ENVS
    ended = experience.terminated, experience.truncated
    assert generalized_advantage(experience.reward, value, found, *ended).isfinite().all()


def test_what_followed_is_valued_in_parts_that_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(4)
    rollout = make(40)
    rollout.start(world.observation())
    fill(rollout, world, 40)
    experience = rollout.experience()
    sizes: list[int] = []

    def evaluate(observation: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(observation["state"]))
        return observation["state"].sum(1)

    value = torch.zeros(40, ENVS)
    whole = experience.next_values(value, evaluate)
    assert len(sizes) == 1
    monkeypatch.setattr(rollouts, "MOST_AT_ONCE", 3)
    assert torch.equal(experience.next_values(value, evaluate), whole)
    assert max(sizes[1:]) == 3
    assert sum(sizes[1:]) == sizes[0]


def test_a_lost_step_says_nothing_about_the_ones_before_it() -> None:
    """Advantages before it must not change with what stands in its place."""
    world = World(0, ends=0.0, lost=0.0)
    rollout = make(4)
    rollout.start(world.observation())
    fill(rollout, world, 2)
    world.lost = 1.0
    fill(rollout, world, 1)
    world.lost = 0.0
    fill(rollout, world, 1)
    experience = rollout.experience()
    assert experience.kept[:, 0].tolist() == [True, True, False, True]
    assert experience.truncated[:, 0].tolist() == [False, True, False, False]
    value = torch.ones(4, ENVS)
    value[2] = 1e6
    following = experience.next_values(value, lambda seen: torch.full((len(seen["state"]),), 2.0))
    assert following[1].tolist() == [2.0] * ENVS
    ended = experience.terminated, experience.truncated
    advantage = generalized_advantage(experience.reward, value, following, *ended)
    assert advantage[:2].abs().max() < 10


def test_minibatches_are_every_kept_step_once_and_repeat_with_their_seed() -> None:
    world = World(7)
    rollout = make(30)
    rollout.start(world.observation())
    fill(rollout, world, 30)
    experience = rollout.experience()
    batches = list(experience.minibatches(16, np.random.default_rng(1)))
    again = list(experience.minibatches(16, np.random.default_rng(1)))
    drawn = torch.cat(batches)
    assert torch.equal(drawn, torch.cat(again))
    assert drawn.sort().values.tolist() == experience.kept.flatten().nonzero()[:, 0].tolist()
    assert drawn.tolist() != sorted(drawn.tolist())
    assert all(12 <= len(batch) <= 20 for batch in batches)


def test_a_checkpoint_in_the_middle_of_a_rollout_goes_on_exactly(tmp_path: Path) -> None:
    world = World(3)
    first = make(10)
    first.start(world.observation())
    fill(first, world, 10)
    first.clear()
    fill(first, world, 6)
    CheckpointStore(tmp_path).save(16, {}, first)
    second = make(10)
    CheckpointStore(tmp_path).load(replay=second)
    check(second, world, 6)
    fill(second, world, 4)
    assert second.is_full
    check(second, world, 10)


def test_frames_are_kept_once() -> None:
    rollout = make(100, extras={})
    single = 100 * ENVS * 3 * 4 * 4
    assert rollout._columns["pixels"].nbytes < 2.2 * single, (
        "two rows a step, should each end an episode"
    )


def test_misuse_is_told() -> None:
    world = World(0)
    rollout = make(2)
    rollout.start(world.observation())
    with pytest.raises(ValueError, match="the rollout is empty"):
        rollout.experience()
    fill(rollout, world, 2)
    with pytest.raises(RuntimeError, match="holds its 2 steps"):
        fill(rollout, world, 1)
    with pytest.raises(UserError, match="length is 0"):
        make(0)
    world = World(0, lost=1.0)
    rollout = make(1)
    rollout.start(world.observation())
    fill(rollout, world, 1)
    with pytest.raises(ValueError, match="was dropped"):
        rollout.experience().observation(torch.tensor([0]))
