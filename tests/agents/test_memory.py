"""A recurrent memory against a loop that takes one step after the other, from acting to the gradient."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from agents import Policy
from agents.core.agent import as_observation
from agents.core.errors import UserError
from agents.core.logging import Logger
from agents.core.loops import LoopSettings, OnPolicyLoop
from agents.core.rollout import Rollout
from agents.on_policy.memory import Memory
from agents.on_policy.ppo import PPO, PPOConfig
from experiments.evaluating.rollouts import run_episodes

ENVS, STEPS, UNITS = 3, 21, 5
PIXELS = gym.spaces.Box(0, 255, (6, 24, 24), np.uint8)
STATE = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
BOTH = gym.spaces.Dict({"pixels": PIXELS, "state": STATE})
CONTINUOUS, DISCRETE = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(3)
TINY = PPOConfig(
    rollout_length=STEPS, minibatch_size=12, epochs=2, hidden=(16,), feature_dim=8, encoder="small",
    memory_size=UNITS, sequence_length=4, normalize_observation=True, value_regularization=0.1,
)  # fmt: skip


def gated_recurrent_unit(gru, x, h):
    """The equations of Cho et al. (2014), as PyTorch documents them, for one step of one row."""
    parts = [(gru.weight_ih_l0 @ x + gru.bias_ih_l0).chunk(3)]
    parts += [(gru.weight_hh_l0 @ h + gru.bias_hh_l0).chunk(3)]
    (r_x, z_x, n_x), (r_h, z_h, n_h) = parts
    reset, update = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    new = torch.tanh(n_x + reset * n_h)
    return (1 - update) * new + update * h


@pytest.mark.parametrize("lengths", [[4, 1, 7, 2], [1, 1, 1], [5]])
def test_stretches_are_what_a_loop_over_their_steps_gives(lengths):
    torch.manual_seed(0)
    module = Memory(3, UNITS)
    torch.nn.init.normal_(module.gru.bias_ih_l0)
    features = torch.randn(sum(lengths), 3, requires_grad=True)
    start = torch.randn(len(lengths), UNITS)
    after = module(features, start, torch.tensor(lengths))
    expected, step = [], 0
    for stretch, length in enumerate(lengths):
        h = start[stretch]
        for _ in range(length):
            h = gated_recurrent_unit(module.gru, features[step], h)
            expected.append(h)
            step += 1
    torch.testing.assert_close(after, torch.stack(expected))
    weight = torch.randn_like(after)
    ours, theirs = (
        torch.autograd.grad((weight * out).sum(), [features, *module.parameters()])
        for out in (after, torch.stack(expected))
    )
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


class Acting:
    """An agent in noise whose episodes last four steps on average; some steps are lost with their worker."""

    def __init__(self, agent, space, action_space, seed=0):
        self.agent, self.space, self.rng = agent, space, np.random.default_rng(seed)
        self.rollout = Rollout(
            space, action_space, length=STEPS, num_envs=ENVS, frame_stack=2, extras=agent.extras,
            log=lambda _: None,
        )  # fmt: skip
        self.seen, self.state = self.stacks(np.ones(ENVS, bool)), None
        self.rollout.start(self.seen)

    def stacks(self, fresh, before=None):
        """Draw the next observations: pictures move up by one in their stacks, or fill fresh ones."""
        state = self.rng.normal(size=(ENVS, 4)).astype(np.float32)
        frame = self.rng.integers(0, 256, (ENVS, 3, 24, 24), np.uint8)
        old = frame if before is None or self.space is STATE else self.pixels(before)[:, 3:]
        pixels = np.concatenate([np.where(fresh[:, None, None, None], frame, old), frame], 1)
        if isinstance(self.space, gym.spaces.Dict):
            return {"pixels": pixels, "state": state}
        return state if self.space is STATE else pixels

    def pixels(self, seen):
        return seen["pixels"] if isinstance(seen, dict) else seen

    def collect(self, can_lose=False):
        """Fill a rollout that begins in mid-episode, and return its experience."""
        self.rollout.clear()
        none = np.zeros(ENVS, bool)
        while not self.rollout.is_full:
            action, self.state, extras = self.agent.act(
                as_observation(self.seen, self.agent.device), self.state, explore=True
            )
            terminated, truncated = self.rng.random((2, ENVS)) < 0.12
            lost = (self.rng.random(ENVS) < 0.15) if can_lose else none
            begins = terminated | truncated | lost
            final = self.stacks(none, self.seen)
            fresh = self.stacks(np.ones(ENVS, bool))
            self.seen = {
                name: np.where(begins.reshape(-1, *[1] * (new.ndim - 1)), new, going_on)
                for (name, new), going_on in zip(
                    as_arrays(fresh).items(), as_arrays(final).values(), strict=True
                )
            }
            self.seen = self.seen if isinstance(fresh, dict) else self.seen[""]
            self.rollout.add(
                action, self.rng.normal(size=ENVS), terminated, truncated, self.seen, final, lost, extras
            )  # fmt: skip
            self.state = self.agent.reset_state(self.state, begins)
        return self.rollout.experience()


def as_arrays(observation):
    return observation if isinstance(observation, dict) else {"": observation}


@pytest.mark.parametrize("space", [PIXELS, STATE, BOTH])
@pytest.mark.parametrize("action_space", [CONTINUOUS, DISCRETE])
def test_the_ratio_is_one_at_the_first_inner_step_in_mid_episode_too(space, action_space):
    agent = PPO(space, action_space, TINY, num_envs=ENVS)
    acting = Acting(agent, space, action_space)
    for _ in range(3):
        metrics = agent.update(acting.collect(can_lose=True))
        assert metrics["ratio/first_deviation"] < 1e-5
        assert metrics["ratio/largest_deviation"] > 1e-4
        assert all(value.isfinite() and value.ndim == 0 for value in metrics.values())


@pytest.mark.parametrize("space", [PIXELS, STATE])
def test_minibatches_are_what_a_loop_with_resets_gives_from_the_stored_memories(space):
    """With other weights than those that acted, so that only a chunk's first memory can come from the store."""
    agent = PPO(space, CONTINUOUS, TINY, num_envs=ENVS)
    acting = Acting(agent, space, CONTINUOUS)
    acting.collect()
    experience = acting.collect(can_lose=True)
    other = PPO(space, CONTINUOUS, TINY, num_envs=ENVS, seed=1).network
    begins = torch.zeros(STEPS, ENVS, dtype=torch.bool)
    begins[1:] = (experience.terminated | experience.truncated | ~experience.kept)[:-1]
    expected = {}
    with torch.no_grad():
        for env in range(ENVS):
            for step in range(STEPS):
                if not experience.kept[step, env]:
                    continue
                number = torch.tensor([step * ENVS + env])
                if begins[step, env]:
                    memory = torch.zeros(1, UNITS)
                elif step % 4 == 0:
                    memory = experience.extras["memory"][step, env][None]
                seen = {k: v for k, v in experience.observation(number).items() if k != "lengths"}
                features, memory = other.perceive(other.normalize(seen | {"memory": memory}))
                policy, value = other.decide(features)
                action = experience.action[step, env][None]
                expected[number.item()] = (policy.log_prob(action).item(), value.item())
        minibatches = list(agent.minibatches(experience))
        assert sorted(torch.cat(minibatches).tolist()) == sorted(expected)
        for index in minibatches:
            policy, value = other(experience.observation(index))
            log_prob = policy.log_prob(experience.action.flatten(0, 1)[index])
            ours = torch.stack([log_prob, value], 1)
            torch.testing.assert_close(ours, torch.tensor([expected[i] for i in index.tolist()]))
    assert begins.any()
    assert len(expected) < STEPS * ENVS


def test_gradients_reach_back_through_a_chunk_and_no_farther():
    agent = PPO(STATE, CONTINUOUS, dataclasses.replace(TINY, normalize_observation=False))
    rollout = Rollout(
        STATE, CONTINUOUS, length=12, num_envs=1, extras=agent.extras, log=lambda _: None
    )
    seen, state = torch.randn(13, 1, 4), None
    rollout.start(seen[0].numpy())
    for step in range(12):
        action, state, extras = agent.act({"state": seen[step]}, state, explore=True)
        ends = np.array([step == 5])
        final = seen[step + 1].numpy()
        rollout.add(action, [0.0], ends, ~ends & False, final, final, extras=extras)
        state = agent.reset_state(state, ends)
    experience = rollout.experience()
    (index,) = experience.sequences(100, 12, np.random.default_rng(0))
    observation = experience.observation(index)
    observation["state"].requires_grad_()
    assert observation["lengths"].tolist() == [6, 6]
    value = agent.network(observation)[1]
    (gradient,) = torch.autograd.grad(value[9], observation["state"])
    assert gradient.abs().sum(1).gt(0).tolist() == [False] * 6 + [True] * 4 + [False] * 2
    sizes = [len(part) for part in experience.sequences(1, 4, np.random.default_rng(0))]
    assert sizes == [4, 4, 4], "a chunk at least"


def test_what_follows_is_valued_with_the_memory_at_that_point():
    agent = PPO(STATE, CONTINUOUS, TINY, num_envs=ENVS)
    acting = Acting(agent, STATE, CONTINUOUS)
    experience = acting.collect(can_lose=True)
    value = experience.extras["value"]
    following = experience.next_values(value, agent._values)
    checked = 0
    for step in range(STEPS):
        for env in range(ENVS):
            cut = experience.truncated[step, env] or step == STEPS - 1
            if experience.terminated[step, env] or not cut or not experience.kept[step, env]:
                continue
            number = torch.tensor([step * ENVS + env])
            memory = experience.extras["memory"][step, env][None]
            both = [agent.network.normalize(experience.observation(number)) | {"memory": memory}]
            with torch.no_grad():
                after = agent.network.perceive(both[0])[1]
                seen = {"state": experience.next_observation(number)["state"], "memory": after}
                expected = agent.network(seen)[1]
                forgetful = agent.network({"state": seen["state"]})[1]
            torch.testing.assert_close(following[step, env], expected[0])
            assert not torch.allclose(forgetful, expected)
            checked += 1
    assert checked > ENVS


def test_new_episodes_in_mid_rollout_cut_off_those_before():
    """As when a run goes on whose environments' states were not kept."""
    agent = PPO(STATE, CONTINUOUS, TINY, num_envs=ENVS)
    rollout = Rollout(
        STATE, CONTINUOUS, length=4, num_envs=ENVS, extras=agent.extras, log=lambda _: None
    )
    seen, never = np.zeros((ENVS, 4), np.float32), np.zeros(ENVS, bool)
    rollout.start(seen)
    for step in range(4):
        action, _, extras = agent.act({"state": torch.from_numpy(seen)}, explore=True)
        seen = np.full((ENVS, 4), step + 1, np.float32)
        rollout.add(action, np.zeros(ENVS), never, never, seen, extras=extras)
        if step == 1:
            rollout.start(np.full((ENVS, 4), 9, np.float32))
    experience = rollout.experience()
    assert experience.truncated.tolist() == [[False] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert experience.next_observation(torch.tensor([3]))["state"][0, 0] == 2
    assert experience.observation(torch.tensor([6]))["state"][0, 0] == 9
    (index,) = experience.sequences(100, 4, np.random.default_rng(0))
    assert experience.observation(index)["lengths"].tolist() == [2] * 6


class Lossy(gym.vector.VectorWrapper):
    """Loses some steps, as when a worker dies."""

    def step_async(self, action):
        self.env.step_async(action)

    def step_wait(self):
        *step, info = self.env.step_wait()
        self.count = getattr(self, "count", 0) + 1
        info["dropped"] = np.array([self.count % 7 == 3, self.count % 11 == 5])
        return *step, info


def test_the_loop_forgets_exactly_where_an_episode_begins(tmp_path):
    space = envs.make_vec("toy/catch", 2, observation="state", seed=0)
    vector = Lossy(space)
    spaces = vector.single_observation_space, vector.single_action_space
    config = dataclasses.replace(TINY, rollout_length=40)
    agent = PPO(*spaces, config, num_envs=2)
    rollout = Rollout(*spaces, length=40, num_envs=2, extras=agent.extras, log=lambda _: None)
    taken = []
    agent.update = lambda experience: taken.append(experience) or {}

    class Kept:
        def save(self, *_):
            pass

    settings = LoopSettings(steps=160, exact_resume=False, eval_every=0)
    OnPolicyLoop(
        agent, vector, rollout, settings, logger=Logger(tmp_path), checkpoints=Kept(),
        action_repeat=1, seed=0,
    ).run()  # fmt: skip
    vector.close()
    assert len(taken) == 2
    before, carried = None, 0
    for experience in taken:
        memory, after = experience.extras["memory"], experience.extras["next_memory"]
        ended = experience.terminated | experience.truncated
        for step in range(40):
            for env in range(2):
                if not experience.kept[step, env]:
                    continue
                if step == 0:
                    known = before is not None and before[1][env]
                    fresh, last = before is None or before[2][env], before and before[0][env]
                else:
                    known = experience.kept[step - 1, env]
                    fresh, last = ended[step - 1, env] or not known, after[step - 1, env]
                if fresh or not known:
                    assert (memory[step, env] == 0).all()
                else:
                    assert torch.equal(memory[step, env], last)
                    carried += 1
        before = after[-1], experience.kept[-1], ended[-1]
    assert carried > 80


def test_an_evaluation_remembers_within_each_episode_alone():
    """Several environments whose episodes end at different times, against each episode played from its start."""
    agent = PPO(
        gym.spaces.Box(-1, 1, (3,), np.float32), DISCRETE,
        dataclasses.replace(TINY, normalize_observation=False),
    )  # fmt: skip
    for parameter in agent.network.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    policy = Policy(agent, {}, "", {})
    vector = envs.make_vec("toy/catch", 3, observation="state", seed=0)
    episodes, steps = [[], [], []], []

    def act(observation):
        action = policy.act(observation)
        steps.append((np.array(observation), action))
        return action

    def begin(begins):
        policy.begin(begins)
        for env in np.flatnonzero(begins):
            episodes[env].append(len(steps))

    run_episodes(act, vector, 9, seed=0, begin=begin)
    vector.close()
    assert len({tuple(starts) for starts in episodes}) == 3, "they do not end together"
    differs = 0
    for env, starts in enumerate(episodes):
        for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
            state = None
            for observation, action in steps[start:end]:
                seen = torch.from_numpy(observation[env : env + 1])
                alone, state, _ = agent.act({"state": seen}, state, explore=False)
                assert alone[0] == action[env]
                differs += alone[0] != agent.act({"state": seen}, explore=False)[0][0]
    assert differs > 0, "the memory matters"


def test_a_policy_refuses_observations_of_other_episodes_than_it_remembers():
    agent = PPO(STATE, CONTINUOUS, TINY)
    policy = Policy(agent, {}, "", {})
    policy.act(np.zeros((2, 4), np.float32))
    with pytest.raises(UserError, match=r"3 observations .* remembers 2 episodes.*begin\(\)"):
        policy.act(np.zeros((3, 4), np.float32))
    policy.begin()
    assert policy.act(np.ones(4, np.float32)).shape == (2,)
    first = policy.state
    policy.act(np.ones(4, np.float32))
    assert not torch.equal(policy.state, first)


def test_it_cannot_be_exported_into_a_function_of_one_observation():
    with pytest.raises(UserError, match="has a memory"):
        PPO(STATE, CONTINUOUS, TINY).greedy()


def test_it_needs_room_and_a_length():
    assert "gru" not in str(
        PPO(STATE, CONTINUOUS, dataclasses.replace(TINY, memory_size=0)).network
    )
    for name, value in (("memory_size", -1), ("sequence_length", 0), ("memory_size", math.nan)):
        with pytest.raises(UserError, match=name):
            dataclasses.replace(TINY, **{name: value})
