"""Speed of the learner: replay, updates, and Stable-Baselines3 as the peer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import envs
from agents import make_agent
from agents.core.agent import Agent, as_observation
from agents.core.precision import resolve_precision
from agents.core.replay import Batch, Replay
from agents.registry import find
from envs.environment import gymnasium_id
from experiments.measuring.timing import Table, interleave, rates
from experiments.running.arguments import fill
from experiments.running.settings import find_preset

BATCH = 128
AGENTS = ("sac", "drq", "drqv2", "svea", "sgqn", "drqv2-sgqn")
COMPARED = (("sgqn", "drq"), ("drqv2-sgqn", "drqv2"), ("sgqn", "drqv2"))
"""SGQN's agents and the same base without it; at last SGQN and the agent that it is usually compared with."""
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "channels_last": False},
    "fp32 NHWC": {"precision": "fp32", "channels_last": True},
    "bf16 NHWC": {"precision": "bf16", "channels_last": True},
}


def replay(seconds: float, steps: int = 4000, size: int = 84) -> list[Table]:
    """Compare memory and batches with a list of stacks and with Stable-Baselines3's buffer."""
    from stable_baselines3.common.buffers import ReplayBuffer

    observation = gym.spaces.Box(0, 255, (9, size, size), np.uint8)
    action = gym.spaces.Box(-1, 1, (6,), np.float32)
    ours = Replay(observation, action, capacity=steps + 1, num_envs=1, log=lambda line: None)
    theirs = ReplayBuffer(steps, observation, action, "cpu")
    stacks = _fill(ours, theirs, observation, action, steps)

    def listed() -> tuple[torch.Tensor, ...]:
        columns = zip(*random.choices(stacks, k=BATCH), strict=True)
        return tuple(torch.from_numpy(np.stack(column)) for column in columns)

    pair_bytes = 2 * BATCH * 9 * size * size
    source = np.ones(8 * pair_bytes, np.uint8)
    target = np.ones(pair_bytes, np.uint8)
    parts = iter(lambda: random.randrange(7) * pair_bytes, None)

    def copied() -> None:
        start = next(parts)
        np.copyto(target, source[start : start + pair_bytes])

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.sample(BATCH),
        "list of stacks": listed,
        "Stable-Baselines3": lambda: theirs.sample(BATCH),
        "copying the bytes": copied,
    }
    measured = rates(calls, seconds, per_call=BATCH)
    frame = 3 * size * size
    taken = {
        "ours": ours.nbytes / (steps + 1),
        "list of stacks": 3.0 * frame,
        "Stable-Baselines3": (theirs.observations.nbytes + theirs.next_observations.nbytes) / steps,
    }
    table = Table(
        f"Replay: {steps:,} steps of (9, {size}, {size}), batches of {BATCH} pairs",
        ["replay", "bytes per step", "bytes / frame's own", "samples/s", "ours / it"],
        "The list holds every stack once and shares it between a step's observation and the one before's next one. "
        "Copying as many bytes from one stretch of memory to another is the floor.",
    )
    for name, rate in measured.items():
        memory = [taken[name], taken[name] / frame] if name in taken else ["", ""]
        table.rows.append([name, *memory, rate, measured["ours"] / rate])
    return [table]


def _fill(
    ours: Replay, theirs: Any, space: gym.spaces.Box, actions: gym.spaces.Box, steps: int
) -> list[tuple[Any, ...]]:
    """Give the same random episodes of 250 steps to all three, and return the list of stacks."""
    rng = np.random.default_rng(0)
    draw = rng.integers(0, 256, (64, 3, *space.shape[1:]), np.uint8)
    stacks: list[tuple[Any, ...]] = []
    seen = np.tile(draw[0], (3, 1, 1))
    ours.start(seen[None])
    for step in range(steps):
        action = rng.uniform(-1, 1, actions.shape).astype(np.float32)
        reward, ends = np.float32(rng.random()), step % 250 == 249
        after = np.concatenate([seen[3:], draw[step % 64]])
        following = np.tile(draw[step % 64], (3, 1, 1)) if ends else after
        ends_now = np.array([ends])
        ours.add(
            action[None],
            [reward],
            [False],
            ends_now,
            following[None],
            after[None] if ends else None,
        )
        theirs.add(seen[None], after[None], action[None], np.array([reward]), ends_now, [{}])
        stacks.append((seen, action, reward, after, np.float32(0)))
        seen = following
    return stacks


def updates(seconds: float, device: str = "cpu", agents: Sequence[str] = AGENTS) -> list[Table]:
    """Compare updates per second of agents and number formats at the device's preset."""
    preset = find_preset("auto", device)
    size, batch_size = preset.get("size", 84), preset.get("batch_size", BATCH)
    space = gym.spaces.Box(0, 255, (9, size, size), np.uint8)
    batch = random_batch(space, batch_size, device)
    settings = dict(SETTINGS)
    if resolve_precision("auto", torch.device(device)) != "bf16":
        del settings["bf16 NHWC"]
    made = {
        f"{agent}, {name}": _agent(agent, space, preset | {"batch_size": batch_size} | own, device)
        for agent in agents
        for name, own in settings.items()
    }
    calls: dict[str, Callable[[], object]] = {
        name: lambda agent=agent: agent.update(batch)  # type: ignore[misc]
        for name, agent in made.items()
    }
    wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    times = interleave(calls, seconds * len(agents), finish=wait)
    chosen = list(settings)[-1]
    speed = _matmul_flops(seconds / 4, device, bf16=chosen.startswith("bf16"))
    table = Table(
        f"Updates: updates/s on {device}, {size} x {size}, batch {batch_size}, {torch.get_num_threads()} threads",
        ["agent", *settings, f"{chosen} / fp32", f"floor of {chosen}", "of the floor"],
        f"The floor is what an update's convolutions and matrix products would take at the {speed / 1e9:,.0f} GFLOP/s "
        "that a product of 2048 x 2048 matrices reaches here.",
    )
    ratios = Table("What an update with SGQN takes, over one without", ["agent", "over", *settings])
    for agent in agents:
        own = [1 / times[f"{agent}, {name}"] for name in settings]
        floor = speed / _flops(made[f"{agent}, {chosen}"], batch)
        table.rows.append([agent, *own, own[-1] / own[0], floor, own[-1] / floor])
    for agent, base in COMPARED:
        if agent in agents and base in agents:
            costs = [times[f"{agent}, {name}"] / times[f"{base}, {name}"] for name in settings]
            ratios.rows.append([agent, base, *costs])
    return [table, ratios] if ratios.rows else [table]


def random_batch(space: gym.spaces.Box, batch_size: int, device: str) -> Batch:
    """Return transitions of noise, actions of length 1."""
    rng = np.random.default_rng(0)

    def pixels() -> dict[str, torch.Tensor]:
        drawn = rng.integers(0, 256, (batch_size, *space.shape), np.uint8)
        return {"pixels": torch.from_numpy(drawn).to(device)}

    action = torch.linspace(-1, 1, batch_size, device=device)[:, None]
    reward, ids = action[:, 0].clone(), torch.arange(batch_size)
    return Batch(pixels(), action, reward, torch.full_like(reward, 0.99), pixels(), ids, {})


def _agent(name: str, space: gym.spaces.Box, values: dict[str, Any], device: str) -> Agent:
    action = gym.spaces.Box(-1, 1, (1,), np.float32)
    configs = [fill(config, values) for config in find(name).configs]
    return make_agent(name, space, action, configs=configs, device=device)


def _nothing() -> None:
    """A CPU has finished when its call returns."""


def _flops(agent: Agent, batch: Batch) -> float:
    """Return operations per update, over two: some parts are due every second one."""
    with _FlopCounter() as counter:
        agent.update(batch)
        agent.update(batch)
    return counter.total / 2


class _FlopCounter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, which fails where gradients of inputs are asked for."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


def _matmul_flops(seconds: float, device: str, *, bf16: bool) -> float:
    a, b = torch.ones(2, 2048, 2048, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    return 2 * 2048**3 / interleave({"product": lambda: a @ b}, seconds, finish=wait)["product"]


def peer(seconds: float, task: str = "dmc/cartpole-swingup", size: int = 48) -> list[Table]:
    """Compare our SAC with Stable-Baselines3's and its CnnPolicy: gradient steps, and whole training steps."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    settings: dict[str, Any] = {"size": size, "seed": 0}
    batch_size = find_preset("cpu", "cpu")["batch_size"]
    theirs_env = gym.make(gymnasium_id(task), **settings)
    theirs = SAC(
        "CnnPolicy", theirs_env, buffer_size=2000, batch_size=batch_size, learning_starts=16, seed=0
    )

    theirs.set_logger(Logger(folder=None, output_formats=[]))  # its own makes a folder in each call

    def learn(steps: int = 1) -> None:
        theirs.learn(steps, reset_num_timesteps=False, log_interval=None)  # type: ignore[arg-type]

    with closing(theirs_env), closing(envs.make_vec(task, 1, **settings)) as vector:
        ours = _Trainer(vector, batch_size)
        for _ in range(20):
            ours.step()
        learn(20)
        calls: dict[str, Callable[[], object]] = {
            "our gradient": ours.update,
            "their gradient": lambda: theirs.train(gradient_steps=1, batch_size=batch_size),
            "our step": ours.step,
            "their step": lambda: learn(8),
        }
        measured = rates(calls, 4 * seconds)
        measured["their step"] *= 8
    table = Table(
        f"Stable-Baselines3's SAC on {task}, {size} x {size}, batch {batch_size}",
        ["", "Sightline sac", "Stable-Baselines3", "Sightline / Stable-Baselines3"],
        "A training step is one agent step, stored, and one gradient step. Ours: the networks of the CPU preset. "
        "Theirs: CnnPolicy (NatureCNN), defaults.",
    )
    for row, name in (("gradient steps/s", "gradient"), ("training steps/s", "step")):
        mine, other = measured[f"our {name}"], measured[f"their {name}"]
        table.rows.append([row, mine, other, mine / other])
    return [table]


class _Trainer:
    """What one step of the training loop does, without logs and checkpoints."""

    def __init__(self, vector: Any, batch_size: int) -> None:
        self.vector = vector
        space, action = vector.single_observation_space, vector.single_action_space
        values = find_preset("cpu", "cpu") | {"batch_size": batch_size}
        configs = [fill(config, values) for config in find("sac").configs]
        self.agent = make_agent("sac", space, action, configs=configs)
        self.replay = Replay(space, action, capacity=2000, num_envs=1, log=lambda line: None)
        self.observation, _ = vector.reset()
        self.replay.start(self.observation)
        self.batch_size = batch_size

    def update(self) -> None:
        """Take one gradient step."""
        self.agent.update(self.replay.sample(self.batch_size))

    def step(self) -> None:
        """Take one agent step and one gradient step."""
        seen = as_observation(self.observation, torch.device("cpu"))
        action, _, _ = self.agent.act(seen, explore=True)
        self.vector.step_async(action)
        if len(self.replay) > 1:
            self.update()
        self.observation, reward, terminated, truncated, info = self.vector.step_wait()
        ends = (terminated, truncated)
        self.replay.add(action, reward, *ends, self.observation, info.get("final_obs"))
