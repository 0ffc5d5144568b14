"""What the scripts set beside agent and task: parallelism, and presets that fit a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import envs
from agents.baselines import BASELINE
from agents.core.errors import UserError
from agents.core.loops import LoopSettings, OffPolicySettings
from agents.core.offline import OfflineSettings
from agents.core.settings import from_dict
from agents.registry import find


@dataclass(frozen=True)
class VectorSettings:
    """How many environments, and where they run."""

    num_envs: int = 1
    """Parallel environments."""
    workers: int = 0
    """Worker processes for them; 0 steps them in the learner's process. Results do not depend on it."""
    timeout: float = 60.0
    """Seconds until a silent worker is replaced."""

    def __post_init__(self) -> None:
        """Reject values that no vector environment can run with."""
        if self.num_envs < 1 or self.workers < 0 or self.timeout <= 0:
            raise UserError(
                f"num_envs is {self.num_envs}, workers {self.workers}, timeout {self.timeout}; "
                "give at least 1, at least 0, more than 0"
            )


def loop_settings(agent: str) -> LoopSettings:
    """Return the default settings of the loop that trains an agent."""
    if agent.startswith(BASELINE):  # no agents of ours, but they train as ours do on-policy
        return LoopSettings()
    spec = find(agent)
    if spec.settings is not None:
        return spec.settings
    if spec.offline:
        return OfflineSettings()
    return LoopSettings() if spec.on_policy else OffPolicySettings()


def read_loop(config: Mapping[str, Any]) -> LoopSettings:
    """Return the loop settings that a run's config.json holds.

    Raises:
        UserError: a value with which no loop can run.
    """
    own = {k: v for k, v in config["train"].items() if k not in ("num_envs", "seed")}
    return from_dict(type(loop_settings(config["agent"])), own)


PRESETS: dict[str, dict[str, Any]] = {
    # Published settings: 84 pixels, the benchmark's encoder, 1024 units.
    "gpu": {},
    # Two cores: an update of SGQN takes tens of milliseconds instead of seconds.
    "cpu": {
        "size": 48,
        "encoder": "small",
        "hidden": (256, 256),
        "feature_dim": 50,
        "batch_size": 128,
        "supersample": 4,
        # An agent step takes a twentieth of an update's time, so four of them come to one update: with one, encoders
        # learn the few pictures by heart. DrQ after 5,000 updates on cartpole-swingup, seed 4: 747 and 193.
        "num_envs": 4,
        "updates_per_step": 0.25,
        # Three steps of reward, values of the size that fresh networks have, and DrQ-v2's horizon learn faster: 799
        # after 5,500 updates, without scale and horizon 503.
        "n_step": 3,
        "reward_scale": 0.1,
        "initial_temperature": 0.01,
        "actor_every": 1,
        "target_every": 1,
        "decoder_channels": (32, 16),
        "width": 256,
        "replay_capacity": 100_000,
        "steps": 40_000,
        "random_steps": 2_000,
        "eval_every": 5_000,
        "checkpoint_every": 5_000,
        "log_every": 500,
        "noise_steps": 16_000,
    },
    # Half a minute from start to report, to see that everything works.
    "debug": {
        "size": 32,
        "encoder": "small",
        "hidden": (64, 64),
        "feature_dim": 20,
        "batch_size": 16,
        "decoder_channels": (8, 8),
        "width": 32,
        "denoising_steps": 2,
        "replay_capacity": 5_000,
        "steps": 400,
        "random_steps": 100,
        "eval_every": 200,
        "eval_episodes": 1,
        "checkpoint_every": 200,
        "log_every": 100,
    },
}
"""Values that replace the defaults of the fields they name, in whichever config has them."""

OF_AN_AGENT: dict[str, dict[str, dict[str, Any]]] = {
    # The published step size is for 300,000 updates of the actor, of which this preset has a thirtieth.
    "cpu": {"resfit": {"actor_learning_rate": 1e-4, "critic_learning_rate": 3e-4, "critic_only_updates": 500}},
    "debug": {"resfit": {"actor_learning_rate": 1e-4, "critic_only_updates": 20}},
}  # fmt: skip
"""Values of presets for one agent alone, which go before the others."""

DISCOUNTS = {"cpu": 0.995}
"""Discounts per control step: DrQ-v2's .99 at its action repeat of 2; .96 at 8."""


OF_A_PAPER: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    # Bertoin et al. 2022, table 3 (arXiv:2209.09203); the agent's default is that of the other tasks.
    "dmc-gb": {"sgqn": {"cartpole": {"quantile": 0.98}, "ball_in_cup": {"quantile": 0.98}}},
}
"""What the paper of an agent sets for a domain under its protocol; flags go before it."""


def find_preset(name: str, device: str, agent: str = "") -> dict[str, Any]:
    """Return a preset's values for an agent; `auto` is `gpu` on CUDA devices and `cpu` elsewhere."""
    name = _resolve(name, device)
    return PRESETS[name] | OF_AN_AGENT.get(name, {}).get(agent, {})


def control_steps(env: Mapping[str, Any]) -> int:
    """Return the control steps of an agent step, of settings that an environment or config.json has."""
    return int(env["action_repeat"]) * int(env.get("action_chunk", 1))  # older runs have no chunks


def preset_discount(name: str, device: str, action_repeat: int) -> dict[str, float]:
    """Return the discount per agent step of a preset that fixes it per control step, cut to two digits."""
    per_control_step = DISCOUNTS.get(_resolve(name, device))
    if per_control_step is None:
        return {}
    return {"discount": math.floor(100 * per_control_step**action_repeat) / 100}


def _resolve(name: str, device: str) -> str:
    if name == "auto":
        name = "gpu" if device.startswith("cuda") else "cpu"
    if name not in PRESETS:
        raise UserError.unknown("preset", name, ["auto", *PRESETS])
    return name


def protocol_values(name: str | None, env: str) -> dict[str, Any]:
    """Return what a literature's protocol fixes, as field values; those of the task it checks itself.

    Numbers that are compared with published ones need the published pixels, so the quality is `reference`.
    """
    if name is None:
        return {}
    spec = envs.get_spec(env)
    protocol = envs.get_protocol(name, spec)
    return {
        "protocol": name,
        "size": protocol.size,
        "frame_stack": protocol.frame_stack,
        "action_repeat": protocol.action_repeat_of(spec),
        "camera": protocol.camera_of(spec),
        "quality": "reference",
        "supersample": 1,
        "encoder": protocol.encoder,
        "updates_per_step": protocol.updates_per_step,
        "batch_size": protocol.batch_size,
        "episode_length": spec.episode_length,
    }


def paper_values(protocol: str | None, agent: str, env: str) -> dict[str, Any]:
    """Return what an agent's paper sets for a task under a literature's protocol, as field values."""
    by_domain = OF_A_PAPER.get(protocol or "", {}).get(agent, {})
    return by_domain.get(envs.get_spec(env).domain, {}) if by_domain else {}


def check_device(device: str) -> str:
    """Resolve `auto` and reject devices that are not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("the agents were never tried there")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{device}' is not available here; use cpu, cuda or cuda:N"
        ) from error
    return device
