"""The Agent interface: `act`, `update`, and a state tree without pickle.

A `Learner` is the part of it that training loops need: image generators learn, but act on nothing. Both own their
networks, optimisers and random generators, and nothing else: no environment, no logger, no clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.core.errors import UserError
from agents.core.fields import Field

if TYPE_CHECKING:
    from agents.core.compilation import Compiler

T = TypeVar("T")

Observation = Mapping[str, Tensor]
"""`pixels` uint8 [B, 3*k, H, W] (RGB of the oldest frame first) and / or `state` float32 [B, D].

Of the rollout of an agent with a memory also `memory` and `lengths`, see `rollout.Experience.observation`."""


@dataclass(frozen=True)
class ReplaySettings:
    """How an agent wants its batches."""

    batch_size: int
    n_step: int
    discount: float


class Learner(ABC):
    """What every training loop asks of whatever it trains: an agent, or an image generator.

    Subclasses register what must be saved: networks as attributes in `networks()`, optimisers in `optimizers()`;
    everything else that changes goes through `extra_state` / `load_extra_state`.
    """

    generator: torch.Generator

    @abstractmethod
    def update(self, batch: Any) -> dict[str, Tensor]:
        """Learn from a batch of what this learner takes (agents: a `replay.Batch`, on-policy a `rollout.Experience`).

        Returns:
            0-d detached metrics under fixed names.
        """

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to save, by name."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers to save, by name."""

    def set_progress(self, agent_steps: int) -> None:  # noqa: B027 - most agents have no schedule
        """Tell schedules how far training is; called by the loop before it acts."""

    def extra_state(self) -> dict[str, Any]:
        """Return further state (counters, random generators of methods), as a tree."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to load by default
        """Restore what `extra_state` returned."""

    def state_dict(self, *, weights_only: bool = False) -> dict[str, Any]:
        """Return everything needed to go on exactly, or the weights alone.

        Args:
            weights_only: leave out optimisers, generators and counters (for `best` checkpoints).
        """
        tree: dict[str, Any] = {
            "networks": {name: net.state_dict() for name, net in self.networks().items()}
        }
        if not weights_only:
            tree["optimizers"] = {
                name: _optimizer_tree(optimizer) for name, optimizer in self.optimizers().items()
            }
            tree["generator"] = self.generator.get_state()
            tree["extra"] = self.extra_state()
        return tree

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: names or shapes differ; the message says which.
        """
        networks = self.networks()
        _check_names("network", set(tree["networks"]), set(networks))
        for name, net in networks.items():
            _load_module(name, net, tree["networks"][name])
        if "optimizers" in tree:
            _check_names("optimizer", set(tree["optimizers"]), set(self.optimizers()))
            for name, optimizer in self.optimizers().items():
                _load_optimizer(optimizer, tree["optimizers"][name])
            if tree["generator"].numel() != self.generator.get_state().numel():
                raise UserError(
                    "the checkpoint was saved on another kind of device, whose random stream cannot go on "
                    "here; resume on the device that config.json names"
                )
            self.generator.set_state(tree["generator"].cpu())
            self.load_extra_state(tree["extra"])


class Agent(Learner):
    """What the loops and `Policy` ask of every agent beside."""

    replay_settings: ReplaySettings
    compiler: Compiler | None = None

    @abstractmethod
    def act(
        self, observation: Observation, state: Any = None, *, explore: bool
    ) -> tuple[np.ndarray, Any, dict[str, Tensor]]:
        """Choose actions for a batch of observations.

        Args:
            observation: batched, see `Observation`.
            state: what the previous call returned, for recurrent and planning agents; None at an episode's start.
            explore: sample with the training noise; otherwise act greedily.

        Returns:
            Actions in [-1, 1], float32 [B, A] (or int64 [B]); the next state; extras to store with the step.
        """

    def gradient_sizes(self) -> set[int]:
        """Return the usual sizes of the batches that `differentiate` is called with.

        Raises:
            UserError: the agent's gradients cannot be compiled.
        """
        raise UserError(
            f"{type(self).__name__} does not say how its gradients are compiled; use --compile off"
        )

    def compile(self, *, backend: str = "inductor", fall_back: bool = False) -> None:
        """Compile what `differentiate` is called with from now on.

        Args:
            backend: of `torch.compile`.
            fall_back: warn and go on without, where compiling fails.

        Raises:
            UserError: this agent's gradients cannot be compiled.
        """
        # Here: it brings a second of imports that most runs can do without.
        from agents.core.compilation import Compiler

        parameters = [p for network in self.networks().values() for p in network.parameters()]
        self.compiler = Compiler(
            parameters, self.gradient_sizes(), backend=backend, fall_back=fall_back
        )

    def differentiate(self, function: Callable[..., T], *inputs: Any) -> T:
        """Call a function that leaves gradients in parameters, compiled where the agent was told to compile.

        Parameters have no gradient before. See `agents.core.compilation` for what such a function may do: it draws
        from generators that it names, and changes nothing but gradients.
        """
        return function(*inputs) if self.compiler is None else self.compiler(function, *inputs)

    def greedy(self) -> nn.Module:
        """Return `act` without exploring as a module, for export; it shares the agent's weights.

        Its `forward` takes the parts of an observation by name, such as `pixels` and `state`, and returns the actions
        as a tensor; `agents.core.greedy.GreedyPolicy` is one for agents whose action follows from features.

        Raises:
            UserError: the agent's action is no function of the observation alone, or nobody has said which.
        """
        raise UserError(
            f"{type(self).__name__} cannot be exported: it does not say how it acts on tensors alone; "
            "give it a `greedy` method that returns such a module"
        )

    def reset_state(self, state: Any, begins: np.ndarray) -> Any:
        """Return what `act` is to be given as its state when some episodes begin.

        Agents whose state is more than a tensor that is 0 at an episode's start override this.

        Args:
            state: what `act` returned, [B, ...]; None where it keeps none, or before its first call.
            begins: bool [B], whose next observation is the first of an episode.
        """
        if state is None or not begins.any():
            return state
        mask = torch.as_tensor(begins, device=state.device)
        return state.masked_fill(mask.view(-1, *[1] * (state.ndim - 1)), 0)

    def stored_space(self, space: gym.Space, action_space: gym.Space) -> gym.Space:
        """Return the space of what a replay keeps of observations.

        Args:
            space: of one environment's observations.
            action_space: of its actions.
        """
        return space

    def trained_as(self, *configs: Any) -> None:
        """Tell an agent that is to act otherwise than it was trained the configs of its training.

        Args:
            *configs: as it was built with, then.
        """

    def seed_actions(self, seed: int) -> None:
        """Draw the actions that follow from a fresh stream, so that an evaluation does not depend on the one before."""

    def saliency(self, observation: Observation, action: Tensor) -> Tensor | None:
        """Return where the agent looks when it chooses an action.

        Args:
            observation: batched, see `Observation`.
            action: [B, A].

        Returns:
            float32 [B, k, H, W], not negative and of any scale, a map for every stacked frame; None where an agent
            sees no pixels or cannot tell.
        """
        return None

    def images(self, observation: Observation, action: Tensor) -> dict[str, np.ndarray]:
        """Return pictures for the log (uint8 [H, W, 3] by name): what the agent sees and looks at."""
        return {}


class OnPolicyAgent(Agent):
    """What on-policy loops ask beside; `update` takes a `rollout.Experience`, in several gradient steps.

    Attributes:
        rollout_length: steps of every environment between two updates.
        extras: fields that `act` gives for every step, and `update` wants back.
        gradient_updates: gradient steps so far.
        jumps: how often in a rollout its loop puts the environments back into an earlier state.
    """

    rollout_length: int
    extras: Mapping[str, Field]
    gradient_updates: int
    jumps: int = 0

    def follow(
        self, action: np.ndarray, state: Any, teacher_action: np.ndarray, extras: dict[str, Tensor]
    ) -> tuple[np.ndarray, Any]:
        """Return what is done where a teacher says what it would do: by default what the agent has chosen.

        Args:
            action: what `act` chose, [B, ...].
            state: the next one, as `act` returned it.
            teacher_action: what the teacher would do, like `action`.
            extras: of `act`; they may be changed.

        Returns:
            The actions, and the next state.
        """
        return action, state


def as_observation(observation: Any, device: torch.device) -> dict[str, Tensor]:
    """Turn an environment's observation batch (array or Dict of arrays) into an `Observation` on `device`.

    A four-dimensional array is taken for pixels, any other for a state.
    """
    if not isinstance(observation, Mapping):
        array = np.asarray(observation)
        observation = {"pixels" if array.ndim == 4 else "state": array}
    return {key: torch.as_tensor(value).to(device) for key, value in observation.items()}


def _check_names(kind: str, given: set[str], expected: set[str]) -> None:
    if given != expected:
        raise UserError(
            f"the checkpoint holds the {kind}s {sorted(given)}, this agent has {sorted(expected)}; "
            "it was saved by another agent: load it with the agent that config.json names"
        )


def _load_module(name: str, net: nn.Module, saved: dict[str, Tensor]) -> None:
    own = net.state_dict()
    _check_names(f"{name} tensor", set(saved), set(own))
    for key, value in own.items():
        if value.shape != saved[key].shape:
            raise UserError(
                f"tensor {name}.{key} is {tuple(saved[key].shape)} in the checkpoint and "
                f"{tuple(value.shape)} here; use the settings that config.json holds"
            )
    net.load_state_dict(saved)


def _optimizer_tree(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimiser's per-parameter tensors under string keys; the settings stand in the config."""
    state = optimizer.state_dict()["state"]
    return {str(index): dict(values) for index, values in state.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> None:
    full = optimizer.state_dict()
    full["state"] = {int(index): values for index, values in tree.items()}
    optimizer.load_state_dict(full)
    # Fused Adam walks parameters and moments in the order of memory, and files know no strides:
    # contiguous moments of a channels_last weight would be taken for those of other elements.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
