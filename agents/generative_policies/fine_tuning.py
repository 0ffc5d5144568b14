"""What DPPO, FPO and ReinFlow share: a policy that denoises learns from rollouts, with a critic of its own beside.

An agent step is one chunk of actions. The three differ in how a chunk is drawn while exploring, in what of it a rollout
remembers (`draw`), and in the log-ratio that goes into a surrogate of `agents.core.policy_gradient` (`policy_loss`).
Credit, the critic, passes over a rollout, statistics and state are here.

A policy begins with the weights of a base (`start_from`), such as an imitation's, or with random ones. Differences from
the authors' code (DPPO's, of which ReinFlow's is a fork):

- At a time limit the advantage ends, with the value of the episode's own last observation. Theirs knows terminations
  only: the trace, and the value of what follows, run on into the next episode.
- Actions of a chunk that are never executed count in no log-ratio (as in DPPO's code with a horizon above its chunk).
- The critic's encoder of observations has the policy's sizes, and starts with the base's weights.
- A minibatch is of decisions, each with all that the rollout remembers of its chain, which share one pass through the
  encoder; DPPO draws pairs of decision and denoising step.

Where a teacher says what it would do, it may begin episodes, and its chunks are cloned: see `guidance`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.core.agent import Observation, OnPolicyAgent, ReplaySettings
from agents.core.errors import UserError
from agents.core.fields import Field, observation_boxes
from agents.core.networks import mlp
from agents.core.normalizers import RangeNormalizer, RewardScale, RunningMoments
from agents.core.policy_gradient import ratio_metrics
from agents.core.rollout import TEACHER_ACTION, Experience, part_sizes
from agents.core.sampling import Sampler
from agents.core.schedules import linear
from agents.core.seeding import child_seeds
from agents.generative_policies.conditions import ConditionEncoder
from agents.generative_policies.fine_tuning_config import FineTuningConfig
from agents.generative_policies.guidance import (
    AGENT,
    GUIDED,
    TEACHER,
    cloning_loss,
    draw_guided,
)
from agents.generative_policies.policy import DenoisingConfig, DenoisingPolicy
from agents.on_policy.losses import normalized, value_loss
from agents.on_policy.teacher import teacher_weight
from agents.on_policy.updates import (
    backward,
    credited,
    forget,
    mean_metrics,
    passes,
    take_in_rewards,
    value_metrics,
)

STREAMS = ("weights", "exploration", "acting", "order", "further")
"""What an agent's seed decides, each by a child of its own."""


class PolicyLoss(NamedTuple):
    """What an algorithm says of a minibatch."""

    loss: Tensor
    """0-d, to be minimized."""
    log_ratio: Tensor
    """[*], one for each sample that the surrogate saw."""
    metrics: dict[str, Tensor]
    """Further 0-d detached ones."""


class Critic(nn.Module):
    """The value of an observation, whatever chain follows: float32 [B].

    Args:
        condition: encodes observations; it is the critic's own.
        hidden: widths of the layers behind it.
    """

    def __init__(self, condition: ConditionEncoder, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.condition = condition
        self.head = mlp([condition.out_features, *hidden, 1])

    def forward(self, observation: Observation) -> Tensor:
        """Return values [B]."""
        return self.head(self.condition(observation))[:, 0]


class FineTuner(OnPolicyAgent):
    """A denoising policy that learns from rollouts; see the module's docstring.

    Args:
        observation_space: pixels, state, other vectors, or a Dict of these.
        action_space: Box [A], or [h, A] of an environment that takes chunks.
        config: how it learns.
        policy: what it is made of, and how it draws when it does not explore.
        num_envs: environments that act side by side; rewards are scaled by each one's return.
        device: where networks live.
        seed: of weights, exploration and minibatches.

    Attributes:
        policy: learns.
        base: what the policy began with, frozen; None unless `keeps_base`.
        has_base: it began with trained weights.
        further_seed: of the networks that an algorithm has of its own.
    """

    keeps_base: ClassVar[bool] = False

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        config: FineTuningConfig,
        policy: DenoisingConfig,
        *,
        num_envs: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if policy.inpaint:
            raise UserError(
                "a chunk that goes on with the last one cannot be fine-tuned; give --no-inpaint"
            )
        self.config, self.device, self.num_envs = config, torch.device(device), num_envs
        # Drawn from one seed, weights, noise and order would be the same numbers.
        seeds = child_seeds(seed, STREAMS)
        self.generator = torch.Generator(self.device).manual_seed(seeds["exploration"])
        self.acting = torch.Generator(self.device).manual_seed(seeds["acting"])
        self.order = np.random.default_rng(seeds["order"])
        self.further_seed = seeds["further"]
        spaces = observation_boxes(observation_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds["weights"])  # on the CPU: the same on every device
            self.policy = DenoisingPolicy(spaces, action_space, policy)
            self.critic = Critic(ConditionEncoder(spaces, policy), config.hidden)
        self.policy.to(self.device)
        self.critic.to(self.device)
        self.chunks, self.executed = self.policy.chunks, self.policy.chunks.executed
        self.base: DenoisingPolicy | None = None
        if self.keeps_base:
            self.base = copy.deepcopy(self.policy).requires_grad_(False)
        self.has_base = False
        self.moments: RunningMoments | None = None
        if "state" in spaces:
            self.moments = RunningMoments(spaces["state"].shape).to(self.device)
        self.rewards = RewardScale(num_envs, config.discount).to(self.device)
        self.agent_steps = 0  # so far, for schedules
        self.extras = {"value": Field(), **self.prepare()}
        if config.guidance:
            self.extras[GUIDED] = Field((), torch.bool)
        self.actor_optimizer = torch.optim.Adam(
            self.actor_parameters(), lr=config.learning_rate, fused=True
        )
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=config.critic_learning_rate, fused=True
        )
        self.rollout_length, self.gradient_updates, self.rollouts = config.rollout_length, 0, 0
        size = min(config.minibatch_size, config.rollout_length * num_envs)
        self.replay_settings = ReplaySettings(size, 1, config.discount)

    # ------------------------------------------------------------------- what an algorithm says

    @abstractmethod
    def prepare(self) -> dict[str, Field]:
        """Build what the algorithm has of its own, and return the fields that `draw` gives and `policy_loss` needs."""

    @abstractmethod
    def draw(self, observation: Observation) -> tuple[Tensor, dict[str, Tensor]]:
        """Return chunks [B, H, A] that explore, in the actions' coordinates, and what is to be remembered of them."""

    @abstractmethod
    def policy_loss(
        self, observation: Observation, extras: dict[str, Tensor], advantage: Tensor
    ) -> PolicyLoss:
        """Return the loss of a minibatch.

        Args:
            observation: of M decisions.
            extras: what `draw` remembered of them, [M, ...].
            advantage: [M].
        """

    def clip_widths(self) -> float | Tensor:
        """Return the largest |ratio - 1| of `PolicyLoss.log_ratio`, broadcastable to it."""
        return self.config.clip

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return what the policy's optimizer moves."""
        return list(self.policy.parameters())

    def evaluation_sampler(self) -> Sampler:
        """Return how chunks are drawn when nothing is explored."""
        return self.policy.acting

    def choose(self, observation: Observation) -> Tensor:
        """Return chunks [B, H, A] that do not explore, in the actions' coordinates; noise comes from `acting`."""
        return self.policy.sample(observation, self.acting, sampler=self.evaluation_sampler())

    # ------------------------------------------------------------------------------------ acting

    def start_from(self, policy: DenoisingPolicy) -> None:
        """Begin with a trained policy's weights, and with its encoder in the critic."""
        weights = policy.state_dict()
        self.policy.load_state_dict(weights)
        if self.base is not None:
            self.base.load_state_dict(weights)
        self.critic.condition.load_state_dict(policy.condition.state_dict())
        self.has_base = True

    @torch.no_grad()
    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """Draw chunks; see `Agent.act`.

        Returns:
            Actions float32 [B, h, A] (or [B, A] where the environment takes no chunks), the state as it was given (see
            `follow`), and where it explores what the update needs.
        """
        extras: dict[str, Tensor] = {}
        if explore:
            chunk, extras = self.draw(observation)
            extras["value"] = self.critic(observation)
            if self.config.guidance:
                extras[GUIDED] = torch.zeros(len(chunk), dtype=torch.bool, device=self.device)
        else:
            chunk = self.choose(observation)
        chunk = chunk.clamp(-1, 1)
        executed = chunk[:, : self.executed] if self.chunks.is_chunk else chunk[:, 0]
        return executed.cpu().numpy(), state, extras

    def follow(
        self, action: np.ndarray, state: Any, teacher_action: np.ndarray, extras: dict[str, Tensor]
    ) -> tuple[np.ndarray, Any]:
        """Let the teacher decide in episodes that it begins, until it hands over; see `OnPolicyAgent.follow`.

        The state, float32 [B], says who has decided so far, see `guidance`; 0 where episodes begin.
        """
        config = self.config
        if not config.guidance:
            return action, state
        decides = torch.zeros(len(action), device=self.device) if state is None else state
        share = config.guidance
        if config.guidance_decay:
            share = linear(share, 0.0, config.guidance_decay, self.agent_steps)
        guided = draw_guided(
            decides, share=share, decisions=config.guided_decisions, generator=self.generator
        )
        extras[GUIDED] = guided
        chosen = guided.cpu().numpy().reshape(-1, *[1] * (action.ndim - 1))
        done = np.where(chosen, teacher_action, action).astype(action.dtype)
        return done, torch.where(guided, TEACHER, AGENT)

    def set_progress(self, agent_steps: int) -> None:
        """Remember how far training is, for schedules."""
        self.agent_steps = agent_steps

    def seed_actions(self, seed: int) -> None:
        """Draw the next actions from a fresh stream; see `Agent.seed_actions`."""
        self.acting.manual_seed(seed)

    def greedy(self) -> nn.Module:
        """See `Agent.greedy`.

        Raises:
            UserError: always, the policy draws its actions.
        """
        raise UserError(
            "a policy that denoises draws its actions from noise, and an exported one is a function of the "
            "observation alone; use Policy.load, or export agent 'bc' or 'ppo'"
        )

    # ---------------------------------------------------------------------------------- learning

    def update(self, batch: Experience) -> dict[str, Tensor]:
        """Learn from a rollout, then take its observations into the statistics."""
        if not batch.kept.any():  # every worker died in every step
            return {}
        if self.config.scale_reward:
            take_in_rewards(self.rewards, batch)
        advantage, target = self.credit(batch)
        extras = {name: value.flatten(0, 1) for name, value in batch.extras.items()}
        metrics: list[dict[str, Tensor]] = []
        config = self.config
        for index in passes(
            lambda: batch.minibatches(config.minibatch_size, self.order),
            metrics,
            epochs=config.epochs,
            target_kl=config.target_kl,
        ):
            place = index.to(self.device, non_blocking=True)
            observation = batch.observation(index)
            step = self._critic_step(observation, target[place])
            if self.rollouts >= config.critic_warmup:
                own = {name: value[place] for name, value in extras.items()}
                step |= self._actor_step(observation, own, advantage[place])
            metrics.append(step)
            self.gradient_updates += 1
        self.rollouts += 1
        self._take_in(batch)
        kept = batch.kept.flatten()
        means = mean_metrics(metrics) | value_metrics(extras["value"], target, kept)
        if GUIDED in extras:
            means["policy/guided"] = extras[GUIDED][kept].float().mean()
        return means

    def credit(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Return every decision's advantage, and what its value should be, [T * N] each."""
        config = self.config
        _, advantage = credited(
            experience,
            self._values,
            self.rewards if config.scale_reward else None,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        return advantage.flatten(), (advantage + experience.extras["value"]).flatten()

    def _critic_step(self, observation: Observation, target: Tensor) -> dict[str, Tensor]:
        forget(self.critic_optimizer)
        metrics = self.differentiate(self.critic_gradients, observation, target)
        self.critic_optimizer.step()
        return metrics

    def critic_gradients(self, observation: Observation, target: Tensor) -> dict[str, Tensor]:
        """Leave the gradients of the value's loss on a minibatch."""
        loss = value_loss(self.critic(observation), target)
        norm = backward(self.critic_optimizer, loss, self.config.max_gradient_norm)
        return {"loss/value": loss.detach(), "gradient_norm/value": norm}

    def _actor_step(
        self, observation: Observation, extras: dict[str, Tensor], advantage: Tensor
    ) -> dict[str, Tensor]:
        """Learn from a minibatch: by the surrogate from the policy's own decisions, by cloning from a teacher's."""
        taught, guided = extras.pop(TEACHER_ACTION, None), extras.pop(GUIDED, None)
        now = teacher_weight(
            self.config.teacher_coefficient, self.config.teacher_decay, self.agent_steps
        )
        weight = torch.full((), now, device=self.device) if taught is not None and now else None
        forget(self.actor_optimizer)
        if guided is None:
            metrics = self.differentiate(
                self.actor_gradients, observation, extras, advantage, taught, weight
            )
        else:  # how many decisions are the policy's own differs with every minibatch: nothing to compile
            metrics = self.actor_gradients(
                observation, extras, advantage, taught, weight, own=(~guided).nonzero()[:, 0]
            )
        if metrics:  # none of a teacher's decisions alone, whose chunks are not learned
            self.actor_optimizer.step()
        return metrics

    def actor_gradients(
        self,
        observation: Observation,
        extras: dict[str, Tensor],
        advantage: Tensor,
        taught: Tensor | None,
        weight: Tensor | None,
        own: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Leave the gradients of the policy's loss on a minibatch.

        Args:
            observation: of M decisions.
            extras: what `draw` remembered of them.
            advantage: [M].
            taught: a teacher's chunks.
            weight: of the loss of cloning them, 0-d; None leaves it out.
            own: int64, which decisions are the policy's own; None for all.
        """
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if taught is not None and weight is not None:
            cloning = cloning_loss(self.policy, observation, taught, self.generator)
            losses.append(weight * cloning)
            metrics["loss/teacher"] = cloning.detach()
        if own is not None:
            observation = {name: part[own] for name, part in observation.items()}
            extras = {name: value[own] for name, value in extras.items()}
            advantage = advantage[own]
        if len(advantage):
            if self.config.normalize_advantage:
                advantage = normalized(advantage)
            said = self.policy_loss(observation, extras, advantage)
            losses.append(said.loss)
            metrics |= {
                "loss/policy": said.loss.detach(),
                **ratio_metrics(said.log_ratio, clip=self.clip_widths()),
                **said.metrics,
            }
        if not losses:
            return {}
        total = torch.stack(losses).sum()
        norm = backward(self.actor_optimizer, total, self.config.max_gradient_norm)
        return metrics | {"gradient_norm/policy": norm}

    def gradient_sizes(self) -> set[int]:
        """See `Agent.gradient_sizes`; those of the minibatches of a rollout that lost no decision."""
        return part_sizes(self.config.rollout_length * self.num_envs, self.config.minibatch_size)

    @torch.no_grad()
    def _values(self, observation: Observation) -> Tensor:
        return self.critic(observation)

    def _take_in(self, experience: Experience) -> None:
        """Update the statistics by which the next rollout's states are normalized."""
        config = self.config
        if self.moments is None or self.has_base or not config.normalize_observation:
            return
        self.moments.update(experience.kept_states())
        encoders = [self.policy.condition, self.critic.condition]
        for encoder in encoders if self.base is None else [*encoders, self.base.condition]:
            normalizer = encoder.ranges["state"]
            assert isinstance(normalizer, RangeNormalizer)
            normalizer.center.copy_(self.moments.mean)
            normalizer.half_range.copy_((self.moments.variance + 1e-8).sqrt())

    # ------------------------------------------------------------------------------------- state

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save, statistics among them."""
        parts: dict[str, nn.Module | None] = {
            "policy": self.policy, "critic": self.critic, "base": self.base, "moments": self.moments,
            "rewards": self.rewards,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers to save."""
        return {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    def extra_state(self) -> dict[str, Any]:
        """Return generators and counters."""
        return {
            "order": self.order.bit_generator.state,
            "acting": self.acting.get_state(),
            "gradient_updates": self.gradient_updates,
            "rollouts": self.rollouts,
            "has_base": self.has_base,
            "running_returns": self.rewards.running.clone(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""
        self.order.bit_generator.state = state["order"]
        self.acting.set_state(state["acting"].cpu())
        self.gradient_updates, self.rollouts = state["gradient_updates"], state["rollouts"]
        self.has_base = state["has_base"]
        self.rewards.running.copy_(state["running_returns"])
