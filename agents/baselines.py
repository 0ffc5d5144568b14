"""Policies that Stable-Baselines3 trained, acting in our tasks (Raffin et al. 2021, https://jmlr.org/papers/v22/20-1364).

    agent = load_sb3("model.zip", env.observation_space, env.action_space)
    action, _, _ = agent.act(observation, explore=False)

MlpPolicy and CnnPolicy (NatureCNN) of PPO and A2C, MlpPolicy of SAC and TD3; the layout is told by the tensors' names
and shapes, and no code of the zip's author runs. Everything else needs `trust_pickle=True`, with which
Stable-Baselines3 itself loads the zip.

Differences from Stable-Baselines3's `predict`:
- Actions are in [-1, 1], as our tasks take them, whatever range the policy was trained with; to most tasks from
  Gymnasium that is the same action.
- TD3 and policies with state-dependent exploration act greedily when asked to explore: a zip keeps no noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.baseline_files import TRUST, BaselineFile, Normalization
from agents.baseline_networks import BaselineNetwork, UnknownFormError, build_network
from agents.core.agent import Agent, Observation, ReplaySettings
from agents.core.distributions import Categorical, Gaussian
from agents.core.errors import UserError
from agents.core.fields import observation_boxes
from agents.core.pictures import overlay_grid
from agents.core.saliency import frame_saliency, input_gradient

BASELINE = "sb3-"
"""How the names of Stable-Baselines3's agents begin, in run folders and on the command line."""

MODEL, NORMALIZATION, PROGRESS = "model.zip", "normalization.json", "progress.json"
"""Files of such a run folder: what `model.save` wrote, the statistics of `VecNormalize` where it has some, and how far
it came, of which the zip does not know the frames."""


class SB3Agent(Agent):
    """Acts as a Stable-Baselines3 policy does; it cannot learn.

    Args:
        network: its layers.
        action_space: the task's: Box(-1, 1) or Discrete.
        bounds: smallest and largest actions of its training, float64 [A] each; None where they are -1 and 1, or
            actions are numbered.
        device: where it acts.
        seed: of exploration.
    """

    def __init__(
        self,
        network: BaselineNetwork,
        action_space: gym.Space,
        bounds: tuple[np.ndarray, np.ndarray] | None,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.network, self.device = network.to(device).eval(), torch.device(device)
        self.shape, self.bounds = action_space.shape or (), bounds
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.replay_settings = ReplaySettings(1, 1, 1.0)

    @torch.no_grad()
    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """See `Agent.act`; there are no extras."""
        head, log_std = self.network(self.network.prepare(observation))
        if not self.shape:
            policy = Categorical(head)
            action = policy.sample(self.generator) if explore else policy.mode()
            return action.cpu().numpy(), None, {}
        if explore and log_std is not None:
            head = Gaussian(head, log_std).sample(self.generator)
        return self.to_unit(head).unflatten(-1, self.shape).cpu().numpy(), None, {}

    def greedy(self) -> nn.Module:
        """See `Agent.greedy`."""
        return GreedyBaseline(self)

    def to_unit(self, head: Tensor) -> Tensor:
        """Return what the policy's training sent after clipping or squashing, [B, A] in [-1, 1]."""
        if self.network.squashes:
            return torch.tanh(head)
        if self.bounds is None:
            return head.clamp(-1, 1)
        low, high = (torch.as_tensor(bound, device=head.device) for bound in self.bounds)
        return (2 * (head.double() - low) / (high - low) - 1).clamp(-1, 1).float()

    def update(self, batch: Any) -> dict[str, Tensor]:
        """Refuse: what a zip holds of its training is not ours to go on with."""
        raise UserError(
            "a policy of Stable-Baselines3 acts here, and does not learn; train it with Stable-Baselines3, "
            "or one of ours with experiments.train"
        )

    def saliency(self, observation: Observation, action: Tensor) -> Tensor | None:
        """Return where the value looks, by guided backpropagation."""
        if "pixels" not in observation or self.network.critic is None:
            return None
        with torch.enable_grad():
            prepared = self.network.prepare(observation).requires_grad_()
            value = self.network.value(prepared)
            assert value is not None
            return frame_saliency(input_gradient(value, prepared, "guided"))

    def images(self, observation: Observation, action: Tensor) -> dict[str, np.ndarray]:
        """Return the saliency over the newest frames."""
        seen = self.saliency(observation, action)
        return {} if seen is None else {"saliency": overlay_grid(observation["pixels"], seen)}

    def networks(self) -> dict[str, nn.Module]:
        """Return the policy."""
        return {"policy": self.network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return none."""
        return {}


class GreedyBaseline(nn.Module):
    """The greedy action of an `SB3Agent` as a function of tensors."""

    def __init__(self, agent: SB3Agent) -> None:
        super().__init__()
        self.network, self._agent = agent.network, agent

    def forward(self, pixels: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Return actions, float32 [B, *shape] in [-1, 1], or int64 [B]."""
        parts = {"pixels": pixels, "state": state}
        head, _ = self.network(
            self.network.prepare({k: v for k, v in parts.items() if v is not None})
        )
        if not self._agent.shape:
            return head.argmax(-1)
        return self._agent.to_unit(head).unflatten(-1, self._agent.shape)


class UnpickledAgent(SB3Agent):
    """Acts by a policy that Stable-Baselines3 itself has loaded, whatever its form."""

    def __init__(self, policy: Any, action_space: gym.Space, device: torch.device | str) -> None:
        super().__init__(BaselineNetwork(), action_space, None, device=device)
        self.policy = policy

    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """See `Agent.act`.

        Raises:
            UserError: the policy is recurrent, and would begin anew at every step.
        """
        arrays = {key: value.cpu().numpy() for key, value in observation.items()}
        if self.network.normalization is not None:
            arrays["state"] = self.network.normalization(observation["state"]).cpu().numpy()
        lone = arrays if len(arrays) > 1 else next(iter(arrays.values()))
        action, memory = self.policy.predict(lone, deterministic=not explore)
        if memory is not None:
            raise UserError(
                "recurrent policies of Stable-Baselines3 cannot act here; give one without a memory"
            )
        if self.shape:
            action = np.clip(self.policy.scale_action(action), -1, 1).astype(np.float32)
        return action, None, {}

    def greedy(self) -> nn.Module:
        """Refuse: what it does is not known here."""
        return Agent.greedy(self)

    def networks(self) -> dict[str, nn.Module]:
        """Return the policy."""
        return {"policy": self.policy}


def load_sb3(
    path: str | Path,
    observation_space: gym.Space,
    action_space: gym.Space,
    *,
    activation: str | None = None,
    normalization: str | Path | None = None,
    trust_pickle: bool = False,
    device: torch.device | str = "cpu",
) -> SB3Agent:
    """Load a Stable-Baselines3 zip as an agent that acts.

    Args:
        path: what `model.save` wrote.
        observation_space: the task's, of one environment; the zip's own is a pickle.
        action_space: the task's: Box(-1, 1) or Discrete.
        activation: a key of `baseline_networks.ACTIVATIONS`; None is the one that the zip names, else the algorithm's
            own (tanh for PPO and A2C, relu for SAC and TD3).
        normalization: what `VecNormalize.save` wrote, a pickle, or a baseline run's normalization.json.
        trust_pickle: let pickles run what they bring: a policy of unknown form is loaded by Stable-Baselines3.
        device: where it acts.

    Raises:
        UserError: no zip there, one of another task, or one that cannot be read without trust.
    """
    file: BaselineFile | None = None
    try:
        file = BaselineFile.read(path)
        network = build_network(file, activation)
    except UserError as error:
        refused = isinstance(error, UnknownFormError) or TRUST in str(error)
        if not (trust_pickle and refused):
            raise
        agent: SB3Agent = _unpickled(Path(path), observation_space, action_space, device)
    else:
        _check_observation(file, network, observation_space)
        bounds = _check_action(file, network, action_space)
        agent = SB3Agent(network, action_space, bounds, device=device)
    if normalization is not None:
        agent.network.normalization = Normalization.read(normalization, trust_pickle=trust_pickle)
        _check_normalization(agent.network.normalization, observation_space)
        agent.network.to(device)
    return agent


def _check_observation(file: BaselineFile, network: BaselineNetwork, space: gym.Space) -> None:
    """Refuse a task that shows something else than the policy has learned to see."""
    boxes = observation_boxes(space)
    kind = "state" if network.actor_cnn is None else "pixels"
    if list(boxes) != [kind]:
        raise UserError(
            f"'{file.path}' sees {'a state' if kind == 'state' else 'pixels'} and the task gives "
            f"{' and '.join(boxes)}; give --observation {kind}"
        )
    shape, trained = boxes[kind].shape, file.text("observation_space", "_shape")
    try:
        with torch.no_grad():
            network(torch.zeros(1, *shape))
    except RuntimeError:
        advice = (
            "the task's --size, --camera and --frame-stack"
            if kind == "pixels"
            else "the task's --env"
        )
        raise UserError(
            f"'{file.path}' sees {trained or 'another shape'} and the task gives {list(shape)}; "
            f"give {advice} as it was trained"
        ) from None


def _check_action(
    file: BaselineFile, network: BaselineNetwork, space: gym.Space
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the range of the policy's own actions where it is not [-1, 1]; refuse a task that takes others."""
    last = [layer for layer in network.head.modules() if isinstance(layer, nn.Linear)][-1]
    parts = last.out_features
    kind = "numbers" if file.class_name("action_space") == "Box" else "choices"
    wanted = (
        int(space.n) if isinstance(space, gym.spaces.Discrete) else int(np.prod(space.shape or ()))
    )
    is_discrete = isinstance(space, gym.spaces.Discrete)
    if (kind == "choices") != is_discrete or parts != wanted:
        raise UserError(
            f"'{file.path}' acts by {parts} {kind} and the task takes {wanted} "
            f"{'choices' if is_discrete else 'numbers'}; give the task that it was trained on"
        )
    if is_discrete or network.squashes:
        return None
    low, high = file.action_bounds(parts)
    return None if (low == -1).all() and (high == 1).all() else (low, high)


def _check_normalization(normalization: Normalization, space: gym.Space) -> None:
    boxes: Mapping[str, gym.spaces.Box] = observation_boxes(space)
    shape = boxes["state"].shape if "state" in boxes else ()
    if tuple(normalization.mean.shape) != shape:
        raise UserError(
            f"the statistics are of states of {list(normalization.mean.shape)} and the task gives {list(shape)}; "
            "give those of this task"
        )


def _unpickled(
    path: Path, observation_space: gym.Space, action_space: gym.Space, device: torch.device | str
) -> UnpickledAgent:
    """Let Stable-Baselines3 load the policy, with the spaces that the zip holds."""
    try:
        from stable_baselines3.common.save_util import load_from_zip_file
    except ImportError as error:
        raise UserError(
            f"'{path}' needs Stable-Baselines3 to be loaded; pip install stable-baselines3"
        ) from error
    try:
        data, parameters, _ = load_from_zip_file(path, device=str(device))
        assert data is not None
        shapes = data["observation_space"], data["action_space"]
        keywords = {"use_sde": data.get("use_sde", False), **data["policy_kwargs"]}
        policy = data["policy_class"](*shapes, lambda _: 0.0, **keywords)
        policy.load_state_dict(parameters["policy"])
    except Exception as error:  # its author's code raises whatever it likes
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"Stable-Baselines3 cannot load '{path}' ({type(error).__name__}: {said})"
        ) from error
    policy = policy.to(device)
    own_action = policy.action_space
    same_action = isinstance(own_action, type(action_space)) and (
        own_action.shape == action_space.shape
        and getattr(own_action, "n", None) == getattr(action_space, "n", None)
    )
    if policy.observation_space.shape != observation_space.shape or not same_action:
        raise UserError(
            f"'{path}' has the spaces {policy.observation_space} and {policy.action_space}, the task "
            f"{observation_space} and {action_space}; give the task that it was trained on"
        )
    return UnpickledAgent(policy, action_space, device)
