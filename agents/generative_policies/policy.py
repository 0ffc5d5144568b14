"""One policy that denoises chunks of actions, for imitation, fine-tuning and as somebody's frozen base.

`DenoisingPolicy` is an encoder of observations, a network that denoises, and what both are used with: a path, a
prediction, and samplers. It knows its loss (per sample, and at given noise and times, as FPO needs it), draws chunks
(with the whole chain, as DPPO and ReinFlow need it) and says how likely a chain is under its parameters now.

Chunks are [B, H, A] in [-1, 1]: H actions are predicted, of which an environment executes the first h (receding
horizon).
Sampling times and the times of log-probabilities are one grid: that of the `Sampler` that both take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import gymnasium as gym
import torch
from torch import Tensor, nn

from agents.core.agent import Observation
from agents.core.chain_steps import Fixed, Generators, Limits, standard_normal
from agents.core.demonstrations import Demonstrations
from agents.core.denoising import corrupt, draw_times, squared_error
from agents.core.errors import UserError
from agents.core.packed_convolutions import packed
from agents.core.sampling import Chain, Denoiser, Sampler
from agents.core.step_rules import Posterior, StepRule
from agents.generative_policies.conditions import ConditionEncoder
from agents.generative_policies.noise import ChunkNoise
from agents.generative_policies.parts import (
    DenoisingConfig,
    make_denoiser,
    make_path,
    make_rule,
    read_chunks,
)

LOOKING_STEPS = 2
"""Steps of the chain whose gradient tells where a policy looks: enough to leave the noise, where little is seen."""


class DenoisingPolicy(nn.Module):
    """A distribution over chunks of actions given an observation.

    Args:
        spaces: of the observation's parts; see `fields.observation_boxes`.
        action_space: the environment's, see `parts.read_chunks`.
        config: what it is made of.

    Attributes:
        condition: observation -> float32 [B, C].
        denoiser: (chunk [B, H, A], t [B], condition [B, C]) -> prediction [B, H, A], in the actions' own coordinates.
        noise: how noise is correlated; None where it is white.
        path: data to noise.
        acting: the sampler of the config.

    Raises:
        UserError: a chunk is shorter than what the environment executes, or a setting does not fit another.
    """

    def __init__(
        self,
        spaces: Mapping[str, gym.spaces.Box],
        action_space: gym.Space,
        config: DenoisingConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.chunks = read_chunks(action_space, config.horizon)
        if config.inpaint and config.horizon == self.chunks.executed:
            raise UserError(
                f"nothing is left to inpaint with: horizon and chunk are both {config.horizon}; raise --horizon"
            )
        self.shape = (config.horizon, self.chunks.action)
        self.condition = ConditionEncoder(spaces, config)
        self.denoiser = make_denoiser(config, self.chunks, self.condition.out_features)
        self.noise: ChunkNoise | None = None
        if config.noise_correlation:
            self.noise = ChunkNoise(*self.shape, config.noise_correlation)
        self.path = make_path(config)
        self.acting = self.sampler()

    def prepare(self, demonstrations: Demonstrations) -> None:
        """Take the ranges of states and the correlation of chunks from data."""
        self.condition.fit(demonstrations)
        if self.noise is not None:
            whole = (batch.chunk[batch.mask.all(1)] for batch in demonstrations.batches(1024))
            self.noise.fit(whole)

    def sampler(
        self,
        rule: StepRule | None = None,
        *,
        steps: int | None = None,
        limits: Limits | None = None,
    ) -> Sampler:
        """Return a sampler of this policy; what is not given is the config's.

        Args:
            rule: of its steps.
            steps: how many.
            limits: clips and floors; chunks are cut to [-1, 1] in any case.

        Raises:
            UserError: they do not go together.
        """
        config = self.config
        return Sampler(
            self.path,
            config.prediction,
            rule or make_rule(config.rule, config.noise_level),
            self.path.times(steps or config.denoising_steps),
            limits or Limits(x0=config.clip_x0 or None, min_std=config.min_std),
        )

    # ------------------------------------------------------------------------------------ learning

    def loss(
        self,
        observation: Observation,
        chunk: Tensor,
        generator: torch.Generator,
        *,
        mask: Tensor | None = None,
        draws: int = 1,
    ) -> Tensor:
        """Return the denoising loss of every sample, [B], at random noise and times.

        Args:
            observation: see `ConditionEncoder`.
            chunk: [B, H, A], what was done.
            generator: of noise and times, on the device.
            mask: bool [B, H], actions that count; None is all.
            draws: pairs of noise and time a sample, which share one pass through the encoder.
        """
        condition = self.condition(observation)
        if draws > 1:
            condition, chunk = (x.repeat_interleave(draws, 0) for x in (condition, chunk))
            mask = None if mask is None else mask.repeat_interleave(draws, 0)
        t = self.training_times(len(chunk), generator, device=chunk.device)
        noise = standard_normal(chunk.shape, generator, device=chunk.device)
        return self.loss_at(condition, chunk, noise, t, mask=mask).view(-1, draws).mean(1)

    def training_times(
        self, shape: int | tuple[int, ...], generator: torch.Generator, *, device: torch.device
    ) -> Tensor:
        """Return random times of the losses that the network learns from, as the config says, float32 of `shape`."""
        first, second = self.config.numbers_of_times
        return draw_times(
            self.path,
            shape,
            generator,
            distribution=self.config.times,
            first=first,
            second=second,
            device=device,
        )

    def loss_at(
        self,
        condition: Tensor,
        chunk: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the denoising loss [B] at given standard normal noise [B, H, A] and times [B]."""
        colored = noise if self.noise is None else self.noise.color(noise)
        x, target = corrupt(self.path, self.config.prediction, chunk, colored, t)
        counted = None if mask is None else mask.unsqueeze(-1)
        return squared_error(self.denoiser(x, t, condition), target, mask=counted)

    # ------------------------------------------------------------------------------------- acting

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the network's prediction in the coordinates that chains run in; see `noise`."""
        if self.noise is None:
            return self.denoiser(x, t, condition)
        return self.noise.whiten(self.denoiser(self.noise.color(x), t, condition))

    def start(self, count: int, generator: Generators | None, device: torch.device) -> Tensor:
        """Return what chains start from, [count, H, A] in their coordinates.

        Raises:
            UserError: noise without a generator.
        """
        shape = (count, *self.shape)
        if self.config.start_noise == 0:
            return torch.zeros(shape, device=device)
        if generator is None:
            raise UserError("chains start from noise; give a generator, or set start_noise to 0")
        return self.config.start_noise * standard_normal(shape, generator, device=device)

    def sample(
        self,
        observation: Observation,
        generator: Generators | None = None,
        *,
        sampler: Sampler | None = None,
        previous: Tensor | None = None,
        noise_network: Denoiser | None = None,
    ) -> Tensor:
        """Return chunks [B, H, A] in [-1, 1].

        Args:
            observation: see `ConditionEncoder`.
            generator: of all noise; chains without any need none.
            sampler: another than the config's.
            previous: [B, O, A], what is to be done first as far as it was decided, for inpainting; rows of NaN for
                none.
            noise_network: see `Sampler.step`.
        """
        condition, sampler = self.condition(observation), sampler or self.acting
        x = self.start(condition.shape[0], generator, condition.device)
        until = 0
        if previous is not None:
            levels = [point.t for point in sampler.points[1:]]
            until = sum(t >= self.config.inpaint_until for t in levels)
        with packed():
            if until:
                assert previous is not None
                fixed = self._fixed(previous, x)
                x = sampler.sample(
                    self.denoise, x, condition, generator,
                    steps=range(until), fixed=fixed, noise_network=noise_network,
                )  # fmt: skip
            if until < sampler.steps:
                x = sampler.sample(
                    self.denoise, x, condition, generator,
                    steps=range(until, sampler.steps), noise_network=noise_network,
                )  # fmt: skip
        return self._done(x)

    def likely(self, observation: Observation) -> Tensor:
        """Return a chunk [B, H, A] that depends on the observation alone, differentiable and not cut off: no noise."""
        condition = self.condition(observation)
        steps = min(LOOKING_STEPS, self.path.knots or LOOKING_STEPS)
        sampler = self.sampler(Posterior(0.0), steps=steps, limits=Limits())
        x = torch.zeros(condition.shape[0], *self.shape, device=condition.device)
        x = sampler.sample(self.denoise, x, condition)
        return x if self.noise is None else self.noise.color(x)

    def chain(
        self,
        observation: Observation,
        generator: Generators | None = None,
        *,
        sampler: Sampler | None = None,
        noise_network: Denoiser | None = None,
    ) -> Chain:
        """Return chunks with the chains that led to them: `data` [B, H, A] in [-1, 1], samples in chains' coordinates.

        Arguments as of `sample`.
        """
        condition, sampler = self.condition(observation), sampler or self.acting
        start = self.start(condition.shape[0], generator, condition.device)
        chain = sampler.chain(
            self.denoise, start, condition, generator, noise_network=noise_network
        )
        return dataclasses.replace(chain, data=self._done(chain.data))

    def log_prob(
        self,
        observation: Observation,
        chain: Chain,
        *,
        sampler: Sampler | None = None,
        noise_network: Denoiser | None = None,
    ) -> Tensor:
        """Return the log-probabilities of a chain's steps under the parameters now, [len(stochastic), B, H, A].

        Args:
            observation: in which the chain was drawn.
            chain: of `chain`.
            sampler: that drew it.
            noise_network: see `Sampler.step`.

        Raises:
            UserError: no step of the chain draws noise.
        """
        condition, sampler = self.condition(observation), sampler or self.acting
        if not chain.stochastic:
            raise UserError(
                "no step of the chain draws noise, so it has no log-probability; use rule posterior or flow_sde with "
                "a noise_level above 0"
            )
        return torch.stack(
            [
                sampler.log_prob(
                    self.denoise,
                    chain.samples[index - chain.first],
                    chain.samples[index - chain.first + 1],
                    index,
                    condition,
                    noise_network=noise_network,
                )
                for index in chain.stochastic
            ]
        )

    def _fixed(self, previous: Tensor, start: Tensor) -> Fixed:
        """Return the first actions as coordinates that a chain from `start` does not choose."""
        known = previous.shape[1]
        whole = torch.zeros_like(start)
        whole[:, :known] = previous.nan_to_num()
        mask = torch.zeros_like(start, dtype=torch.bool)
        mask[:, :known] = ~previous.isnan()
        return Fixed(mask, whole if self.noise is None else self.noise.whiten(whole), start)

    def colored(self, x: Tensor) -> Tensor:
        """Return a chain's sample [B, H, A] in the actions' coordinates; see `noise`."""
        return x if self.noise is None else self.noise.color(x)

    def _done(self, x: Tensor) -> Tensor:
        """Return a chain's result as actions."""
        return self.colored(x).clamp(-1, 1)
