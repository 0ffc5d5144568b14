"""The skeleton that SAC and DDPG share: an encoder, twin critics, an actor behind a stopped gradient, one update.

The order inside one update: augment, target, critic loss (a `CriticMethod` decides on which views of the observation
it is taken), actor on the critic's own features (detached, computed before the critic's step, as in DrQ-v2; this saves
one encoder pass), moving averages, the method's auxiliary step.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.core.agent import Agent, Observation, ReplaySettings
from agents.core.augmentations import (
    WeakAugmentation,
    center_crop,
    random_crop,
    random_shift,
    zero_border,
)
from agents.core.encoders import EncoderName, PixelEncoder
from agents.core.errors import UserError
from agents.core.fields import count_views, observation_boxes, refuse_other_parts
from agents.core.greedy import GreedyPolicy
from agents.core.networks import Trunk, TwinQ, gradient_norm, polyak_update
from agents.core.pictures import newest_frames
from agents.core.precision import Precision, resolve_precision
from agents.core.replay import Batch
from agents.off_policy.critic_methods import (
    CriticMethod,
    MethodConfig,
    critic_saliency,
)


@dataclass(frozen=True)
class ActorCriticConfig:
    """What SAC and DDPG have in common."""

    encoder: EncoderName = "dmc-gb"
    """Convolutions over pixels; see `agents.core.encoders.ENCODERS`."""
    feature_dim: int = 100
    """Length of the projection behind the encoder (DMControl-GB 100, DrQ-v2 50)."""
    hidden: tuple[int, ...] = (1024, 1024)
    """Widths of the hidden layers of actor and critics (DMControl-GB, DrQ-v2)."""
    augmentation: WeakAugmentation = "shift"
    """Weak augmentation of observation and next observation: shift (DrQ), crop (RAD) or none."""
    pad: int = 4
    """Largest shift in pixels at 84 x 84, scaled with the picture (DrQ)."""
    crop_fraction: float = 0.84
    """Side of the random crop over the side of the picture (RAD: 84 of 100)."""
    batch_size: int = 128
    """Transitions per update (DMControl-GB 128, DrQ-v2 256)."""
    discount: float = 0.99
    """Discount per agent step."""
    n_step: int = 1
    """Steps of reward before bootstrapping (DrQ-v2 3)."""
    reward_scale: float = 1.0
    """Factor on every reward that is learned from (SAC's paper, section 5.2); logged values are in its unit."""
    actor_learning_rate: float = 1e-3
    """Adam step size of the actor (DMControl-GB)."""
    critic_learning_rate: float = 1e-3
    """Adam step size of critic and encoder (DMControl-GB)."""
    critic_weight_decay: float = 0.0
    """L2 penalty in the critic's Adam (DMControl-GB 0; SGQN's paper 1e-5)."""
    critic_tau: float = 0.01
    """Rate of the target critic's moving average (DMControl-GB, DrQ-v2)."""
    encoder_tau: float = 0.05
    """Rate of the target encoder's moving average (DMControl-GB .05; 1 is DrQ-v2: no target encoder)."""
    actor_every: int = 2
    """Critic updates per actor update (DMControl-GB 2, DrQ-v2 1)."""
    target_every: int = 2
    """Critic updates per moving average (DMControl-GB 2, DrQ-v2 1)."""
    precision: Precision = "auto"
    """bf16 runs convolutions in bfloat16, auto where the hardware has units for it; heads and values stay fp32: with
    8 bits a value of 300 is known to 1 or 2 only, and temporal differences drown."""
    channels_last: bool = True
    """Keep images and convolution weights in NHWC order (1.2 times faster in bf16 on CPU)."""

    def __post_init__(self) -> None:
        """Reject values that no agent can run with."""
        for name in ("feature_dim", "batch_size", "n_step", "actor_every", "target_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if not 0 < self.reward_scale < math.inf:
            raise UserError(f"reward_scale is {self.reward_scale}; give a positive number")
        for name in ("critic_tau", "encoder_tau", "discount", "crop_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number in (0, 1]")
        for name, value in vars(self).items():
            if name.endswith("learning_rate") and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; give a positive number")
        if not self.critic_weight_decay >= 0:
            raise UserError(f"critic_weight_decay is {self.critic_weight_decay}; give 0 or more")
        if min(self.hidden, default=1) < 1 or self.pad < 0:
            raise UserError(
                f"hidden is {self.hidden} and pad {self.pad}; give positive widths and at least 0"
            )


def td_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """Return the n-step target r + discount * V(s'); `discount` is gamma^n, 0 only after a true termination."""
    return reward + discount * next_value


class CriticStep(NamedTuple):
    """What the critic's gradients leave for the rest of an update."""

    features: Tensor
    """[B, F], of the observation without strong augmentation."""
    kept: Any
    """What the method's auxiliary step needs."""
    metrics: dict[str, Tensor]
    """0-d and detached."""


class Critic(nn.Module):
    """Encoder, trunk and Q functions.

    Args:
        spaces: of the observation's parts.
        action: numbers of an action.
        config: sizes.
        bf16: run convolutions in bfloat16.
        values: makes the Q functions from the trunk's features, the action's numbers and hidden widths.
    """

    def __init__(
        self,
        spaces: dict[str, gym.spaces.Box],
        action: int,
        config: ActorCriticConfig,
        *,
        bf16: bool = False,
        values: Callable[[int, int, Sequence[int]], nn.Module] = TwinQ,
    ) -> None:
        super().__init__()
        self.encoder: PixelEncoder | None = None
        if "pixels" in spaces:
            channels, *size = spaces["pixels"].shape
            self.encoder = PixelEncoder(channels, (size[0], size[1]), config.encoder, bf16=bf16)
        self.pixel_features = self.encoder.out_features if self.encoder else 0
        self.state_features = spaces["state"].shape[0] if "state" in spaces else 0
        self.trunk = Trunk(self.pixel_features, self.state_features, config.feature_dim)
        self.q = values(self.trunk.out_features, action, config.hidden)

    def normalize(self, observation: Observation) -> dict[str, Tensor]:
        """Bring pixels to the encoder's range, dtype and memory format; states pass."""
        normalized = dict(observation)
        if self.encoder is not None:
            normalized["pixels"] = self.encoder.normalize(observation["pixels"])
        return normalized

    def encode(self, normalized: Observation) -> Tensor:
        """Return features [B, pixel_features + state_features] of a normalized observation."""
        parts = []
        if self.encoder is not None:
            parts.append(self.encoder(normalized["pixels"]))
        if self.state_features:
            parts.append(normalized["state"])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, features: Tensor, action: Tensor) -> Any:
        """Return the action values from `encode`'s features: two of float32 [B], or those of an ensemble [E, B]."""
        return self.q(self.trunk(features), action)


class ActorCritic(Agent):
    """Base of SAC and DDPG; subclasses say how to act, what the next state is worth, and what the actor wants."""

    actor: nn.Module

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: ActorCriticConfig,
        *,
        method: MethodConfig,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box):
            raise UserError(f"{type(self).__name__} needs continuous actions, got {action_space}")
        self.config = config
        self.device = torch.device(device)
        bf16 = resolve_precision(config.precision, self.device) == "bf16"
        self.replay_settings = ReplaySettings(config.batch_size, config.n_step, config.discount)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.updates = 0
        spaces = observation_boxes(observation_space)
        refuse_other_parts(spaces, type(self).__name__)
        self.crop = self.pad = 0
        if "pixels" in spaces:
            spaces["pixels"] = self._cropped(spaces["pixels"])
            scaled = round(config.pad * spaces["pixels"].shape[-2] / 84)
            self.pad = max(1, scaled) if config.pad else 0
        self.action_shape = action_space.shape
        self.action_dim = math.prod(action_space.shape)  # a chunk of actions is one long action
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # weights are drawn on the CPU: the same on every device
            self.critic = self.make_critic(spaces, bf16=bf16)
            self.actor = self.make_actor()
            self.method: CriticMethod = method.build(spaces, self.action_dim, self.critic, seed)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        for network in (self.critic, self.actor, self.method):
            network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(),
            lr=config.critic_learning_rate,
            weight_decay=config.critic_weight_decay,
            fused=True,
        )
        self.actor_optimizer = torch.optim.Adam(
            self.actor.parameters(), lr=config.actor_learning_rate, fused=True
        )
        self.method.prepare(self.critic)

    def make_critic(self, spaces: dict[str, gym.spaces.Box], *, bf16: bool) -> Critic:
        """Build the critic of an observation's parts."""
        return Critic(spaces, self.action_dim, self.config, bf16=bf16)

    @abstractmethod
    def make_actor(self) -> nn.Module:
        """Build the actor; it takes the critic's features."""

    @abstractmethod
    def next_value(self, policy_features: Tensor, target_features: Tensor) -> Tensor:
        """Return the value of the next state under the current policy and target critic, [B]."""

    @abstractmethod
    def update_actor(self, features: Tensor) -> dict[str, Tensor]:
        """Take one step on the actor given detached features of the batch."""

    @abstractmethod
    def policy(self, features: Tensor, *, explore: bool) -> Tensor:
        """Return actions [B, A] for features."""

    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """See `Agent.act`; these agents keep no state."""
        with torch.no_grad():
            seen = self.critic.normalize(self._center(observation))
            action = self.policy(self.critic.encode(seen), explore=explore)
        return action.float().unflatten(-1, self.action_shape).cpu().numpy(), None, {}

    def greedy(self) -> GreedyPolicy:
        """See `Agent.greedy`."""
        act = partial(self.policy, explore=False)
        return GreedyPolicy(
            act, self.action_shape, [self.actor], encoder=self.critic.encoder, crop=self.crop
        )

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One critic step; actor, averages and the method's auxiliary step when they are due."""
        self.updates += 1
        self.critic_optimizer.zero_grad(set_to_none=True)
        critic = self.differentiate(self.critic_gradients, batch)
        self.critic_optimizer.step()
        metrics = critic.metrics
        if self.updates % self.config.actor_every == 0:
            metrics |= self.update_actor(critic.features)
        if self.updates % self.config.target_every == 0:
            self.update_target()
        if self.method.auxiliary_due(self.updates):
            metrics |= self.update_method(critic.kept, batch.action)
        return metrics

    def critic_gradients(self, batch: Batch) -> CriticStep:
        """Leave the gradients of the critic's loss."""
        observation, action = self.augment(batch.observation), batch.action.flatten(1)
        with torch.no_grad():
            target = self.target_value(batch)
        critic = self.method.critic_loss(self.critic, observation, action, target, self.generator)
        # Only parameters: where a method asked for input gradients, the loss must not compute them again.
        critic.loss.backward(inputs=list(self.critic.parameters()))
        metrics = {
            "loss/critic": critic.loss.detach(),
            "value/target": target.mean(),
            "gradient_norm/critic": gradient_norm(self.critic),
            **critic.metrics,
        }
        return CriticStep(critic.features.detach(), critic.kept, metrics)

    def update_method(self, kept: Any, action: Tensor) -> dict[str, Tensor]:
        """Take the method's own gradient step."""
        optimizers = self.method.optimizers().values()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        metrics = self.differentiate(self.method_gradients, kept, action)
        for optimizer in optimizers:
            optimizer.step()
        return metrics

    def method_gradients(self, kept: Any, action: Tensor) -> dict[str, Tensor]:
        """Leave the gradients of the method's own loss."""
        loss, metrics = self.method.auxiliary_loss(
            self.critic, kept, action.flatten(1), self.generator
        )
        loss.backward()
        return metrics

    def gradient_sizes(self) -> set[int]:
        """See `Agent.gradient_sizes`."""
        return {self.config.batch_size}

    def target_value(self, batch: Batch) -> Tensor:
        """Return the critic's regression target, [B], without gradient."""
        following = self.augment(batch.next_observation)
        seen = self.critic.normalize(following)
        policy_features = self.critic.encode(seen)
        shared = self.config.encoder_tau == 1.0 and self.config.target_every == 1
        target_features = policy_features if shared else self.target.encode(seen)
        value = self.next_value(policy_features, target_features)
        return td_target(self.config.reward_scale * batch.reward, batch.discount, value)

    def update_target(self) -> None:
        """Move the target critic; its encoder has a rate of its own."""
        if self.critic.encoder is not None and self.target.encoder is not None:
            polyak_update(self.target.encoder, self.critic.encoder, self.config.encoder_tau)
        polyak_update(self.target.trunk, self.critic.trunk, self.config.critic_tau)
        polyak_update(self.target.q, self.critic.q, self.config.critic_tau)

    def augment(
        self, observation: Observation, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Apply the weak augmentation to the pixels, drawn from the agent's own generator by default."""
        generator = generator or self.generator
        seen = dict(observation)
        if "pixels" in seen:
            if self.config.augmentation == "shift":
                seen["pixels"] = random_shift(seen["pixels"], generator, self.pad)
            elif self.config.augmentation == "crop":
                seen["pixels"] = random_crop(seen["pixels"], generator, self.crop)
        return seen

    def saliency(self, observation: Observation, action: Tensor) -> Tensor | None:
        """Return where the first critic looks, by guided backpropagation; a cropped border is never looked at."""
        if "pixels" not in observation:
            return None
        seen = critic_saliency(self.critic, self._center(observation), action.flatten(1), "guided")
        return (
            zero_border(seen.float(), observation["pixels"].shape[-2])
            if self.crop
            else seen.float()
        )

    def images(self, observation: Observation, action: Tensor) -> dict[str, np.ndarray]:
        """Return what a batch looks like: saliency over frames, and the pictures that the critic is trained on."""
        if "pixels" not in observation:
            return {}
        pictures = self.method.images(self.critic, self._center(observation), action.flatten(1))
        if self.config.augmentation != "none" and "augmentation" not in pictures:
            # A generator of its own: drawing a picture must not move the training's random stream.
            generator = torch.Generator(self.device).manual_seed(0)
            pictures["augmentation"] = newest_frames(self.augment(observation, generator)["pixels"])
        return pictures

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save, by name."""
        return {
            "critic": self.critic,
            "target": self.target,
            "actor": self.actor,
            **({"method": self.method} if list(self.method.parameters()) else {}),
        }

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers to save, by name."""
        return {
            "critic": self.critic_optimizer,
            "actor": self.actor_optimizer,
            **self.method.optimizers(),
        }

    def extra_state(self) -> dict[str, Any]:
        """Return the update counter."""
        return {"updates": self.updates}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the update counter."""
        self.updates = state["updates"]

    def _cropped(self, space: gym.spaces.Box) -> gym.spaces.Box:
        """Return the pixel space that the encoder sees."""
        if self.config.augmentation != "crop":
            return space
        self.crop = round(space.shape[-2] * self.config.crop_fraction)
        width = count_views(space.shape) * self.crop
        return gym.spaces.Box(0, 255, (space.shape[0], self.crop, width), np.uint8)

    def _center(self, observation: Observation) -> Observation:
        if self.config.augmentation != "crop" or "pixels" not in observation:
            return observation
        return {**observation, "pixels": center_crop(observation["pixels"], self.crop)}
