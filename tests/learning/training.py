"""Train an agent on a toy task in seconds, whole or broken on purpose, and score it."""

import dataclasses

import numpy as np
import torch

import envs
from agents import AGENTS, make_agent
from agents.core.agent import as_observation
from agents.core.overlays import OverlayImages
from agents.core.replay import Replay

CPU = torch.device("cpu")
SMALL = {
    "encoder": "small",
    "feature_dim": 32,
    "hidden": (64, 64),
    "batch_size": 32,
    "decoder_channels": (8, 8),
    "discount": 0.9,
    "n_step": 1,
    "critic_tau": 0.02,
    "actor_every": 1,
    "target_every": 1,
    "actor_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
    "precision": "fp32",
}
RANDOM_STEPS = 200


def train(
    name, *, steps, seed=0, num_envs=1, observation="pixels", shuffle_rewards=False, **changes
):
    """Train on toy/reach without distraction; returns the agent.

    Args:
        name: an agent.
        steps: steps of all environments together; once these have taken 200 among them, each brings an update.
        seed: of everything.
        num_envs: environments.
        observation: pixels or state.
        shuffle_rewards: store rewards of other moments: nothing can be learned from them.
        **changes: config fields.
    """
    values = {**SMALL, "noise_steps": steps // 2, **changes}
    configs = [
        dataclasses.replace(
            config,
            **{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values},
        )
        for config in AGENTS[name].configs
    ]
    vector = envs.make_vec("toy/reach", num_envs, size=24, seed=seed, observation=observation)
    spaces = vector.single_observation_space, vector.single_action_space
    agent = make_agent(name, *spaces, configs=configs, seed=seed)
    replay = Replay(*spaces, capacity=8000, num_envs=num_envs, seed=seed, log=lambda line: None)
    random = np.random.default_rng(seed)
    settings = agent.replay_settings
    seen, _ = vector.reset(seed=seed)
    replay.start(seen)
    rewards = [0.0]
    for step in range(steps):
        agent.set_progress(step)
        begun = step * num_envs >= RANDOM_STEPS
        if not begun:
            action = random.uniform(-1, 1, (num_envs, *spaces[1].shape)).astype(np.float32)
        else:
            action = agent.act(as_observation(seen, CPU), explore=True)[0]
        seen, reward, terminated, truncated, info = vector.step(action)
        rewards += reward.tolist()
        if shuffle_rewards:
            reward = np.array([rewards[random.integers(len(rewards))] for _ in reward])
        replay.add(action, reward, terminated, truncated, seen, info.get("final_obs"))
        if begun:
            batch = replay.sample(
                settings.batch_size, n_step=settings.n_step, discount=settings.discount
            )
            agent.update(batch)
    vector.close()
    return agent


def score(agent, *, veil=0.0, distraction=None, observation="pixels", episodes=30):
    """Return the mean greedy return over episodes that start in fixed states.

    Args:
        agent: who acts.
        veil: opacity of an image that lies over each episode's pictures; training has never seen it.
        distraction: what the test split of it shows, in every episode anew.
        observation: pixels or state.
        episodes: how many.
    """
    task = {"size": 24, "observation": observation, "distraction": distraction, "split": "test"}
    vector = envs.make_vec("toy/reach", episodes, **task)
    seen, _ = vector.reset(seed=1234)
    images = _veils(episodes) if veil else None
    total = np.zeros(episodes)
    for _ in range(25):
        now = as_observation(seen, CPU)
        if images is not None:
            frames = now["pixels"].unflatten(1, (-1, 3)).float()
            now["pixels"] = frames.lerp(images, veil).round().to(torch.uint8).flatten(1, 2)
        action = agent.act(now, explore=False)[0]
        seen, reward, *_ = vector.step(action)
        total += reward
    vector.close()
    return float(total.mean())


def _veils(count):
    """Draw images from a bank of another seed than any agent's, float32 [count, 1, 3, 24, 24]."""
    bank = OverlayImages(None, size=30, seed=10**6)
    generator = torch.Generator().manual_seed(5)
    return bank.sample(count, (24, 24), generator, CPU)[:, None].float()
