"""A frozen policy that says, step by step, what it would do: what a residual agent acts on top of.

Any agent can be one. One that executes chunks of h actions (`action_chunk` of the environments) is asked every h steps,
and its actions are handed out one by one; every episode has a queue of its own. It is shown what it learned from:
pictures that lie h steps apart, whatever stack the residual agent sees.

A base that draws its actions draws them anew from a seed of its caller's before every plan, so what decides about its
actions is the caller's generator and `BasePolicy.step`'s state, and nothing inside the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.core.agent import Agent, Observation, as_observation
from agents.core.errors import UserError
from agents.core.fields import is_image, observation_boxes
from agents.core.tree_rows import on_device, rows_of, with_rows

State = dict[str, Any]
"""What is to be remembered of B episodes, as a tree of tensors [B, ...]:

`queue` float32 [B, h, A], `used` int64 [B] (how many of them were taken), `fresh` bool [B] (nothing was planned in the
episode yet), `frames` by part uint8 [B, 3*k, H, W] (the stack of the last plan), `inner` the base's own state or None.
"""


class BasePolicy:
    """An agent, one action at a time.

    Args:
        agent: acts; its weights are frozen from here on.
        observation_space: what it sees of one environment.
        action_space: its actions, Box [A], or chunks of them, [h, A].
        frame_stack: pictures in its stacks, k.

    Attributes:
        executed: h, actions of a plan.
        action: A, numbers of an action.
        parts: what it sees, by name.

    Raises:
        UserError: its actions are not continuous.
    """

    def __init__(
        self,
        agent: Agent,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        frame_stack: int = 1,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) not in (1, 2):
            raise UserError(
                f"a residual needs a base with continuous actions, and this one acts in {action_space}; give another"
            )
        self.agent, self.frame_stack = agent, frame_stack
        self.executed = action_space.shape[0] if len(action_space.shape) == 2 else 1
        self.action = action_space.shape[-1]
        self.parts = observation_boxes(observation_space)
        self._channels = {
            name: box.shape[0] // frame_stack for name, box in self.parts.items() if is_image(box)
        }
        for network in agent.networks().values():
            network.requires_grad_(False)
        self.device = next(next(iter(agent.networks().values())).parameters()).device

    @torch.no_grad()
    def step(
        self, observation: Observation, state: State | None, random: np.random.Generator
    ) -> tuple[Tensor, State]:
        """Return the base's next actions, float32 [B, A] in [-1, 1], and what to remember of them.

        Args:
            observation: of B episodes, with all of the base's parts; of pictures the newest one counts.
            state: of the step before, which stays as it is; None where all episodes begin.
            random: gives the seed of every plan.

        Raises:
            UserError: there are more or fewer episodes than those that are remembered.
        """
        first = next(iter(self.parts))
        count, device = len(observation[first]), observation[first].device
        if state is None:
            state = self._fresh(observation)
        elif len(state["used"]) != count:
            raise UserError(
                f"{count} observations are given to a base that remembers {len(state['used'])} episodes; tell it where "
                "new ones begin"
            )
        state = dict(state)
        due = (state["used"] >= self.executed).nonzero()[:, 0]
        if len(due):
            state |= self._plan(observation, state, due, random)
        action = state["queue"][torch.arange(count, device=device), state["used"]]
        return action, state | {"used": state["used"] + 1}

    def reset(self, state: State | None, begins: np.ndarray) -> State | None:
        """Return a state that has forgotten the episodes before, where bool [B] says that new ones begin."""
        if state is None:
            return None
        mask = torch.as_tensor(begins, device=state["used"].device)
        return state | {
            "used": state["used"].masked_fill(mask, self.executed),
            "fresh": state["fresh"] | mask,
        }

    def _fresh(self, observation: Observation) -> State:
        """Return the state of episodes that begin."""
        first = next(iter(self.parts))
        count, device = len(observation[first]), observation[first].device
        frames = {
            name: observation[name].new_zeros((count, *self.parts[name].shape))
            for name in self._channels
        }
        return {
            "queue": torch.zeros(count, self.executed, self.action, device=device),
            "used": torch.full((count,), self.executed, device=device),
            "fresh": torch.ones(count, dtype=torch.bool, device=device),
            "frames": frames,
            "inner": None,
        }

    def _plan(
        self, observation: Observation, state: State, due: Tensor, random: np.random.Generator
    ) -> State:
        """Ask the base in the episodes `due`, int64 [M]; return what changes in the state."""
        fresh = state["fresh"][due]
        seen = {name: observation[name][due] for name in self.parts}
        frames = {}
        for name, channels in self._channels.items():
            newest = seen[name][:, -channels:]
            moved = torch.cat([state["frames"][name][due][:, channels:], newest], dim=1)
            begun = newest.repeat(1, self.frame_stack, 1, 1)
            seen[name] = torch.where(fresh.view(-1, 1, 1, 1), begun, moved)
            frames[name] = with_rows(state["frames"][name], due, seen[name])
        inner = self.agent.reset_state(rows_of(state["inner"], due), fresh.cpu().numpy())
        self.agent.seed_actions(int(random.integers(2**31)))
        action, inner, _ = self.agent.act(seen, inner, explore=False)
        plan = torch.as_tensor(action, device=due.device).view(len(due), self.executed, -1)
        return {
            "queue": with_rows(state["queue"], due, plan.clamp(-1, 1)),
            "used": state["used"].index_fill(0, due, 0),
            "fresh": state["fresh"].index_fill(0, due, False),
            "frames": frames,
            # What the base remembers has rows of all episodes from the first plan on, which they share.
            "inner": inner if state["inner"] is None else with_rows(state["inner"], due, inner),
        }


class BaseStream:
    """A base that acts in N environments, and remembers their episodes and its generator.

    Args:
        base: acts.
        seed: of what it draws.
    """

    def __init__(self, base: BasePolicy, seed: int) -> None:
        self.base, self.seed = base, seed
        self.restart()

    def restart(self, seed: int | None = None) -> None:
        """Forget everything, and begin the stream of random numbers anew, that of `seed` if it is given."""
        self.random = np.random.default_rng(self.seed if seed is None else (self.seed, seed))
        self.state: State | None = None

    def begin(self, begins: np.ndarray) -> None:
        """Forget the episodes before, where bool [N] says that new ones begin."""
        self.state = self.base.reset(self.state, begins)

    def act(self, observation: Any) -> np.ndarray:
        """Return the next actions in observations as the environments gave them, float32 [N, A]."""
        seen = as_observation(observation, self.base.device)
        action, self.state = self.base.step(seen, self.state, self.random)
        return action.cpu().numpy()

    def last(self, observation: Any, rows: np.ndarray) -> np.ndarray:
        """Return what comes next in episodes that have ended, float32 [M, A]; no step of theirs is counted.

        Args:
            observation: their last ones, [M, ...].
            rows: int64 [M], which of the N environments they are of.
        """
        seen = as_observation(observation, self.base.device)
        index = torch.as_tensor(rows, device=self.base.device)
        action, _ = self.base.step(seen, rows_of(self.state, index), self.random)
        return action.cpu().numpy()

    def get_state(self) -> dict[str, Any]:
        """Return what decides about the next actions."""
        return {"random": self.random.bit_generator.state, "episodes": self.state}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `get_state`."""
        self.random.bit_generator.state = state["random"]
        self.state = on_device(state["episodes"], self.base.device)
