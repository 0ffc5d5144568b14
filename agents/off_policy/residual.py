"""ResFiT: a small correction of every action of a frozen policy (Ankile et al. 2025, https://arxiv.org/abs/2509.19301).

The base, any policy that was trained before, says what it would do; the agent adds a residual of at most s to every
number of the action: a = clip(a_base + s * tanh(mu(features, a_base))). The last layer of mu begins at zero, so that
the agent begins as its base. It learns as TD3 does, from an ensemble of critics, n-step returns and, where there are
any, demonstrations in every batch. What the base does in an observation is part of that observation: the replay
stores it with every row, the last ones of episodes among them, and nothing is asked twice.

Differences from the published code:

- The base's action goes into the critics, too; there it goes into the actor alone. A base that executes chunks does
  not act by what is seen now, so what it does now tells of what it will do next.
- Encoders of this suite with a projection (`encoder`, `feature_dim`) instead of a one-layer vision transformer with
  spatial embeddings; Adam instead of AdamW; gradients are not clipped.
- The loss is the squared error of every critic by itself; there it is the square of their mean absolute error.
- An action at the border of its range passes the gradient on (as in DrQ-v2): cut off there, a residual that has once
  left the range would never come back.
- The updates of the critics alone are taken while the agent acts, not at once after the random steps.
- Rewards are what the environments pay; of tasks that go on after they are solved, the run may ask for success alone.
- Actor and critics are as wide as each other, and every network is made from the agent's own seed.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.core.agent import Agent, Observation
from agents.core.base_policy import BasePolicy
from agents.core.encoders import EncoderName
from agents.core.ensembles import QEnsemble, subset_minimum
from agents.core.errors import UserError
from agents.core.fields import observation_boxes
from agents.core.loops import OffPolicyLoop
from agents.core.networks import ReLU, Trunk, gradient_norm, initialize, polyak_update
from agents.off_policy.actor_critic import ActorCritic, ActorCriticConfig, Critic

BASE_ACTION = "base_action"
"""The part of an observation that says what the base does in it, float32 [B, A]."""


@dataclass(frozen=True)
class ResFiTConfig(ActorCriticConfig):
    """ResFiT; defaults from its code unless a field says otherwise."""

    residual_scale: float = 0.1
    """s, the largest residual in every number of an action, which goes from -1 to 1 (Coffee .2)."""
    noise: float = 0.05
    """Standard deviation of the exploration around the residual's action (some tasks .025)."""
    noise_clip: float = 0.3
    """Bound on the noise of the target's action."""
    random_residual: float = 0.2
    """Largest residual of the uniform ones before learning starts."""
    critics: int = 10
    """Action values in the ensemble; the actor follows their mean."""
    compared: int = 2
    """Critics drawn for every update, the smallest of which is the target's value."""
    critic_only_updates: int = 10_000
    """Updates at the start of which only the critics learn."""
    demonstration_share: float = 0.5
    """Share of every batch that comes from the demonstrations; of no effect without any."""
    encoder: EncoderName = "drqv2"
    """Convolutions over pixels (DrQ-v2; ResFiT has a one-layer vision transformer)."""
    feature_dim: int = 128
    """Length of the projection behind the encoder."""
    batch_size: int = 256
    """Transitions per update, demonstrations among them."""
    n_step: int = 3
    """Steps of reward before bootstrapping (the longer tasks 5)."""
    actor_learning_rate: float = 1e-6
    """Adam step size of the residual's network."""
    critic_learning_rate: float = 1e-4
    """Adam step size of critics and encoder."""
    critic_tau: float = 0.005
    """Rate of the moving averages of critics and actor."""
    encoder_tau: float = 1.0
    """1: the online encoder serves the target critics too."""
    actor_every: int = 4
    """Critic updates per actor update (4 updates and one of the actor for every step)."""
    target_every: int = 1
    """Critic updates per moving average."""

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        super().__post_init__()
        for name in ("noise", "noise_clip", "random_residual", "critic_only_updates"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("residual_scale", "demonstration_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number in [0, 1]")
        if self.demonstration_share and round(self.demonstration_share * self.batch_size) == 0:
            raise UserError(
                f"demonstration_share is {self.demonstration_share}, less than half a transition of a batch of "
                f"{self.batch_size}; give at least {1 / self.batch_size:.2g}, or 0 for none"
            )
        if not 1 <= self.compared <= self.critics:
            raise UserError(
                f"compared is {self.compared} of {self.critics} critics; give at least 1 and at most all"
            )


class ResidualActor(nn.Module):
    """Trunk and MLP with layer normalization to a residual, which is 0 at first.

    Args:
        trunk: of features, the base's action among them.
        action: numbers of an action.
        hidden: widths.
        scale: the largest residual.
    """

    def __init__(self, trunk: Trunk, action: int, hidden: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.trunk, self.scale = trunk, scale
        layers: list[nn.Module] = []
        sizes = [trunk.out_features, *hidden]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), ReLU()]
        self.body = nn.Sequential(*layers).apply(initialize)
        self.last = nn.Linear(sizes[-1], action)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return residuals in [-scale, scale], float32 [B, A]."""
        return self.scale * torch.tanh(self.last(self.body(self.trunk(features))))


def combined(base: Tensor, residual: Tensor) -> Tensor:
    """Return clip(base + residual, -1, 1), with the gradient of the sum."""
    action = base + residual
    return (
        action - action.detach() + action.detach().clamp(-1, 1)
        if action.requires_grad
        else action.clamp(-1, 1)
    )


def actor_loss(values: Tensor) -> Tensor:
    """Return -E[mean over the ensemble], of action values [E, B]."""
    return -values.mean()


def with_base_action(space: gym.Space, action_space: gym.Space) -> gym.spaces.Dict:
    """Return an observation space with the base's action as a further part."""
    assert action_space.shape is not None
    parts: dict[str, gym.Space] = dict(observation_boxes(space))
    return gym.spaces.Dict(parts | {BASE_ACTION: gym.spaces.Box(-1, 1, action_space.shape)})


class ResFiT(ActorCritic):
    """The agent; see the module's docstring.

    Attributes:
        base: the frozen policy; `take_base` gives it. Learning needs none, nor does acting on observations with its
            action in them.
    """

    config: ResFiTConfig
    base: BasePolicy | None = None

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: ResFiTConfig,
        *,
        seed: int = 0,
        **keywords: Any,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
            raise UserError(
                f"a residual corrects single continuous actions, and this task takes {action_space}; leave out "
                "--action-chunk: a base of chunks hands them out one by one"
            )
        parts = observation_boxes(observation_space)
        parts.pop(BASE_ACTION, None)
        # To the networks, the base's action is the end of the state.
        state = action_space.shape[0] + (parts["state"].shape[0] if "state" in parts else 0)
        parts["state"] = gym.spaces.Box(-np.inf, np.inf, (state,))
        super().__init__(gym.spaces.Dict(dict(parts)), action_space, config, seed=seed, **keywords)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        # Not saved: learning acts on actions that its environments' observations hold, evaluations begin anew.
        self.acting = np.random.default_rng(seed)

    def make_critic(self, spaces: dict[str, gym.spaces.Box], *, bf16: bool) -> Critic:
        """Build the critic with its ensemble."""
        values = partial(QEnsemble, members=self.config.critics)
        return Critic(spaces, self.action_dim, self.config, bf16=bf16, values=values)

    def make_actor(self) -> nn.Module:
        """Build the residual's network."""
        critic, config = self.critic, self.config
        trunk = Trunk(critic.pixel_features, critic.state_features, config.feature_dim)
        return ResidualActor(trunk, self.action_dim, config.hidden, config.residual_scale)

    # ------------------------------------------------------------------------------------- the base

    def take_base(self, base: BasePolicy) -> None:
        """Act on top of a policy from now on.

        Raises:
            UserError: its actions have other numbers.
        """
        if base.action != self.action_dim:
            raise UserError(
                f"the base acts by {base.action} numbers, this task takes {self.action_dim}; give a base of this task"
            )
        self.base = base

    def stored_space(self, space: gym.Space, action_space: gym.Space) -> gym.Space:
        """Return what the replay keeps of observations: the base's action, too."""
        return with_base_action(space, action_space)

    def joined(self, observation: Observation) -> dict[str, Tensor]:
        """Return an observation whose state ends with the base's action; one that is so already stays as it is."""
        seen = dict(observation)
        if BASE_ACTION in seen:
            action = seen.pop(BASE_ACTION)
            seen["state"] = torch.cat([seen["state"], action], 1) if "state" in seen else action
        return seen

    def augment(
        self, observation: Observation, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Join, and apply the weak augmentation to the pixels."""
        return super().augment(self.joined(observation), generator)

    # --------------------------------------------------------------------------------------- acting

    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """See `Agent.act`; the state is the base's, None where the observation holds its action.

        Raises:
            UserError: it does not, and there is no base.
        """
        seen = dict(observation)
        if BASE_ACTION not in seen:
            if self.base is None:
                raise UserError(
                    "a residual agent acts on top of a base; give it one with take_base, or load its run with "
                    "Policy.load"
                )
            seen[BASE_ACTION], state = self.base.step(observation, state, self.acting)
        action, _, extras = super().act(self.joined(seen), explore=explore)
        return action, state, extras

    def reset_state(self, state: Any, begins: np.ndarray) -> Any:
        """See `Agent.reset_state`."""
        return None if self.base is None else self.base.reset(state, begins)

    def seed_actions(self, seed: int) -> None:
        """Draw the base's next actions from a fresh stream; see `Agent.seed_actions`."""
        self.acting = np.random.default_rng(seed)

    def policy(self, features: Tensor, *, explore: bool) -> Tensor:
        """Return the corrected actions, with noise when exploring."""
        residual = self.actor(features)
        return combined(self._base_action(features), self._noisy(residual) if explore else residual)

    def greedy(self) -> Any:
        """See `Agent.greedy`.

        Raises:
            UserError: always, half of what acts is the base.
        """
        raise UserError(
            "a residual agent acts on top of a base that plans and remembers, and an exported policy is a function of "
            "the observation alone; use Policy.load"
        )

    # ------------------------------------------------------------------------------------- learning

    def next_value(self, policy_features: Tensor, target_features: Tensor) -> Tensor:
        """Return the smallest of some target critics' values at the target actor's noisy action."""
        residual = self._noisy(self.target_actor(policy_features), self.config.noise_clip)
        values = self.target(
            target_features, combined(self._base_action(policy_features), residual)
        )
        return subset_minimum(values, self.config.compared, self.generator)

    def gradient_sizes(self) -> set[int]:
        """See `Agent.gradient_sizes`."""
        raise UserError("resfit's gradients are not compiled yet; use --compile off")

    def update_actor(self, features: Tensor) -> dict[str, Tensor]:
        """Step the actor and its average, once the critics have learned alone."""
        if self.updates <= self.config.critic_only_updates:
            return {}
        residual = self.actor(features)
        self.critic.requires_grad_(False)
        loss = actor_loss(self.critic(features, combined(self._base_action(features), residual)))
        self.critic.requires_grad_(True)
        self.actor_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = gradient_norm(self.actor)
        self.actor_optimizer.step()
        polyak_update(self.target_actor, self.actor, self.config.critic_tau)
        return {
            "loss/actor": loss.detach(),
            "policy/residual": residual.detach().abs().mean(),
            "gradient_norm/actor": norm,
        }

    def saliency(self, observation: Observation, action: Tensor) -> Tensor | None:
        """See `ActorCritic.saliency`; where the base's action is not known, that taken stands for it."""
        return super().saliency(self.joined({BASE_ACTION: action, **observation}), action)

    def images(self, observation: Observation, action: Tensor) -> dict[str, np.ndarray]:
        """See `ActorCritic.images`; as in `saliency`."""
        return super().images(self.joined({BASE_ACTION: action, **observation}), action)

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save; the base's are not among them."""
        return {**super().networks(), "target_actor": self.target_actor}

    def _base_action(self, features: Tensor) -> Tensor:
        return features[:, -self.action_dim :]

    def _noisy(self, residual: Tensor, clip: float | None = None) -> Tensor:
        noise = torch.randn(residual.shape, generator=self.generator, device=residual.device)
        noise = self.config.noise * noise
        return residual + (noise if clip is None else noise.clamp(-clip, clip))


class ResidualLoop(OffPolicyLoop):
    """Learns from observations that hold the base's action, and begins with random residuals."""

    agent: Agent

    def random_actions(self) -> np.ndarray:
        """Return the base's actions with uniform residuals, [N, A]."""
        assert isinstance(self.agent, ResFiT)
        assert isinstance(self.observation, Mapping)
        base = self.observation[BASE_ACTION]
        bound = self.agent.config.random_residual
        residual = self.random.uniform(-bound, bound, base.shape)
        return np.clip(base + residual, -1, 1).astype(np.float32)
