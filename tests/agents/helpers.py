"""Small spaces, batches and agents for the agents' tests."""

import gymnasium as gym
import numpy as np
import torch

from agents import AGENTS, make_agent
from agents.core.replay import Batch

SIZE = 24
PIXELS = gym.spaces.Box(0, 255, (9, SIZE, SIZE), np.uint8)
STATE = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
BOTH = gym.spaces.Dict({"pixels": PIXELS, "state": STATE})
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)

SMALL = {
    "encoder": "small",
    "feature_dim": 8,
    "hidden": (16, 16),
    "batch_size": 8,
    "precision": "fp32",
    "decoder_channels": (4, 4),
}


def small_agent(name, space=PIXELS, seed=0, device="cpu", **changes):
    """Build an agent with tiny networks."""
    import dataclasses

    values = {**SMALL, **changes}
    configs = [
        dataclasses.replace(
            config,
            **{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values},
        )
        for config in AGENTS[name].configs
    ]
    return make_agent(name, space, ACTION, configs=configs, seed=seed, device=device)


def observation(space=PIXELS, batch=8, seed=0):
    """Draw a batch of observations as agents get them."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    if space is not STATE:
        parts["pixels"] = torch.randint(
            0, 256, (batch, 9, SIZE, SIZE), dtype=torch.uint8, generator=generator
        )
    if space is not PIXELS:
        parts["state"] = torch.randn(batch, 5, generator=generator)
    return parts


def transitions(space=PIXELS, batch=8, seed=0):
    """Draw a batch of transitions."""
    generator = torch.Generator().manual_seed(seed + 1)
    return Batch(
        observation=observation(space, batch, seed),
        action=torch.rand(batch, 2, generator=generator) * 2 - 1,
        reward=torch.rand(batch, generator=generator),
        discount=torch.full((batch,), 0.99),
        next_observation=observation(space, batch, seed + 2),
        ids=torch.arange(batch),
        extras={},
    )


def pixel_agents():
    """Names of all off-policy agents that stand alone; residual ones have tests of their own."""
    return sorted(
        name
        for name, spec in AGENTS.items()
        if not spec.on_policy and not spec.offline and not spec.needs_base
    )
