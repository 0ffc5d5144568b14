"""Many small PPO learners at once: one batched matrix product steps all of them.

A learner has its own networks, environments and seed, and nothing that it does depends on its neighbors; those of one
seed share every random number (first weights, first states, noise of actions, order of minibatches), so that only their
surrogates tell them apart. Every iteration is one episode in each environment, cut off by the time limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.core.advantages import generalized_advantage
from agents.core.errors import UserError
from experiments.evolving.tasks import Task

Surrogate = Callable[[Tensor, Tensor], Tensor]
"""From log-ratios and advantages [M, N] to losses [M, N]."""


@dataclass(frozen=True)
class LearnerConfig:
    """What every learner does; small enough that a generation takes seconds."""

    iterations: int = 24
    """Rollouts, each followed by an update."""
    num_envs: int = 16
    """Environments of one learner."""
    epochs: int = 4
    """Passes over a rollout (the authors' code: 4 on Ant)."""
    minibatches: int = 4
    """Gradient steps per pass."""
    learning_rate: float = 1e-2
    """Adam step size; so large that without a drift the policy is lost."""
    discount: float = 0.95
    """Discount per step."""
    gae_lambda: float = 0.95
    """Lambda of the generalized advantage estimate."""
    hidden: int = 16
    """Width of the two hidden layers of policy and value."""
    initial_log_std: float = -0.5
    """Log standard deviation of the actions at the start."""
    max_gradient_norm: float = 0.5
    """Every learner's gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        """Reject values that nothing can learn with."""
        for name in ("iterations", "num_envs", "epochs", "minibatches", "hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if not 0 <= self.discount < 1 or not 0 <= self.gae_lambda <= 1:
            raise UserError(
                f"discount is {self.discount} and gae_lambda {self.gae_lambda}; give numbers in [0, 1) and [0, 1]"
            )
        if not math.isfinite(self.initial_log_std):
            raise UserError(f"initial_log_std is {self.initial_log_std}; give a finite number")


class Networks(NamedTuple):
    """Parameters of M learners, each [M, ...]."""

    policy: list[Tensor]
    """Weight [M, in, out] and bias [M, 1, out] of every layer, then the log standard deviation [M, 1, A]."""
    value: list[Tensor]
    """Weight and bias of every layer."""


class Draws(NamedTuple):
    """What one iteration of M learners takes from chance."""

    first: Tensor
    """Uniform [M, E, state_size]."""
    noise: Tensor
    """Normal [T, M, E, A]."""
    order: Tensor
    """Permutations of T * E samples, int64 [epochs, M, T * E]."""


def first_networks(task: Task, config: LearnerConfig, generator: torch.Generator) -> Networks:
    """Return the first parameters of one learner, [1, ...]: orthogonal, a policy that begins near 0."""

    def layers(sizes: Sequence[int], last_gain: float) -> list[Tensor]:
        parameters = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            weight = torch.empty(outputs, inputs)
            gain = last_gain if i == len(sizes) - 2 else 2**0.5
            nn.init.orthogonal_(weight, gain, generator=generator)
            parameters += [weight.T.contiguous()[None], torch.zeros(1, 1, outputs)]
        return parameters

    width, seen = config.hidden, task.observation_size
    policy = layers((seen, width, width, task.action_size), 0.01)
    policy.append(torch.full((1, 1, task.action_size), config.initial_log_std))
    return Networks(policy, layers((seen, width, width, 1), 1.0))


def draw(task: Task, config: LearnerConfig, generator: torch.Generator) -> Draws:
    """Return what one iteration of one learner takes from chance."""
    envs, steps = config.num_envs, task.horizon
    first = torch.rand(1, envs, task.state_size, generator=generator)
    noise = torch.randn(steps, 1, envs, task.action_size, generator=generator)
    orders = [torch.randperm(steps * envs, generator=generator)[None] for _ in range(config.epochs)]
    return Draws(first, noise, torch.stack(orders))


def perceptron(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Return [M, N, out] of M networks for inputs [M, N, in]."""
    x = inputs
    for i in range(0, len(parameters) - 2, 2):
        x = torch.tanh(torch.baddbmm(parameters[i + 1], x, parameters[i]))
    return torch.baddbmm(parameters[-1], x, parameters[-2])


def log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Return log-densities of Gaussians [*] less their constant, which no ratio has."""
    return -(0.5 * ((action - mean) * torch.exp(-log_std)).square() + log_std).sum(-1)


def learn(
    task: Task,
    surrogate: Surrogate,
    seeds: Sequence[int],
    config: LearnerConfig,
    tell: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return every learner's mean return before each update, float32 [M, iterations].

    Args:
        task: what all of them learn.
        surrogate: what keeps policies near those that acted.
        seeds: M seeds, one per learner.
        config: settings of all.
        tell: called after every iteration.
    """
    distinct = sorted(set(seeds))
    which = torch.tensor([distinct.index(seed) for seed in seeds])
    generators = [torch.Generator().manual_seed(seed) for seed in distinct]
    first = [first_networks(task, config, generator) for generator in generators]
    networks = Networks(
        *(
            [torch.cat(same)[which].requires_grad_() for same in zip(*part, strict=True)]
            for part in zip(*first, strict=True)
        )
    )
    parameters = [*networks.policy, *networks.value]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=1e-5)
    returns = []
    for _ in range(config.iterations):
        drawn = [draw(task, config, generator) for generator in generators]
        draws = Draws(
            torch.cat([d.first for d in drawn])[which],
            torch.cat([d.noise for d in drawn], 1)[:, which],
            torch.cat([d.order for d in drawn], 1)[:, which],
        )
        samples, episode_return = roll_out(task, networks, draws, config)
        returns.append(episode_return)
        for order in draws.order:
            for index in order.chunk(config.minibatches, -1):
                chosen = [s.take_along_dim(index[..., None], 1) for s in samples]
                optimizer.zero_grad(set_to_none=True)
                losses(networks, Samples(*chosen), surrogate).sum().backward()
                clip_gradients(parameters, config.max_gradient_norm)
                optimizer.step()
        tell()
    return torch.stack(returns, -1)


def final_return(returns: Tensor) -> Tensor:
    """Return the mean [M] over the last quarter of the iterations of returns [M, iterations]."""
    return returns[:, -max(returns.shape[1] // 4, 1) :].mean(1)


class Samples(NamedTuple):
    """Steps of M learners in one row, [M, N, ...]."""

    observation: Tensor
    action: Tensor
    log_prob: Tensor
    """[M, N, 1], under the policy that acted."""
    advantage: Tensor
    """[M, N, 1]."""
    target: Tensor
    """[M, N, 1], of the value."""


@torch.no_grad()
def roll_out(
    task: Task, networks: Networks, draws: Draws, config: LearnerConfig
) -> tuple[Samples, Tensor]:
    """Return an episode of every environment, and every learner's mean return [M].

    Values are of rewards times (1 - discount), which lie in about [-1, 1] whatever the discount.
    """
    state, log_std = task.reset(draws.first), networks.policy[-1]
    observations, actions, log_probs, rewards = [task.observe(state)], [], [], []
    for noise in draws.noise:
        mean = perceptron(networks.policy[:-1], observations[-1])
        action = mean + log_std.exp() * noise
        log_probs.append(log_prob(mean, log_std, action))
        actions.append(action)
        state, reward = task.step(state, action)
        rewards.append(reward)
        observations.append(task.observe(state))
    seen = torch.stack(observations)  # [T + 1, M, E, O]
    by_learner = seen.transpose(0, 1)
    value = perceptron(networks.value, by_learner.flatten(1, 2))
    value = value.view(by_learner.shape[:3]).transpose(0, 1)
    reward = torch.stack(rewards)
    cut = torch.zeros_like(reward, dtype=torch.bool)
    advantage = generalized_advantage(
        (1 - config.discount) * reward,
        value[:-1],
        value[1:],
        terminated=cut,
        truncated=cut,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
    )

    def row(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)

    kept = (seen[:-1], torch.stack(actions), torch.stack(log_probs)[..., None],
            advantage[..., None], (advantage + value[:-1])[..., None])  # fmt: skip
    return Samples(*map(row, kept)), reward.sum(0).mean(-1)


def losses(networks: Networks, samples: Samples, surrogate: Surrogate) -> Tensor:
    """Return every learner's loss [M]: the surrogate of normalized advantages, and half the value's squared error."""
    mean = perceptron(networks.policy[:-1], samples.observation)
    now = log_prob(mean, networks.policy[-1], samples.action)
    advantage = samples.advantage[..., 0]
    advantage = (advantage - advantage.mean(-1, keepdim=True)) / (
        advantage.std(-1, keepdim=True) + 1e-8
    )
    policy = surrogate(now - samples.log_prob[..., 0], advantage).mean(-1)
    value = perceptron(networks.value, samples.observation)
    return policy + 0.5 * (value - samples.target).square().mean((-1, -2))


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> None:
    """Scale every learner's gradient down to a norm, where it is larger."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (largest / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
