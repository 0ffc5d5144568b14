"""Speed of compiled updates against the same updates as they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agents import make_agent
from agents.core.agent import Agent
from agents.core.replay import Batch
from agents.on_policy.actor_critic import Samples
from agents.on_policy.ppo import PPO
from agents.registry import find
from experiments.measuring.timing import Table, interleave
from experiments.running.arguments import fill
from experiments.running.settings import find_preset

CASES = ("drqv2 pixels", "sgqn pixels", "sac state", "ppo pixels", "ppo state")
"""Agents, and what they see."""
SIZE, STATE, ACTION = 84, 24, 6
"""Pixels of a side where the device's preset says nothing; walker's numbers of a state and an action."""


def compiled(
    seconds: float, device: str = "cpu", cases: Sequence[str] = CASES, *, backend: str = "inductor"
) -> list[Table]:
    """Compare updates per second of agents as they are and compiled, at the device's preset."""
    table = Table(
        f"Compiled updates: updates/s on {device}, the device's preset, {torch.get_num_threads()} threads",
        ["agent", "eager", "compiled", "compiled / eager", "seconds to compile"],
        "An update of PPO is a gradient step on a minibatch. Compiling takes that long where the user's cache has "
        "nothing of it yet.",
    )
    wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    for case in cases:
        name, seen = case.split()
        agents = {kind: _agent(name, seen, device) for kind in ("eager", "compiled")}
        agents["compiled"].compile(backend=backend)
        calls = {kind: _update(agent, seen, device) for kind, agent in agents.items()}
        start = time.perf_counter()
        for _ in range(2):  # what is due every second time, too
            calls["compiled"]()
        wait()
        taken = time.perf_counter() - start
        times = interleave(calls, seconds, finish=wait)
        row = [1 / times["eager"], 1 / times["compiled"], times["eager"] / times["compiled"], taken]
        table.rows.append([f"{name}, {seen}", *row])
    return [table]


def _agent(name: str, seen: str, device: str) -> Agent:
    values = find_preset("auto", device)
    size = values.get("size", SIZE)
    space: gym.Space = gym.spaces.Box(0, 255, (9, size, size), np.uint8)
    if seen == "state":
        space = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
    action = gym.spaces.Box(-1, 1, (ACTION,), np.float32)
    configs = [fill(config, values) for config in find(name).configs]
    return make_agent(name, space, action, configs=configs, device=device)


def _update(agent: Agent, seen: str, device: str) -> Callable[[], object]:
    """Return a gradient step on a batch of noise."""
    count, rng = agent.replay_settings.batch_size, np.random.default_rng(0)
    size = find_preset("auto", device).get("size", SIZE)

    def observation() -> dict[str, torch.Tensor]:
        drawn: Any = rng.normal(size=(count, STATE)).astype(np.float32)
        if seen == "pixels":
            drawn = rng.integers(0, 256, (count, 9, size, size), np.uint8)
        return {seen: torch.from_numpy(drawn).to(device)}

    action = torch.from_numpy(rng.uniform(-1, 1, (count, ACTION)).astype(np.float32)).to(device)
    number = action[:, 0].clone()
    if isinstance(agent, PPO):
        minibatch, sample = observation(), Samples(action, number - 7, number, number)
        return lambda: agent.step(minibatch, sample)
    discount, ids = torch.full_like(number, 0.99), torch.arange(count)
    batch = Batch(observation(), action, number, discount, observation(), ids, {})
    return lambda: agent.update(batch)


def _nothing() -> None:
    """A CPU has finished when its call returns."""
