"""Spaces, small rollouts and a small config for tests of on-policy agents."""

import gymnasium as gym
import numpy as np

from agents.core.agent import as_observation
from agents.core.rollout import Rollout
from agents.on_policy.ppo import PPOConfig

ENVS, STEPS = 3, 16
PIXELS = gym.spaces.Box(0, 255, (6, 24, 24), np.uint8)
STATE = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
BOTH = gym.spaces.Dict({"pixels": PIXELS, "state": STATE})
CONTINUOUS, DISCRETE = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(3)
CHUNK = gym.spaces.Box(-1, 1, (4, 2), np.float32)
TINY = PPOConfig(
    rollout_length=STEPS, minibatch_size=12, epochs=2, hidden=(16,), feature_dim=8, encoder="small",
    normalize_observation=True, scale_reward=True, value_regularization=0.1,
)  # fmt: skip


def draw(space, rng):
    if isinstance(space, gym.spaces.Dict):
        return {name: draw(part, rng) for name, part in space.spaces.items()}
    if space.dtype == np.uint8:
        frame = rng.integers(0, 256, (ENVS, 3, *space.shape[1:]), np.uint8)
        return np.concatenate([frame, frame], axis=1)
    return (rng.normal(size=(ENVS, *space.shape)) * 5 + 3).astype(np.float32)


def collect(agent, space, action_space, seed=0):
    """Let an agent act in noise whose episodes last one step, and return its rollout."""
    rng = np.random.default_rng(seed)
    rollout = Rollout(
        space, action_space, length=agent.config.rollout_length, num_envs=ENVS, frame_stack=2,
        extras=agent.extras, device=agent.device, log=lambda _: None,
    )  # fmt: skip
    seen = draw(space, rng)
    rollout.start(seen)
    while not rollout.is_full:
        action, _, extras = agent.act(as_observation(seen, agent.device), explore=True)
        reward = rng.normal(size=ENVS)
        terminated = rng.random(ENVS) < 0.5
        final, seen = draw(space, rng), draw(space, rng)
        if isinstance(final, dict):
            final = {
                k: np.concatenate([p[:, 3:], p[:, :3]], 1) if p.ndim == 4 else p
                for k, p in final.items()
            }
        kept = {name: value.cpu() for name, value in extras.items()}
        rollout.add(action, reward, terminated, ~terminated, seen, final, extras=kept)
    return rollout
