"""Train an on-policy agent on a small task in seconds, whole or broken on purpose, and score it."""

import dataclasses

import numpy as np
import torch

import envs
from agents.core.agent import as_observation
from agents.core.fields import step_fields
from agents.core.rollout import TEACHER_ACTION, Rollout
from agents.on_policy.ppo import PPO, PPOConfig

CPU = torch.device("cpu")
SMALL = PPOConfig(
    rollout_length=64, minibatch_size=64, epochs=6, learning_rate=1e-3, discount=0.9, encoder="small",
    feature_dim=32, initial_log_std=-0.5, max_gradient_norm=0.5,
)  # fmt: skip


def train(
    task, *, steps, seed=0, num_envs=8, observation="state", shuffle_rewards=False, size=24,
    limits_are_ends=False, episode_length=None, teacher=None, build=PPO, base=SMALL, **changes,
):  # fmt: skip
    """Train an agent for `steps` steps of all environments together; returns agent and metrics of each update.

    Args:
        task: an id.
        steps: in all.
        seed: of everything.
        num_envs: environments.
        observation: pixels or state.
        shuffle_rewards: learn from rewards of other moments.
        size: of the pictures.
        episode_length: steps until a time limit; None is the task's own.
        limits_are_ends: take time limits for terminations, as many implementations do.
        build: the agent's class.
        base: its config.
        teacher: from observations to what a teacher would do.
        **changes: fields of the config.
    """
    config = dataclasses.replace(base, **changes)
    vector = envs.make_vec(
        task, num_envs, size=size, seed=seed, observation=observation, episode_length=episode_length
    )
    spaces = vector.single_observation_space, vector.single_action_space
    agent = build(*spaces, config, num_envs=num_envs, seed=seed)
    rollout = Rollout(
        *spaces,
        length=config.rollout_length,
        num_envs=num_envs,
        extras=dict(agent.extras)
        | ({TEACHER_ACTION: step_fields(spaces[1])["action"]} if teacher else {}),
        log=lambda _: None,
    )
    random = np.random.default_rng(seed)
    seen, _ = vector.reset(seed=seed)
    rollout.start(seen)
    past = [0.0]
    metrics = []
    state = None
    for _ in range(steps // num_envs):
        action, state, extras = agent.act(as_observation(seen, CPU), state, explore=True)
        if teacher:
            extras[TEACHER_ACTION] = teacher(seen)
        space = vector.action_space
        done = np.clip(action, space.low, space.high) if hasattr(space, "low") else action
        seen, reward, terminated, truncated, info = vector.step(done)
        state = agent.reset_state(state, terminated | truncated)
        past += reward.tolist()
        if shuffle_rewards:
            reward = np.array([past[random.integers(len(past))] for _ in reward])
        if limits_are_ends:
            terminated, truncated = terminated | truncated, np.zeros_like(truncated)
        rollout.add(
            action, reward, terminated, truncated, seen, info.get("final_obs"), extras=extras
        )
        if rollout.is_full:
            metrics.append({k: v.item() for k, v in agent.update(rollout.experience()).items()})
            rollout.clear()
    vector.close()
    return agent, metrics


def score(
    agent, task, *, observation="state", episodes=30, size=24, seed=1234, forgets=False
):  # fmt: skip
    """Return the mean greedy return of episodes from fixed states; who `forgets` loses the memory at every step."""
    vector = envs.make_vec(task, episodes, size=size, observation=observation)
    seen, _ = vector.reset(seed=seed)
    total, running = np.zeros(episodes), np.ones(episodes, bool)
    state = None
    while running.any():
        state = None if forgets else state
        action, state, _ = agent.act(as_observation(seen, CPU), state, explore=False)
        seen, reward, terminated, truncated, _ = vector.step(action)
        total += reward * running
        running &= ~(terminated | truncated)
    vector.close()
    return float(total.mean())
