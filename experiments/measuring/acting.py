"""Time of a chunk of actions: samplers and steps, against diffusers' schedulers and LeRobot's diffusion policy.

One policy of each size draws all chunks, whatever it has learned: a sampler's time does not depend on the weights. A
peer's loop asks the same network as often and puts a scheduler of diffusers in the place of our sampler; it is timed
with torch's own convolutions, as its users have it, and with ours (`agents.core.packed_convolutions`). LeRobot lives
in an environment of its own (`experiments.measuring.lerobot_policy`): it asks for other versions of torch.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

from agents.core.chain_steps import Limits
from agents.core.errors import UserError
from agents.core.noise_paths import DiscreteVP, RectifiedFlow
from agents.core.packed_convolutions import packed
from agents.core.sampling import Sampler
from agents.core.step_rules import Euler, Heun, Posterior
from agents.generative_policies.parts import DenoisingConfig
from agents.generative_policies.policy import DenoisingPolicy
from experiments.measuring import lerobot_policy
from experiments.measuring.lerobot_policy import ACTION, EXECUTED, HORIZON, STATE, TRAIN_STEPS
from experiments.measuring.timing import Cell, Elsewhere, Table, interleave

Name = Literal["DDPM", "DDIM", "Euler", "Heun"]

PEER = "LeRobot"


@dataclass(frozen=True)
class Compared:
    """A network, and how its chunks are drawn."""

    name: str
    policy: DenoisingConfig
    samplers: tuple[tuple[Name, int], ...]
    """With their steps; chains of 100 steps take ten times as long as those of 10."""


COMPARED = (
    Compared(
        "U-Net 512, 1024, 2048",  # LeRobot's default, Diffusion Policy's from pixels
        DenoisingConfig(
            horizon=HORIZON, denoiser="unet", channels=(512, 1024, 2048), time_features=128
        ),
        (("DDPM", 4), ("DDIM", 4)),
    ),
    Compared(
        "U-Net 256, 512, 1024",  # Diffusion Policy's from states
        DenoisingConfig(
            horizon=HORIZON, denoiser="unet", channels=(256, 512, 1024), time_features=128
        ),
        (("DDPM", 10), ("DDIM", 10), ("Euler", 10), ("Heun", 5)),
    ),
    Compared(
        "MLP 256",  # the CPU preset of experiments.imitate
        DenoisingConfig(horizon=HORIZON, denoiser="mlp", width=256),
        (("DDPM", 10), ("DDIM", 10), ("DDIM", 4), ("Euler", 10), ("Euler", 4), ("Heun", 5)),
    ),
)


@dataclass(frozen=True)
class _Case:
    """A policy and what it sees."""

    policy: DenoisingPolicy
    observation: dict[str, torch.Tensor]
    generator: torch.Generator

    def ours(self, name: Name, steps: int) -> Callable[[], np.ndarray]:
        """Return what draws a chunk as the policy does."""
        if name in ("Euler", "Heun"):
            path, rule = RectifiedFlow(), Euler() if name == "Euler" else Heun()
            sampler = Sampler(path, "velocity", rule, path.times(steps))
        else:
            levels = DiscreteVP(TRAIN_STEPS)
            eta = Posterior(1.0 if name == "DDPM" else 0.0)
            sampler = Sampler(levels, "noise", eta, levels.times(steps), Limits(x0=1.0))

        def call() -> np.ndarray:
            with torch.no_grad():
                chunk = self.policy.sample(self.observation, self.generator, sampler=sampler)
            return chunk[:, :EXECUTED].cpu().numpy()

        return call

    def theirs(self, name: Name, steps: int, *, fast: bool) -> Callable[[], np.ndarray]:
        """Return what draws a chunk by a scheduler of diffusers, with our convolutions or torch's own."""
        scheduler = _scheduler(name)

        def call() -> np.ndarray:
            with torch.no_grad(), packed() if fast else nullcontext():
                condition = self.policy.condition(self.observation)
                x = torch.randn(
                    1, *self.policy.shape, generator=self.generator, device=condition.device
                )
                scheduler.set_timesteps(steps)
                for t in scheduler.timesteps:
                    time = torch.full(
                        (1,), float(t) / scheduler.config.num_train_timesteps, device=x.device
                    )
                    x = scheduler.step(self.policy.denoiser(x, time, condition), t, x).prev_sample
            return x[:, :EXECUTED].clamp(-1, 1).cpu().numpy()

        return call


def _scheduler(name: Name) -> Any:
    """Return diffusers' scheduler of a sampler."""
    import diffusers

    if name == "Euler":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "Heun":
        return diffusers.FlowMatchHeunDiscreteScheduler()
    kind = diffusers.DDPMScheduler if name == "DDPM" else diffusers.DDIMScheduler
    return kind(
        num_train_timesteps=TRAIN_STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True
    )


def _case(config: DenoisingConfig, device: str) -> _Case:
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
    actions = gym.spaces.Box(-1, 1, (EXECUTED, ACTION), np.float32)
    policy = DenoisingPolicy({"state": space}, actions, config).to(device)
    return _Case(
        policy.requires_grad_(False),
        {"state": torch.zeros(1, STATE, device=device)},
        torch.Generator(device).manual_seed(0),
    )


def acting(
    seconds: float,
    device: str = "cpu",
    peer_python: Path | None = None,
    compared: Sequence[Compared] = COMPARED,
) -> list[Table]:
    """Compare samplers of policies of some sizes; of U-Nets with LeRobot's, where its Python is given.

    Raises:
        UserError: diffusers is not installed, or the other Python has no LeRobot.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "samplers are compared with diffusers, which is not installed: python -m pip install --constraint "
            "constraints.txt diffusers"
        ) from error
    table = Table(
        f"Acting: ms for a chunk of {EXECUTED} actions (of {HORIZON} predicted) on {device}, "
        f"{torch.get_num_threads()} threads",
        ["network: sampler, steps", "ours", "ours, an action", "diffusers", "diffusers, our convolutions", PEER,
         "ours / diffusers", f"ours / {PEER}"],
    )  # fmt: skip
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    told = f"{PEER} was not measured: --peer-python names a Python that has it"
    if peer_python is not None:
        told = f"{versions(peer_python)}, with its defaults but for the steps"
    for network in compared:
        case = _case(network.policy, device)
        with _peer(peer_python, network, device) as peer:
            for name, steps in network.samplers:
                calls: dict[str, Callable[[], object]] = {
                    "ours": case.ours(name, steps),
                    "diffusers": case.theirs(name, steps, fast=False),
                    "diffusers, fast": case.theirs(name, steps, fast=True),
                }
                if f"{name}-{steps}" in peer:
                    calls[PEER] = peer[f"{name}-{steps}"]
                times = interleave(calls, seconds, finish=wait)
                table.rows.append(_row(f"{network.name}: {name}, {steps} steps", times))
    table.note = (
        f"One observation of {STATE} numbers, float32. The columns of diffusers {diffusers.__version__} are its "
        "schedulers in a loop over the same network, with torch's own convolutions and with those that we act with. "
        f"{told}."
    )
    return [table]


def versions(python: Path) -> str:
    """Return which LeRobot another Python has.

    Raises:
        UserError: none.
    """
    command = [str(python), "-W", "ignore", "-m", lerobot_policy.__name__, "versions"]
    try:
        said = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(f"--peer-python {python} cannot be run: {error.strerror}") from error
    if said.returncode:
        (*_, reason) = said.stderr.strip().splitlines() or ["it says nothing"]
        raise UserError(
            f"--peer-python {python} cannot import LeRobot's diffusion policy ({reason}); install lerobot there"
        )
    return said.stdout.strip()


@contextmanager
def _peer(
    python: Path | None, network: Compared, device: str
) -> Iterator[Mapping[str, Callable[[], object]]]:
    """Give what LeRobot's process draws while it is needed; nothing without its Python, or of a network it has not."""
    theirs = sorted({steps for name, steps in network.samplers if name in lerobot_policy.SAMPLERS})
    if python is None or network.policy.denoiser != "unet" or not theirs:
        yield {}
        return
    arguments = (
        "serve", ",".join(map(str, network.policy.channels)), ",".join(map(str, theirs)), device,
        str(torch.get_num_threads()),
    )  # fmt: skip
    with closing(
        Elsewhere(lerobot_policy.__name__, *arguments, python=python, environment=_environment())
    ) as peer:
        yield peer.calls


def _environment() -> dict[str, str]:
    """Return what another Python runs with: of our packages the code, none of those that we have installed."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def _row(name: str, times: dict[str, float]) -> list[Cell]:
    """Return a line of the table, of seconds."""
    ms = {who: 1000 * second for who, second in times.items()}
    ours, peer = ms["ours"], ms.get(PEER)
    return [
        name, ours, ours / EXECUTED, ms["diffusers"], ms["diffusers, fast"],
        "" if peer is None else peer, ours / ms["diffusers"], "" if peer is None else ours / peer,
    ]  # fmt: skip
