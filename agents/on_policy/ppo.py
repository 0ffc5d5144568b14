"""Proximal policy optimization from pixels, state or both (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

The clip is one of several surrogates that keep a policy near the one that acted (`agents.core.policy_gradient`); A2C,
REINFORCE, SPO, DPO's drift, ASPO and a KL penalty are this agent with another `surrogate`. Defaults are
Stable-Baselines3's for continuous control from states.

Differences from common implementations:
- Time limits bootstrap from the episode's own last observation, terminations do not, and steps whose worker died are
  left out.
- Observations and rewards are normalized inside the agent, with statistics that change only after an update: what acts
  and what learns see the same numbers, so the ratio is 1 at the first inner step.
- The value loss is not clipped (Andrychowicz et al. 2021, https://arxiv.org/abs/2006.05990, section 3.7).
- From pixels, actor and critic share an encoder (as in DrQ-v2's networks); `value_regularization` adds DrAC's term
  on shifted pictures (Raileanu et al. 2021, https://arxiv.org/abs/2006.12862, eqs. 4-5, policy and value).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core import policy_gradient
from agents.core.advantages import generalized_advantage
from agents.core.agent import Observation, OnPolicyAgent, ReplaySettings
from agents.core.augmentations import random_shift
from agents.core.distributions import Categorical, Gaussian
from agents.core.encoders import EncoderName
from agents.core.errors import UserError
from agents.core.fields import Field, observation_boxes
from agents.core.normalizers import RewardScale
from agents.core.pictures import overlay_grid
from agents.core.rollout import Experience
from agents.core.saliency import frame_saliency, input_gradient
from agents.on_policy.actor_value import ActorValue

Surrogate = Literal[
    "ppo_clip", "dual_clip", "masked", "spo", "discovered_drift", "asymmetric_trust_region",
    "kl_penalty", "reinforce",
]  # fmt: skip


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "rollout_length minibatch_size epochs feature_dim",
        lambda value: value >= 1,
        "a positive number",
    ),
    ("target_kl max_gradient_norm", lambda value: value > 0, "a positive number"),
    ("learning_rate", lambda value: 0 < value < math.inf, "a positive number"),
    ("clip", lambda value: 0 < value < 1, "a number in (0, 1)"),
    ("discount gae_lambda", lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    (
        "kl_coefficient value_coefficient entropy_coefficient value_regularization pad",
        lambda value: value >= 0,
        "0 or more",
    ),
    ("initial_log_std", math.isfinite, "a finite number"),
    ("hidden", lambda value: min(value, default=1) >= 1, "positive widths"),
)
"""Fields, what fits them, and how to say so."""


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimization; defaults from Stable-Baselines3 unless a field says otherwise."""

    surrogate: Surrogate = "ppo_clip"
    """What keeps the policy near the one that acted; see `agents.core.policy_gradient`."""
    clip: float = 0.2
    """Largest |ratio - 1| that surrogates with a trust region allow (PPO's paper, section 6.1)."""
    kl_coefficient: float = 1.0
    """Weight of `kl_penalty`'s penalty (PPO's paper, table 1: fixed 1)."""
    rollout_length: int = 2048
    """Steps of every environment between updates."""
    minibatch_size: int = 64
    """Steps per gradient step, about."""
    epochs: int = 10
    """Passes over a rollout."""
    target_kl: float = math.inf
    """Estimated KL(old || new), in nats, after which the remaining passes are left out."""
    discount: float = 0.99
    """Discount per agent step."""
    gae_lambda: float = 0.95
    """Lambda of the generalized advantage estimate."""
    learning_rate: float = 3e-4
    """Adam step size."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    max_gradient_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    normalize_advantage: bool = True
    """Bring every minibatch's advantages to mean 0 and spread 1."""
    normalize_observation: bool = False
    """Bring states to mean 0 and spread 1 (Stable-Baselines3's VecNormalize)."""
    scale_reward: bool = False
    """Divide rewards by the spread of the discounted return (Stable-Baselines3's VecNormalize)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic."""
    initial_log_std: float = 0.0
    """Log standard deviation of a continuous policy at the start."""
    encoder: EncoderName = "drqv2"
    """Convolutions over pixels; see `agents.core.encoders.ENCODERS`."""
    feature_dim: int = 50
    """Length of the projection behind the encoder (DrQ-v2)."""
    value_regularization: float = 0.0
    """Weight of DrAC's term: policy and value of a shifted picture like those of the picture (DrAC .1)."""
    pad: int = 4
    """Largest shift in pixels at 84 x 84, scaled with the picture, for that term (DrAC 12)."""

    def __post_init__(self) -> None:
        """Reject values that the agent cannot run with."""
        for names, fits, wanted in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if not fits(value):
                    raise UserError(f"{name} is {value}; give {wanted}")
        if self.surrogate not in SURROGATES:
            raise UserError.unknown("surrogate", self.surrogate, SURROGATES)

    def surrogate_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the surrogate with this config's settings."""
        return SURROGATES[self.surrogate](self)


SURROGATES: dict[str, Callable[[PPOConfig], Callable[[Tensor, Tensor], Tensor]]] = {
    "ppo_clip": lambda config: partial(policy_gradient.ppo_clip, clip=config.clip),
    "dual_clip": lambda config: partial(policy_gradient.dual_clip, clip=config.clip),
    "masked": lambda config: partial(policy_gradient.masked, clip=config.clip),
    "spo": lambda config: partial(policy_gradient.spo, clip=config.clip),
    "discovered_drift": lambda _: policy_gradient.discovered_drift,
    "asymmetric_trust_region": lambda config: partial(
        policy_gradient.asymmetric_trust_region, clip=config.clip
    ),
    "kl_penalty": lambda config: partial(
        policy_gradient.kl_penalty, coefficient=config.kl_coefficient
    ),
    "reinforce": lambda _: policy_gradient.reinforce,
}
"""From a config to `(log_ratio, advantage) -> loss per sample`, by the surrogate's name."""


A2C = PPOConfig(
    surrogate="reinforce", rollout_length=16, minibatch_size=10**9, epochs=1, learning_rate=7e-4,
    gae_lambda=1.0, normalize_advantage=False, entropy_coefficient=0.0,
)  # fmt: skip
"""Advantage actor-critic (Mnih et al. 2016, https://arxiv.org/abs/1602.01783): one step on all of a short rollout, with
Stable-Baselines3's step size; its rollouts have 5 steps of more environments."""


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of values [B] (PPO's paper, eq. 9)."""
    return F.mse_loss(value, target)


def regularization_loss(
    policy: Gaussian | Categorical, value: Tensor, seen: Gaussian | Categorical, seen_value: Tensor
) -> Tensor:
    """Return DrAC's term: an augmented picture's policy and value should be those of the picture.

    Args:
        policy: of the picture as it is; it gets no gradient.
        value: [B], likewise.
        seen: the policy of the augmented picture.
        seen_value: [B], its value.
    """
    if isinstance(policy, Categorical) and isinstance(seen, Categorical):
        target = policy.logits.detach().log_softmax(-1)
        divergence = (target.exp() * (target - seen.logits.log_softmax(-1))).sum(-1)
    else:
        assert isinstance(policy, Gaussian)
        assert isinstance(seen, Gaussian)
        # Both have one spread, so that their KL is the distance of the means in its units.
        difference = (seen.mean - policy.mean.detach()) * torch.exp(-seen.log_std.detach())
        divergence = 0.5 * difference.square().sum(-1)
    return divergence.mean() + F.mse_loss(seen_value, value.detach())


class PPO(OnPolicyAgent):
    """The agent; see the module's docstring.

    Args:
        observation_space: uint8 pixels (3*k, H, W), a float vector, or a Dict of both.
        action_space: Box or Discrete.
        config: settings.
        num_envs: environments that act side by side; rewards are scaled by each one's return.
        device: where networks live.
        seed: of weights, exploration and minibatches.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: PPOConfig,
        *,
        num_envs: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box | gym.spaces.Discrete):
            raise UserError(f"PPO acts in Box and Discrete spaces, not in {action_space}")
        if getattr(action_space, "start", 0) != 0:
            raise UserError(f"PPO numbers actions from 0, not as in {action_space}")
        self.config, self.device = config, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.order = np.random.default_rng(seed)
        self.shape = action_space.shape or ()
        spaces = observation_boxes(observation_space)
        self.pad = 0
        if "pixels" in spaces and config.pad:
            self.pad = max(1, round(config.pad * spaces["pixels"].shape[-1] / 84))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # weights are drawn on the CPU: the same on every device
            self.network = ActorValue(
                spaces,
                action_space,
                hidden=config.hidden,
                encoder=config.encoder,
                feature_dim=config.feature_dim,
                initial_log_std=config.initial_log_std,
                normalize_observation=config.normalize_observation,
            )
        self.network.to(self.device)
        self.rewards = RewardScale(num_envs, config.discount).to(self.device)
        self.surrogate = config.surrogate_loss()
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5
        )
        self.extras = {"log_prob": Field(), "value": Field()}
        self.rollout_length, self.gradient_updates = config.rollout_length, 0
        size = min(config.minibatch_size, config.rollout_length * num_envs)
        self.replay_settings = ReplaySettings(size, 1, config.discount)

    @torch.no_grad()
    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """See `Agent.act`; what explores may leave [-1, 1]: environments get it clipped, the update as it was drawn."""
        policy, value = self.network(observation)
        action = policy.sample(self.generator) if explore else policy.mode()
        if self.shape and not explore:
            action = action.clamp(-1, 1)
        extras = {"log_prob": policy.log_prob(action), "value": value}
        return (
            action.unflatten(-1, self.shape).cpu().numpy() if self.shape else action.cpu().numpy(),
            None,
            extras,
        )

    def update(self, batch: Experience) -> dict[str, Tensor]:
        """Learn from a rollout: several passes of minibatches, then the statistics."""
        config, experience = self.config, batch
        if not experience.kept.any():  # every worker died in every step
            return {}
        value, old_log_prob = experience.extras["value"], experience.extras["log_prob"]
        reward = self.rewards.scale(experience.reward) if config.scale_reward else experience.reward
        advantage = generalized_advantage(
            reward,
            value,
            experience.next_values(value, self._values),
            experience.terminated,
            experience.truncated,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        target = advantage + value
        flat = {
            "action": experience.action.flatten(0, 1),
            "log_prob": old_log_prob.flatten(),
            "advantage": advantage.flatten(),
            "target": target.flatten(),
        }
        metrics: list[dict[str, Tensor]] = []
        for index in self._minibatches(experience, metrics):
            place = index.to(self.device)
            metrics.append(
                self._step(
                    experience.observation(index), {name: v[place] for name, v in flat.items()}
                )
            )
        self._take_in(experience)
        names = metrics[0].keys()
        kept = experience.kept
        spread = target[kept].var(correction=0)
        unexplained = (target - value)[kept].var(correction=0) / spread.clamp(min=1e-12)
        return {name: torch.stack([m[name] for m in metrics]).mean() for name in names} | {
            "ratio/first_deviation": metrics[0]["ratio/largest_deviation"],
            "value/explained_variance": 1 - unexplained,
            "value/target": target[kept].mean(),
        }

    def _minibatches(
        self, experience: Experience, metrics: list[dict[str, Tensor]]
    ) -> Iterator[Tensor]:
        """Yield every pass's minibatches, until the policy is too far from the one that acted."""
        limit = self.config.target_kl
        for _ in range(self.config.epochs):
            begun = len(metrics)
            yield from experience.minibatches(self.config.minibatch_size, self.order)
            if math.isfinite(limit):  # one synchronization a pass, and only where it was asked for
                kl = torch.stack([m["ratio/kl"] for m in metrics[begun:]]).mean()
                if kl > limit:
                    return

    def _step(self, observation: Observation, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take one gradient step on a minibatch."""
        config = self.config
        policy, value = self.network(observation)
        action = sample["action"].flatten(1) if self.shape else sample["action"]
        log_ratio = policy.log_prob(action) - sample["log_prob"]
        advantage = sample["advantage"]
        if config.normalize_advantage and len(advantage) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = self.surrogate(log_ratio, advantage).mean()
        critic_loss = value_loss(value, sample["target"])
        entropy = policy.entropy().mean()
        loss = policy_loss + config.value_coefficient * critic_loss
        loss = loss - config.entropy_coefficient * entropy
        if config.value_regularization and self.pad:
            shifted = random_shift(observation["pixels"], self.generator, self.pad)
            again = self.network({**observation, "pixels": shifted})
            loss = loss + config.value_regularization * regularization_loss(policy, value, *again)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.max_gradient_norm)
        self.optimizer.step()
        self.gradient_updates += 1
        return {
            "loss/policy": policy_loss.detach(),
            "loss/value": critic_loss.detach(),
            "policy/entropy": entropy.detach(),
            "gradient_norm/policy": norm.detach(),
            **policy_gradient.ratio_metrics(log_ratio, clip=config.clip),
        }

    @torch.no_grad()
    def _values(self, observation: Observation) -> Tensor:
        return self.network(observation)[1]

    def _take_in(self, experience: Experience) -> None:
        """Update the statistics by which the next rollout is normalized."""
        if self.config.scale_reward:
            self.rewards.update(
                experience.reward, experience.terminated | experience.truncated | ~experience.kept
            )
        if self.network.moments is not None:
            index = experience.kept.flatten().nonzero()[:, 0].cpu()
            self.network.moments.update(experience.observation(index)["state"])

    def saliency(self, observation: Observation, action: Tensor) -> Tensor | None:
        """Return where the value looks, by guided backpropagation."""
        if "pixels" not in observation:
            return None
        with torch.enable_grad():
            seen = self.network.normalize(observation)
            seen["pixels"] = seen["pixels"].detach().requires_grad_()
            _, value = self.network.judge(seen)
            return frame_saliency(input_gradient(value, seen["pixels"], "guided")).float()

    def images(self, observation: Observation, action: Tensor) -> dict[str, np.ndarray]:
        """Return the saliency over the newest frames."""
        seen = self.saliency(observation, action)
        return {} if seen is None else {"saliency": overlay_grid(observation["pixels"], seen)}

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save, statistics among them."""
        return {"network": self.network, "rewards": self.rewards}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizer to save."""
        return {"network": self.optimizer}

    def extra_state(self) -> dict[str, Any]:
        """Return the generator that orders minibatches, and the counter."""
        return {
            "order": self.order.bit_generator.state,
            "gradient_updates": self.gradient_updates,
            "running_returns": self.rewards.running.clone(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the generator that orders minibatches, and the counter."""
        self.order.bit_generator.state = state["order"]
        self.gradient_updates = state["gradient_updates"]
        self.rewards.running.copy_(state["running_returns"])
