"""The skeleton that on-policy agents share: act, credit, statistics, state; how they learn is each algorithm's own.

The order inside one update: take the rewards into their scale, and scale them; advantages and targets from the values
that were seen while acting; the algorithm's gradient steps (`OnPolicyActorCritic.learn`); then the statistics by which
the next rollout's observations are normalized.

Differences from common implementations:
- Time limits bootstrap from the episode's own last observation, terminations do not, and steps whose worker died are
  left out.
- Observations are normalized inside the agent, with statistics that change only after an update: what acts and what
  learns see the same numbers, so the ratio is 1 at the first inner step. Rewards are scaled by all that were seen, this
  rollout's included (Stable-Baselines3's VecNormalize: up to each step): the first ones are on that scale, too.
- `memory_size` gives every agent a recurrent memory: a GRU behind the encoder, beside which policy and value still
  see what is there now. Chunks of steps go on from the memory that acting had (as in R2D2's stored states; Kapturowski
  et al. 2019), and what follows a rollout or a time limit is valued with the memory at that point.
- From pixels, actor and critic share an encoder (as in DrQ-v2's networks); `value_regularization` adds DrAC's term
  on shifted pictures (Raileanu et al. 2021, https://arxiv.org/abs/2006.12862, eqs. 4-5, policy and value).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.core.agent import Observation, OnPolicyAgent, ReplaySettings
from agents.core.augmentations import random_shift
from agents.core.distributions import Categorical, Gaussian, Policy
from agents.core.errors import UserError
from agents.core.fields import Field, observation_boxes, refuse_other_parts
from agents.core.greedy import GreedyPolicy
from agents.core.normalizers import RewardScale
from agents.core.pictures import overlay_grid
from agents.core.rollout import TEACHER_ACTION, Experience, part_sizes
from agents.core.saliency import frame_saliency, input_gradient
from agents.on_policy.actor_value import ActorValue
from agents.on_policy.config import OnPolicyConfig
from agents.on_policy.losses import regularization_loss, value_loss, value_target
from agents.on_policy.quantile_critic import (
    QuantileCritic,
    quantile_loss,
    sample_returns,
)
from agents.on_policy.updates import backward, credited, forget, take_in_rewards, value_metrics


@dataclass(frozen=True)
class Samples:
    """What is learned from, beside observations; steps are numbered through the flattened [T, N]."""

    action: Tensor
    """float32 [B, A], or int64 [B], as it was drawn."""
    log_prob: Tensor
    """[B], under the policy that acted."""
    advantage: Tensor
    """[B]."""
    target: Tensor
    """[B], what the value should be; for quantile critics [B, 1 + K], with samples of the return behind it."""
    teacher_action: Tensor | None = None
    """Like `action`: what a teacher would have done, where there is one."""

    def at(self, index: Tensor) -> Samples:
        """Return the samples of these steps."""
        place = index.to(self.action.device, non_blocking=True)
        taught = self.teacher_action
        return Samples(
            self.action[place],
            self.log_prob[place],
            self.advantage[place],
            self.target[place],
            None if taught is None else taught[place],
        )


class OnPolicyActorCritic(OnPolicyAgent):
    """A policy and a value that learn from rollouts; see the module's docstring.

    Attributes:
        keeps_policy: rollouts remember the distribution of every action, for `acted`.

    Args:
        observation_space: uint8 pixels (3*k, H, W), a float vector, or a Dict of both.
        action_space: Box(-1, 1) or Discrete.
        config: settings.
        num_envs: environments that act side by side; rewards are scaled by each one's return.
        device: where networks live.
        seed: of weights, exploration and minibatches.
    """

    keeps_policy: ClassVar[bool] = False

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: OnPolicyConfig,
        *,
        num_envs: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        if not isinstance(action_space, gym.spaces.Box | gym.spaces.Discrete):
            raise UserError(f"{name} acts in Box and Discrete spaces, not in {action_space}")
        if getattr(action_space, "start", 0) != 0:
            raise UserError(f"{name} numbers actions from 0, not as in {action_space}")
        self.shape = action_space.shape or ()
        is_box = isinstance(action_space, gym.spaces.Box)
        if is_box and not (math.prod(self.shape) and action_space.dtype.kind == "f"):
            raise UserError(
                f"{name} draws at least one real number, which does not fit {action_space}"
            )
        if isinstance(action_space, gym.spaces.Box) and not (
            (action_space.low == -1).all() and (action_space.high == 1).all()
        ):
            raise UserError(
                f"{name} acts in [-1, 1], which does not fit {action_space}; wrap the task in Gymnasium's "
                "RescaleAction(env, -1.0, 1.0)"
            )
        self.distribution: type[Policy] = Gaussian if is_box else Categorical
        self.config, self.device, self.num_envs = config, torch.device(device), num_envs
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.order = np.random.default_rng(seed)
        spaces = observation_boxes(observation_space)
        refuse_other_parts(spaces, type(self).__name__)
        self.pad = 0
        if "pixels" in spaces and config.pad:
            self.pad = max(1, round(config.pad * spaces["pixels"].shape[-2] / 84))
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
                critic=self._quantile_critic if config.critic != "mean" else None,
                memory_size=config.memory_size,
            )
        # NHWC convolutions take a tenth to a fifth less time on a CPU.
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rewards = RewardScale(num_envs, config.discount).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5, fused=True
        )
        self.extras = {"log_prob": Field(), "value": Field()}
        if self.keeps_policy:
            is_discrete = isinstance(action_space, gym.spaces.Discrete)
            outputs = int(action_space.n) if is_discrete else 2 * math.prod(self.shape)  # type: ignore[union-attr]
            self.extras["policy"] = Field((outputs,))
        if size := config.memory_size:
            self.extras |= {"memory": Field((size,)), "next_memory": Field((size,))}
        self.rollout_length, self.gradient_updates = config.rollout_length, 0
        size = min(config.minibatch_size, config.rollout_length * num_envs)
        self.replay_settings = ReplaySettings(size, 1, config.discount)
        self.prepare()

    def prepare(self) -> None:
        """Build what the algorithm has of its own; everything else is there."""

    @torch.no_grad()
    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """See `Agent.act`; what explores may leave [-1, 1]: environments get it clipped, the update as it was drawn.

        The state is the memory, float32 [B, memory_size], where the agent has one.
        """
        seen = self.network.normalize(observation)
        if self.config.memory_size and state is None:
            state = torch.zeros(
                len(next(iter(seen.values()))), self.config.memory_size, device=self.device
            )
        if state is not None:
            seen["memory"] = state
        features, memory = self.network.perceive(seen)
        policy, value = self.network.decide(features)
        action = policy.sample(self.generator) if explore else self._mode(policy)
        extras = {"log_prob": policy.log_prob(action), "value": value}
        if self.keeps_policy:
            extras["policy"] = policy.packed()
        if memory is not None:
            extras |= {"memory": state, "next_memory": memory}
        return (
            action.unflatten(-1, self.shape).cpu().numpy() if self.shape else action.cpu().numpy(),
            memory,
            extras,
        )

    def greedy(self) -> GreedyPolicy:
        """See `Agent.greedy`."""
        network = self.network
        if network.memory is not None:
            raise UserError(
                f"{type(self).__name__} has a memory (memory_size {network.memory.size}), and an exported policy keeps "
                "none between its calls; export a run that was trained without"
            )

        def act(features: Tensor) -> Tensor:
            return self._mode(network.distribution(network.trunk(features)))

        return GreedyPolicy(
            act,
            self.shape,
            [network.trunk, network.actor],
            encoder=network.encoder,
            moments=network.moments,
        )

    def _mode(self, policy: Gaussian | Categorical) -> Tensor:
        """Return the most likely actions that the task knows: [B, A] in [-1, 1], or int64 [B]."""
        return policy.mode().clamp(-1, 1) if self.shape else policy.mode()

    @abstractmethod
    def learn(self, experience: Experience, samples: Samples) -> dict[str, Tensor]:
        """Take the gradient steps of one update, and return metrics.

        Args:
            experience: the rollout, for observations and minibatches.
            samples: actions, their log-probabilities, advantages and targets of every step.
        """

    def update(self, batch: Experience) -> dict[str, Tensor]:
        """Learn from a rollout, then take its observations into the statistics."""
        if not batch.kept.any():  # every worker died in every step
            return {}
        if self.config.scale_reward:
            take_in_rewards(self.rewards, batch)
        value, samples = batch.extras["value"], self.credit(batch)
        metrics = self.learn(batch, samples)
        self._take_in(batch)
        target = value_target(samples.target)
        return metrics | value_metrics(value.flatten(), target, batch.kept.flatten())

    def credit(self, experience: Experience) -> Samples:
        """Return how much better than expected every step turned out, and what its value should be."""
        config = self.config
        reward, advantage = credited(
            experience,
            self._values,
            self.rewards if config.scale_reward else None,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        target = advantage + experience.extras["value"]
        if config.critic != "mean":
            samples = sample_returns(
                self.network,
                experience,
                reward,
                discount=config.discount,
                gae_lambda=config.gae_lambda,
                generator=self.generator,
            )
            target = torch.cat([target[..., None], samples], dim=-1)
        taught = experience.extras.get(TEACHER_ACTION)
        return Samples(
            action=self._flattened(experience.action),
            log_prob=experience.extras["log_prob"].flatten(),
            advantage=advantage.flatten(),
            target=target.flatten(0, 1),
            teacher_action=None if taught is None else self._flattened(taught),
        )

    def _flattened(self, action: Tensor) -> Tensor:
        """Return actions [T, N, ...] as [T * N, A], or [T * N] where they are numbers."""
        flat = action.flatten(0, 1)
        return flat.flatten(1) if self.shape else flat

    def acted(self, experience: Experience, index: Tensor) -> Policy:
        """Return the distributions from which the actions of these steps were drawn."""
        packed = experience.extras["policy"].flatten(0, 1)
        return self.distribution.unpacked(packed[index.to(packed.device, non_blocking=True)])

    def minibatches(self, experience: Experience, size: int | None = None) -> Iterator[Tensor]:
        """Yield the step numbers of one pass's minibatches; with a memory, chunks of consecutive steps.

        Args:
            experience: the rollout.
            size: steps of each, about; None for the config's.
        """
        config = self.config
        size = size or config.minibatch_size
        if config.memory_size:
            yield from experience.sequences(size, config.sequence_length, self.order)
        else:
            yield from experience.minibatches(size, self.order)

    def critic_loss(
        self,
        observation: Observation,
        policy: Policy,
        value: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of the value with DrAC's term, and metrics."""
        config, metrics = self.config, {}
        error = value_loss(value, value_target(target))
        loss = config.value_coefficient * error
        if config.critic != "mean":
            quantile_error = quantile_loss(
                self.network, observation, target[:, 1:], config.quantile_threshold, self.generator
            )
            metrics["loss/quantile"] = quantile_error.detach()
            # The mean of quantiles learns from their loss alone; a distilled value has layers of its own.
            loss = config.value_coefficient * quantile_error + loss * (config.critic == "distilled")
        if config.value_regularization and self.pad:
            shifted = random_shift(observation["pixels"], self.generator, self.pad)
            again = self.network({**observation, "pixels": shifted})
            loss = loss + config.value_regularization * regularization_loss(policy, value, *again)
        return loss, metrics | {"loss/value": error.detach()}

    def descend(
        self, gradients: Callable[..., dict[str, Tensor]], *inputs: Any
    ) -> dict[str, Tensor]:
        """Take one gradient step of what the optimizer holds, and return metrics.

        Args:
            gradients: leaves them, of a minibatch that it is given, and returns metrics; see `Agent.differentiate`.
            *inputs: the minibatch.
        """
        forget(self.optimizer)
        metrics = self.differentiate(gradients, *inputs)
        self.optimizer.step()
        self.gradient_updates += 1
        return metrics

    def backward(self, loss: Tensor) -> Tensor:
        """Leave a loss's gradients, scaled down, in what the optimizer holds, and return their norm before."""
        return backward(self.optimizer, loss, self.config.max_gradient_norm)

    def gradient_sizes(self) -> set[int]:
        """See `Agent.gradient_sizes`; those of the minibatches of a rollout that lost no step."""
        if self.config.memory_size:
            raise UserError(
                f"memory_size is {self.config.memory_size}, and stretches of steps that a memory goes through differ "
                "in length with every minibatch, which cannot be compiled; use --compile off"
            )
        return part_sizes(self.config.rollout_length * self.num_envs, self.config.minibatch_size)

    def _quantile_critic(self, features: int) -> QuantileCritic:
        config = self.config
        return QuantileCritic(
            features,
            config.hidden,
            quantiles=config.quantiles,
            embedding=config.quantile_embedding,
            is_distilled=config.critic == "distilled",
        )

    @torch.no_grad()
    def _values(self, observation: Observation) -> Tensor:
        return self.network(observation)[1]

    def _take_in(self, experience: Experience) -> None:
        """Update the statistics by which the next rollout's states are normalized."""
        if self.network.moments is not None:
            self.network.moments.update(experience.kept_states())

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
