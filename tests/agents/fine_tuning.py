"""Small agents that fine-tune, and rollouts of theirs."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agents import AGENTS, make_agent
from agents.core.agent import as_observation
from agents.core.rollout import Rollout
from agents.generative_policies.fine_tuning import FineTuner

ENVS, STEPS = 3, 16
STATE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
PIXELS = gym.spaces.Box(0, 255, (6, 24, 24), np.uint8)
BOTH = gym.spaces.Dict({"pixels": PIXELS, "state": STATE})
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
CHUNK = gym.spaces.Box(-1, 1, (4, 2), np.float32)
SMALL = {
    "horizon": 4, "width": 16, "blocks": 1, "time_features": 8, "feature_dim": 8, "encoder": "small",
    "denoising_steps": 4, "hidden": (16,), "rollout_length": STEPS, "minibatch_size": 12, "epochs": 2,
    "fine_tuned_steps": 3, "draws": 5, "learning_rate": 1e-3,
}  # fmt: skip
NAMES = sorted(name for name, spec in AGENTS.items() if spec.fine_tunes)


def make(
    name: str,
    space: gym.Space = STATE,
    action: gym.Space = CHUNK,
    *,
    seed: int = 1,
    device: str = "cpu",
    **changes: Any,
) -> Any:
    """Build an agent with tiny networks."""
    values = {**SMALL, **changes}
    configs = [
        dataclasses.replace(
            config,
            **{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values},
        )
        for config in AGENTS[name].configs
    ]
    agent = make_agent(
        name, space, action, configs=configs, seed=seed, device=device, num_envs=ENVS
    )
    assert isinstance(agent, FineTuner)
    return agent


def draw(space: gym.Space, random: np.random.Generator) -> Any:
    """Return an observation of every environment."""
    if isinstance(space, gym.spaces.Dict):
        return {name: draw(part, random) for name, part in space.spaces.items()}
    assert space.shape is not None
    if space.dtype == np.uint8:
        frame = random.integers(0, 256, (ENVS, 3, *space.shape[1:]), np.uint8)
        return np.concatenate([frame, frame], axis=1)
    return random.normal(size=(ENVS, *space.shape)).astype(np.float32) * 3 + 1


def collect(
    agent: FineTuner, space: gym.Space = STATE, action: gym.Space = CHUNK, seed: int = 0
) -> Rollout:
    """Let an agent act in noise whose episodes last one step, and return its rollout."""
    random = np.random.default_rng(seed)
    rollout = Rollout(
        space, action, length=agent.rollout_length, num_envs=ENVS, frame_stack=2,
        extras=agent.extras, device=agent.device, log=lambda _: None,
    )  # fmt: skip
    seen = draw(space, random)
    rollout.start(seen)
    while not rollout.is_full:
        done, _, extras = agent.act(as_observation(seen, agent.device), explore=True)
        ended = random.random(ENVS) < 0.5
        final, seen = draw(space, random), draw(space, random)
        if isinstance(final, dict):
            final["pixels"] = np.concatenate(
                [final["pixels"][:, 3:], final["pixels"][:, :3]], axis=1
            )
        kept = {name: value.cpu() for name, value in extras.items()}
        rollout.add(done, random.normal(size=ENVS), ended, ~ended, seen, final, extras=kept)
    return rollout


def remembered(
    agent: FineTuner, count: int = 5, seed: int = 3
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return states, and what the agent remembers of chunks that it drew in them."""
    generator = torch.Generator().manual_seed(seed)
    seen = {"state": torch.randn(count, 3, generator=generator)}
    extras = agent.act(seen, explore=True)[2]
    return seen, {name: value.clone() for name, value in extras.items()}


def move(module: torch.nn.Module, size: float = 0.05, seed: int = 0) -> None:
    """Change weights a little, so that a policy is no longer the one that acted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
