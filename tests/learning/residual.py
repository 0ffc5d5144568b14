"""Act on top of a policy that aims beside the target of toy/reach, and learn the rest in seconds."""

import dataclasses

import numpy as np
import torch

import envs
from agents.core.agent import as_observation
from agents.core.base_policy import BasePolicy, BaseStream
from agents.core.mixing import Mixture, add_episode
from agents.core.replay import Replay
from agents.off_policy.residual import BASE_ACTION, with_base_action
from agents.registry import AGENTS
from envs.toy_experts import scripted_expert
from tests.agents.helpers import small_agent
from wrappers.vector import BaseActions, SuccessReward

CPU = torch.device("cpu")
ASIDE = (0.25, -0.2)
"""How far the base aims beside the target: success is within 0.15 of it."""
CHUNK = 2
SMALL = {
    "hidden": (64, 64), "batch_size": 64, "discount": 0.9, "critics": 5, "residual_scale": 0.3,
    "random_residual": 0.3, "noise": 0.1, "critic_only_updates": 100, "actor_every": 1,
    "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "critic_tau": 0.02,
}  # fmt: skip
RANDOM_STEPS = 200


def wrong_base(seed=0, steps=300):
    """Return a base of chunks that imitates, from states, somebody who aims aside."""
    vector = envs.make_vec("toy/reach", 1, observation="state", action_chunk=CHUNK)
    space, action_space = vector.single_observation_space, vector.single_action_space
    vector.close()
    config, learning = AGENTS["bc"].configs
    config = dataclasses.replace(config, horizon=CHUNK, width=64, blocks=1)
    agent = AGENTS["bc"].build(space, action_space, config, learning, seed=seed)
    policy = agent.policy
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        state = 1.8 * torch.rand(256, 4, generator=generator) - 0.9
        chunk = (state[:, None, 2:] + torch.tensor(ASIDE)).expand(-1, CHUNK, -1).clamp(-1, 1)
        loss = policy.loss({"state": state}, chunk, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    agent.average.module.load_state_dict(policy.state_dict())  # what acts
    return BasePolicy(agent, space, action_space)


def demonstrations(base, episodes, seed=0):
    """Return a replay of the expert's episodes, paid by success, with what the base would do in them."""
    env = envs.make("toy/reach", observation="state", seed=seed)
    space, expert = (
        with_base_action(env.observation_space, env.action_space),
        scripted_expert("reach"),
    )
    replay = Replay(
        space, env.action_space, capacity=30 * episodes, num_envs=1, seed=seed, log=lambda _: None
    )
    for _ in range(episodes):
        seen, actions, rewards = [env.reset()[0]], [], []
        for _ in range(25):
            actions.append(expert(seen[-1]))
            observation, _, _, _, info = env.step(actions[-1])
            seen.append(observation)
            rewards.append(info["success"])
        stream = BaseStream(base, seed)
        own = np.concatenate([stream.act(row[None]) for row in seen])
        add_episode(
            replay, {"state": np.stack(seen), BASE_ACTION: own}, np.stack(actions),
            np.array(rewards), False,
        )  # fmt: skip
    return replay


def train(base, *, steps, seed=0, success=False, shown=0, **changes):
    """Train resfit from states; return the agent.

    Args:
        base: acts below it.
        steps: of one environment; behind the first 200 each brings an update.
        seed: of everything.
        success: the reward is success, otherwise the task's own.
        shown: episodes of the expert in half of each batch.
        **changes: fields of the config.
    """
    view = BaseActions(
        envs.make_vec("toy/reach", 1, observation="state", seed=seed),
        BaseStream(base, seed),
        with_base_action(*_spaces()),
        name=BASE_ACTION,
        lone="state",
    )
    vector = SuccessReward(view) if success else view
    agent = small_agent("resfit", view.single_observation_space, seed=seed, **(SMALL | changes))
    agent.take_base(base)
    replay = Replay(
        view.single_observation_space, view.single_action_space, capacity=2 * steps, num_envs=1,
        seed=seed, log=lambda _: None,
    )  # fmt: skip
    mixture = Mixture(demonstrations(base, shown, seed), 0.5, "") if shown else None
    random, settings = np.random.default_rng(seed), agent.replay_settings
    rule = {"n_step": settings.n_step, "discount": settings.discount}
    seen, _ = vector.reset(seed=seed)
    replay.start(seen)
    for step in range(steps):
        if step < RANDOM_STEPS:
            bound = agent.config.random_residual
            action = np.clip(seen[BASE_ACTION] + random.uniform(-bound, bound, (1, 2)), -1, 1)
        else:
            action = agent.act(as_observation(seen, CPU), explore=True)[0]
        seen, reward, terminated, truncated, info = vector.step(action.astype(np.float32))
        replay.add(action, reward, terminated, truncated, seen, info.get("final_obs"))
        if step >= RANDOM_STEPS:
            draw = replay.sample if mixture is None else mixture.sample
            first = () if mixture is None else (replay,)
            agent.update(draw(*first, settings.batch_size, **rule))
    vector.close()
    return agent


def score(actor, episodes=30):
    """Return the mean return, and the share of episodes that end on the target, of an agent or of a base alone."""
    vector = envs.make_vec("toy/reach", episodes, observation="state")
    seen, _ = vector.reset(seed=1234)
    stream, state, total = (
        BaseStream(actor, 0) if isinstance(actor, BasePolicy) else None,
        None,
        0.0,
    )
    for _ in range(25):
        if stream is None:
            action, state, _ = actor.act(as_observation(seen, CPU), state, explore=False)
        else:
            action = stream.act(seen)
        seen, reward, _, _, info = vector.step(action)
        total += reward.mean()
    vector.close()
    return float(total), float(np.mean(info["final_info"]["success"]))


def _spaces():
    vector = envs.make_vec("toy/reach", 1, observation="state")
    vector.close()
    return vector.single_observation_space, vector.single_action_space
