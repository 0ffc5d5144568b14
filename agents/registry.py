"""AGENTS: what each name on the command line means.

An agent is a class and its config dataclasses. SVEA and SGQN are methods on a critic: a name here pairs one with a
base, and any other pair is one line more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import torch

from agents.core.agent import Agent
from agents.core.errors import UserError
from agents.core.loops import LoopSettings, OffPolicySettings
from agents.core.training import TrainingLoop
from agents.core.vines import VineLoop
from agents.generative_policies.dppo import DPPO, DPPOConfig
from agents.generative_policies.fpo import FPO, FPO_PLUS_PLUS, FPOConfig
from agents.generative_policies.gaussian import GaussianConfig
from agents.generative_policies.gaussian_ppo import GaussianPPO, GaussianPPOConfig
from agents.generative_policies.imitation import (
    ACTING,
    DIFFUSION_POLICY,
    DenoisingImitationConfig,
    LearningConfig,
    behavior_cloning,
    denoising_imitation,
)
from agents.generative_policies.policy import DenoisingConfig
from agents.generative_policies.reinflow import ReinFlow, ReinFlowConfig
from agents.off_policy.critic_methods import MethodConfig
from agents.off_policy.ddpg import DDPG, DDPGConfig
from agents.off_policy.residual import ResFiT, ResFiTConfig, ResidualLoop
from agents.off_policy.sac import SAC, SACConfig
from agents.off_policy.sgqn import SGQNConfig
from agents.off_policy.svea import SVEAConfig
from agents.on_policy.polychromic import PolychromicConfig, PolychromicPPO
from agents.on_policy.ppo import A2C, PPO, REINFORCE, PPOConfig
from agents.on_policy.rebel import REBEL, REBELConfig
from agents.on_policy.trpo import TRPO, TRPOConfig
from agents.on_policy.vmpo import VMPO, VMPOConfig


@dataclass(frozen=True)
class AgentSpec:
    """How to build one agent.

    Attributes:
        build: called as build(observation_space, action_space, *configs, device=..., seed=...).
        configs: the config dataclasses with this agent's defaults, in the order `build` takes them.
        summary: one line for `--help`.
        on_policy: it is an `OnPolicyAgent`, learns from rollouts, and `build` also takes num_envs=.
        loop: what trains it; None is the loop of its kind.
        offline: it is an `OfflineAgent` and learns from demonstrations.
        acting: fields of the configs that only say how it acts, which evaluations may change.
        fine_tunes: it is a `FineTuner`, whose second config says what its policy is made of, and can begin with the
            policy of another run.
        unused: fields of that config which the algorithm has no use for; commands refuse their flags.
        needs_base: it is a `ResFiT`, which acts on top of another run's policy, and may learn from demonstrations, too.
        settings: its loop's defaults; None is those of its kind.
    """

    build: Callable[..., Agent]
    configs: tuple[Any, ...]
    summary: str
    on_policy: bool = False
    loop: type[TrainingLoop] | None = None
    offline: bool = False
    acting: tuple[str, ...] = ()
    fine_tunes: bool = False
    unused: tuple[str, ...] = ()
    needs_base: bool = False
    settings: LoopSettings | None = None


def _actor_critic(base: type) -> Callable[..., Agent]:
    def build(
        observation_space: gym.Space,
        action_space: gym.Space,
        config: Any,
        method: MethodConfig,
        **keywords: Any,
    ) -> Agent:
        return base(observation_space, action_space, config, method=method, **keywords)

    return build


_sac, _ddpg = _actor_critic(SAC), _actor_critic(DDPG)
_plain = MethodConfig()

_DIFFUSION = DenoisingConfig(
    horizon=4, path="diffusion", train_steps=20, prediction="x0", rule="posterior",
    denoising_steps=20, clip_x0=1.0, blocks=1, time_features=16,
)  # fmt: skip
"""What DPPO fine-tunes from states, but for its prediction: without a base, noise says nothing of x0 where a clip to
[-1, 1] takes all gradient. On toy/reach from scratch: 21.1 with x0, 11.6 with noise, 12.7 at random."""
_FLOW = DenoisingConfig(horizon=4, blocks=1)
"""Rectified flow in ten Euler steps."""
_INPAINTING = ("inpaint_until",)
"""What says how chunks are inpainted, which none that is fine-tuned is."""
_DRAWING = tuple(name for name in ACTING if not name.startswith("inpaint"))

AGENTS: dict[str, AgentSpec] = {
    "sac": AgentSpec(_sac, (SACConfig(augmentation="none"), _plain), "soft actor-critic"),
    "drq": AgentSpec(_sac, (SACConfig(), _plain), "SAC with random shifts"),
    "rad": AgentSpec(_sac, (SACConfig(augmentation="crop"), _plain), "SAC with random crops"),
    "svea": AgentSpec(_sac, (SACConfig(), SVEAConfig()), "SVEA on SAC"),
    "sgqn": AgentSpec(_sac, (SACConfig(), SGQNConfig()), "SGQN on SAC"),
    "ddpg": AgentSpec(
        _ddpg, (DDPGConfig(augmentation="none"), _plain), "DrQ-v2 without its augmentation"
    ),
    "drqv2": AgentSpec(_ddpg, (DDPGConfig(), _plain), "DrQ-v2"),
    "drqv2-svea": AgentSpec(_ddpg, (DDPGConfig(), SVEAConfig()), "SVEA on DrQ-v2"),
    "drqv2-sgqn": AgentSpec(_ddpg, (DDPGConfig(), SGQNConfig()), "SGQN on DrQ-v2"),
    "resfit": AgentSpec(
        _actor_critic(ResFiT),
        (ResFiTConfig(), _plain),
        "ResFiT: a small correction of a frozen policy's actions",
        loop=ResidualLoop,
        needs_base=True,
        settings=OffPolicySettings(
            steps=300_000, random_steps=10_000, updates_per_step=4.0, replay_capacity=300_000
        ),
    ),
    "ppo": AgentSpec(PPO, (PPOConfig(),), "proximal policy optimization", on_policy=True),
    "a2c": AgentSpec(
        PPO, (A2C,), "advantage actor-critic: PPO without a clip, one pass", on_policy=True
    ),
    "reinforce": AgentSpec(
        PPO, (REINFORCE,), "Monte Carlo policy gradient: one step a rollout", on_policy=True
    ),
    "spo": AgentSpec(
        PPO, (PPOConfig(surrogate="spo"),), "simple policy optimization", on_policy=True
    ),
    "lpo": AgentSpec(
        PPO,
        (PPOConfig(surrogate="learned_drift"),),
        "learnt policy optimization: PPO with a drift that evolution found",
        on_policy=True,
    ),
    "trpo": AgentSpec(TRPO, (TRPOConfig(),), "trust region policy optimization", on_policy=True),
    "vmpo": AgentSpec(
        VMPO, (VMPOConfig(),), "on-policy MPO: imitate the better half", on_policy=True
    ),
    "rebel": AgentSpec(
        REBEL, (REBELConfig(),), "regression of relative advantages", on_policy=True
    ),
    "pg-rainbow": AgentSpec(
        PPO,
        (PPOConfig(critic="distilled"),),
        "PPO with PG-Rainbow's quantile critic",
        on_policy=True,
    ),
    "polychromic": AgentSpec(
        PolychromicPPO, (PolychromicConfig(),), "PPO on sets of trajectories that succeed and differ",
        on_policy=True, loop=VineLoop,
    ),
    "diffusion-policy": AgentSpec(
        denoising_imitation,
        (DIFFUSION_POLICY, LearningConfig()),
        "Diffusion Policy, from demonstrations",
        offline=True,
        acting=ACTING,
    ),
    "flow-policy": AgentSpec(
        denoising_imitation,
        (DenoisingImitationConfig(), LearningConfig()),
        "chunks of actions by rectified flow, from demonstrations",
        offline=True,
        acting=ACTING,
    ),
    "bc": AgentSpec(
        behavior_cloning,
        (GaussianConfig(), LearningConfig()),
        "Gaussian behavior cloning, from demonstrations",
        offline=True,
    ),
    "dppo": AgentSpec(
        DPPO,
        (DPPOConfig(), _DIFFUSION),
        "DPPO: PPO on the denoising steps of a diffusion policy",
        on_policy=True,
        acting=_DRAWING,
        fine_tunes=True,
        unused=_INPAINTING,
    ),
    "fpo": AgentSpec(
        FPO,
        (FPOConfig(), _FLOW),
        "FPO: PPO on a flow's losses",
        on_policy=True,
        acting=_DRAWING,
        fine_tunes=True,
        unused=_INPAINTING,
    ),
    "fpo++": AgentSpec(
        FPO,
        (FPO_PLUS_PLUS, replace(_FLOW, start_noise=0.0)),
        "FPO++: a ratio of every loss, no noise in evaluations",
        on_policy=True,
        acting=_DRAWING,
        fine_tunes=True,
        unused=_INPAINTING,
    ),
    "gaussian-ppo": AgentSpec(
        GaussianPPO,
        (GaussianPPOConfig(), replace(_FLOW, start_noise=0.0)),
        "PPO on a Gaussian around what a denoising policy draws from zero noise",
        on_policy=True,
        acting=("denoising_steps", "clip_x0"),
        fine_tunes=True,
        unused=("rule", "noise_level", "min_std", "start_noise", *_INPAINTING),  # its chain has no noise
    ),
    "reinflow": AgentSpec(
        ReinFlow,
        (ReinFlowConfig(), replace(_FLOW, denoising_steps=4)),
        "ReinFlow: PPO on a flow with learned noise",
        on_policy=True,
        acting=("denoising_steps", "start_noise", "clip_x0"),
        fine_tunes=True,
        unused=("rule", "noise_level", "min_std", *_INPAINTING),  # Euler's steps, and noise that is learned
    ),
}  # fmt: skip


def register(name: str, spec: AgentSpec) -> None:
    """Add an agent; scripts find it under `--agent name`.

    Raises:
        UserError: the name is taken.
    """
    if name in AGENTS:
        raise UserError(f"an agent named '{name}' exists; choose another name")
    AGENTS[name] = spec


def find(name: str) -> AgentSpec:
    """Return the agent of that name, or raise a UserError that offers the nearest ones."""
    if name not in AGENTS:
        raise UserError.unknown("agent", name, AGENTS)
    return AGENTS[name]


def make_agent(
    name: str,
    observation_space: gym.Space,
    action_space: gym.Space,
    *,
    configs: Sequence[Any] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    num_envs: int = 1,
) -> Agent:
    """Build an agent for an environment's (single) spaces.

    Args:
        name: a key of `AGENTS`.
        observation_space: uint8 pixels (3*k, H, W), a float vector, or a Dict of both.
        action_space: Box(-1, 1); on-policy agents take Discrete too.
        configs: replaces the spec's configs, same types in the same order.
        device: where networks live.
        seed: of weights, exploration and augmentation.
        num_envs: environments that act side by side, for on-policy agents.
    """
    spec = find(name)
    own = {"num_envs": num_envs} if spec.on_policy else {}
    return spec.build(
        observation_space, action_space, *(configs or spec.configs), device=device, seed=seed, **own
    )
