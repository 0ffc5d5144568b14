"""Imitation: Diffusion Policy, flow policy and Gaussian behavior cloning, which differ by settings and by their policy.

Diffusion Policy (Chi et al. 2023, https://arxiv.org/abs/2303.04137) learns to remove noise from demonstrated chunks of
actions; with rectified flow (Liu et al. 2023, https://arxiv.org/abs/2209.03003) the same network says the velocity.
An average of the parameters acts: it predicts H actions, of which the environment executes h.

Differences from the paper's code:

- The learning rate stays as it is after its warm-up; there a cosine brings it to 0. A run can so go on with more
  steps, and the average of the parameters calms the policy as the decay does.
- Chunks begin with the action at the newest picture; there they begin at the oldest one of the stack.
- A stack's pictures lie h actions apart, as an environment of chunks shows them; there they are neighbors.
- Only pictures stack: the policy sees the newest state alone; there it sees the last two.
- Random shifts (DrQ) instead of random crops; the picture keeps its size.
- Actions past an episode's end are not learned unless `mask_padding` is off; there the last one is repeated.
- Actions are those of the task, in [-1, 1], and not stretched to the range of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.core.agent import Observation, ReplaySettings
from agents.core.demonstrations import ChunkBatch, Demonstrations
from agents.core.errors import UserError
from agents.core.fields import observation_boxes
from agents.core.offline import OfflineAgent
from agents.core.parameter_averages import ParameterAverage
from agents.core.pictures import overlay_grid
from agents.core.saliency import frame_saliency, input_gradient
from agents.generative_policies.gaussian import GaussianConfig, GaussianPolicy
from agents.generative_policies.parts import DenoisingConfig
from agents.generative_policies.policy import DenoisingPolicy
from agents.on_policy.config import Ranges, at_least_one, check_ranges, not_negative

ChunkPolicy = DenoisingPolicy | GaussianPolicy


@dataclass(frozen=True)
class LearningConfig:
    """How imitation learns; defaults from Diffusion Policy unless a field says otherwise."""

    batch_size: int = 256
    """Samples per gradient step."""
    learning_rate: float = 1e-4
    """AdamW step size (DPPO 1e-3 from states)."""
    weight_decay: float = 1e-6
    """AdamW weight decay."""
    warmup: int = 500
    """Gradient steps until the learning rate is whole."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm (LeRobot's diffusion policy 10)."""
    ema_decay: float = 0.999
    """Largest share that the acting average keeps in a step (Diffusion Policy .9999, DPPO .995)."""
    ema_power: float = 0.75
    """How fast the average's share grows to it; 0 for the same share throughout."""
    pad: int = 4
    """Largest random shift of pictures in pixels at 84 x 84, scaled with the picture; 0 for none (DrQ 4)."""
    mask_padding: bool = True
    """Learn only actions that were taken, not the last one repeated beyond an episode's end (ACT; Diffusion Policy
    learns these too)."""

    RANGES: ClassVar[Ranges] = (
        ("batch_size", at_least_one, "a positive number"),
        ("learning_rate max_gradient_norm", lambda value: 0 < value < math.inf, "a positive number"),
        ("weight_decay warmup pad ema_power", not_negative, "0 or more"),
        ("ema_decay", lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Reject values that nothing can be learned with."""
        check_ranges(self)


@dataclass(frozen=True)
class DenoisingImitationConfig(DenoisingConfig):
    """A denoising policy that imitates."""

    draws: int = 1
    """Pairs of noise and time for each sample of a batch, which share one pass through the encoder (BEHAVIOR 2025's
    winner 15)."""

    RANGES: ClassVar[Ranges] = (("draws", at_least_one, "a positive number"),)


DIFFUSION_POLICY = DenoisingImitationConfig(
    path="diffusion", prediction="noise", rule="posterior", clip_x0=1.0, denoiser="unet", time_features=256,
)  # fmt: skip
"""Chi et al.'s diffusion and U-Net, acting by DDIM."""


ACTING = (
    "rule", "denoising_steps", "noise_level", "min_std", "start_noise", "clip_x0", "inpaint", "inpaint_until",
)  # fmt: skip
"""Fields that no weight depends on."""


class Imitation(OfflineAgent):
    """Learns to act as demonstrations do.

    Args:
        observation_space: pixels, state, other vectors, or a Dict of these.
        action_space: Box [A], or [h, A] of an environment that takes chunks.
        policy: what learns.
        learning: how.
        device: where networks live.
        seed: of weights, noise and augmentation.
        draws: noise levels for each sample of a batch.
        inpaint: begin a chunk with what the last one predicted.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        make_policy: Callable[[dict[str, gym.spaces.Box], gym.Space], ChunkPolicy],
        learning: LearningConfig,
        *,
        draws: int = 1,
        inpaint: bool = False,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.learning, self.draws, self.inpaint = learning, draws, inpaint
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # Not saved: learning never acts, and evaluations begin a stream of their own.
        self.acting = torch.Generator(self.device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # weights are drawn on the CPU: the same on every device
            self.policy = make_policy(observation_boxes(observation_space), action_space)
        self.policy.to(self.device)
        self.chunks = self.policy.chunks
        self.horizon, self.executed = self.policy.config.horizon, self.chunks.executed
        self.average: ParameterAverage[Any] = ParameterAverage(
            self.policy, decay=learning.ema_decay, power=learning.ema_power
        )
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=learning.learning_rate,
            betas=(0.95, 0.999),
            weight_decay=learning.weight_decay,
        )
        self.replay_settings = ReplaySettings(learning.batch_size, 1, 1.0)

    def prepare(self, demonstrations: Demonstrations) -> None:
        """Take ranges and correlations of the data.

        Raises:
            UserError: no episode is as long as a chunk.
        """
        if demonstrations.longest < self.executed:
            raise UserError(
                f"a chunk of {self.executed} actions is longer than the longest episode, which has "
                f"{demonstrations.longest}; lower --action-chunk"
            )
        self.policy.prepare(demonstrations)
        self.average.module.load_state_dict(self.policy.state_dict())

    def set_progress(self, agent_steps: int) -> None:
        """Warm the learning rate up."""
        learning = self.learning
        share = min(1.0, (agent_steps + 1) / learning.warmup) if learning.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = share * learning.learning_rate

    def update(self, batch: ChunkBatch) -> dict[str, Tensor]:
        """Take one gradient step, and move the average."""
        observation = self.policy.condition.shift(
            batch.observation, self.generator, self.learning.pad
        )
        mask = batch.mask if self.learning.mask_padding else None
        loss = self.policy.loss(
            observation, batch.chunk, self.generator, mask=mask, draws=self.draws
        ).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.learning.max_gradient_norm)
        self.optimizer.step()
        self.average.update(self.policy)
        return {"loss/imitation": loss.detach(), "gradient/norm": norm.detach()}

    @torch.no_grad()
    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """Draw chunks; a Gaussian policy that does not explore gives its mean.

        The state, where chunks are inpainted, is what was predicted beyond the executed actions: [B, H - h, A], with
        NaN in rows whose episode begins.

        Returns:
            Actions float32 [B, h, A] (or [B, A] where the environment takes no chunks), the next state, and no extras.
        """
        policy = self.average.module
        draws = isinstance(policy, DenoisingPolicy) or explore
        chunk = policy.sample(
            observation,
            self.acting if draws else None,
            previous=state if self.inpaint else None,
        )
        executed = chunk[:, : self.executed] if self.chunks.is_chunk else chunk[:, 0]
        left = chunk[:, self.executed :] if self.inpaint else None
        return executed.cpu().numpy(), left, {}

    def saliency(self, observation: Observation, action: Tensor) -> Tensor | None:
        """Return what the size of the executed actions depends on, by guided backpropagation; see `Agent.saliency`."""
        if "pixels" not in observation:
            return None
        with torch.enable_grad():
            pixels = observation["pixels"].float().requires_grad_()
            chunk = self.average.module.likely({**observation, "pixels": pixels})
            size = chunk[:, : self.executed].abs().flatten(1).sum(1)
            return frame_saliency(input_gradient(size, pixels, "guided")).float()

    def images(self, observation: Observation, action: Tensor) -> dict[str, np.ndarray]:
        """Return the saliency over the newest frames."""
        seen = self.saliency(observation, action)
        return {} if seen is None else {"saliency": overlay_grid(observation["pixels"], seen)}

    def greedy(self) -> nn.Module:
        """See `Agent.greedy`.

        Raises:
            UserError: the policy draws its actions.
        """
        policy = self.average.module
        if not isinstance(policy, GaussianPolicy):
            raise UserError(
                "a policy that denoises draws its actions from noise, and an exported one is a function of the "
                "observation alone; use Policy.load, or export agent 'bc'"
            )
        return GreedyChunks(policy)

    def reset_state(self, state: Tensor | None, begins: np.ndarray) -> Tensor | None:
        """Return a state that knows no last chunk where episodes begin.

        Args:
            state: see `act`.
            begins: bool [B].
        """
        if state is None:
            return None
        mask = torch.as_tensor(begins, device=state.device)
        return state.masked_fill(mask.view(-1, 1, 1), torch.nan)

    def seed_actions(self, seed: int) -> None:
        """Draw the next actions from a fresh stream; see `Agent.seed_actions`."""
        self.acting.manual_seed(seed)

    def networks(self) -> dict[str, nn.Module]:
        """Return what learns and what acts."""
        return {"policy": self.policy, "average": self.average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizer to save."""
        return {"policy": self.optimizer}


class GreedyChunks(nn.Module):
    """The executed part of a Gaussian policy's mean; the network is the agent's own.

    Args:
        policy: whose.
    """

    def __init__(self, policy: GaussianPolicy) -> None:
        super().__init__()
        self.networks = nn.ModuleList([policy])

    def forward(self, pixels: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Return actions, float32 [B, h, A], or [B, A] where the environment takes no chunks.

        Args:
            pixels: uint8 [B, 3*k, H, W]; the parts of the observation that the agent was built for.
            state: float32 [B, D].
        """
        (policy,) = self.networks
        assert isinstance(policy, GaussianPolicy)
        seen = {"pixels": pixels, "state": state}
        chunk = policy.sample({name: part for name, part in seen.items() if part is not None})
        executed, _, is_chunk = policy.chunks
        return chunk[:, :executed] if is_chunk else chunk[:, 0]


def denoising_imitation(
    observation_space: gym.Space,
    action_space: gym.Space,
    config: DenoisingImitationConfig,
    learning: LearningConfig,
    **keywords: Any,
) -> Imitation:
    """Build an agent whose policy denoises."""

    def make_policy(spaces: dict[str, gym.spaces.Box], actions: gym.Space) -> DenoisingPolicy:
        return DenoisingPolicy(spaces, actions, config)

    return Imitation(
        observation_space, action_space, make_policy, learning,
        draws=config.draws, inpaint=config.inpaint, **keywords,
    )  # fmt: skip


def behavior_cloning(
    observation_space: gym.Space,
    action_space: gym.Space,
    config: GaussianConfig,
    learning: LearningConfig,
    **keywords: Any,
) -> Imitation:
    """Build an agent whose policy is a Gaussian."""

    def make_policy(spaces: dict[str, gym.spaces.Box], actions: gym.Space) -> GaussianPolicy:
        return GaussianPolicy(spaces, actions, config)

    return Imitation(observation_space, action_space, make_policy, learning, **keywords)
