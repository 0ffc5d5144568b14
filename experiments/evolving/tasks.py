"""Control tasks as tensor arithmetic: thousands of environments step in one call.

Every task is smooth, has no terminations and ends with a time limit. States and observations are
float32 [*, size], actions [*, action_size] are clipped to [-1, 1], rewards [*] lie in about [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Task(Protocol):
    """What a learner needs to know."""

    @property
    def horizon(self) -> int:
        """Steps of an episode."""

    @property
    def state_size(self) -> int:
        """Numbers that a state has."""

    @property
    def observation_size(self) -> int:
        """Numbers that an observation has."""

    @property
    def action_size(self) -> int:
        """Numbers that an action has."""

    def reset(self, uniform: Tensor) -> Tensor:
        """Return first states [*, state_size] from as many numbers in [0, 1)."""

    def observe(self, state: Tensor) -> Tensor:
        """Return observations [*, observation_size], of about unit size."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next states and the rewards [*]."""


@dataclass(frozen=True)
class Pendulum:
    """Swing up a pendulum whose motor is too weak to lift it: Gymnasium's Pendulum-v1 with a longer step.

    The reward is the tip's height less a little for speed and torque, where Gymnasium's is a squared angle.
    """

    horizon: int = 64
    """Steps of 0.1 s."""
    mass: float = 1.0
    """Kilograms."""
    length: float = 1.0
    """Meters."""
    torque: float = 2.0
    """Newton meters at action 1 (Gymnasium)."""

    state_size, observation_size, action_size = 2, 3, 1

    def reset(self, uniform: Tensor) -> Tensor:
        """Any angle, speeds up to 1 rad/s (Gymnasium)."""
        return (2 * uniform - 1) * uniform.new_tensor([math.pi, 1.0])

    def observe(self, state: Tensor) -> Tensor:
        """Cosine and sine of the angle from upright, and the speed."""
        angle, speed = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed / 4], -1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Semi-implicit Euler; speeds stop at 8 rad/s (Gymnasium)."""
        angle, speed = state.unbind(-1)
        push = action[..., 0].clamp(-1, 1)
        reward = angle.cos() - 0.01 * speed.square() - 0.01 * push.square()
        pull = 15 / self.length * angle.sin()
        drive = 3 * self.torque / (self.mass * self.length**2) * push
        speed = (speed + 0.1 * (pull + drive)).clamp(-8, 8)
        return torch.stack([angle + 0.1 * speed, speed], -1), reward


@dataclass(frozen=True)
class CartPole:
    """Swing up and balance a pole on a cart with a continuous force (Barto et al. 1983, Gymnasium's masses)."""

    horizon: int = 100
    """Steps of 0.05 s."""
    force: float = 10.0
    """Newtons at action 1."""
    spread: float = 0.3
    """First angles lie within this of upright, in radians; pi for a swing-up."""

    state_size, observation_size, action_size = 4, 5, 1

    def reset(self, uniform: Tensor) -> Tensor:
        """Near the middle, at rest, within `spread` of upright."""
        return (2 * uniform - 1) * uniform.new_tensor([0.2, 0.2, self.spread, 0.2])

    def observe(self, state: Tensor) -> Tensor:
        """Position and its speed, cosine and sine of the angle, angular speed."""
        place, speed, angle, turn = state.unbind(-1)
        return torch.stack([place / 2, speed / 2, angle.cos(), angle.sin(), turn / 4], -1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Two semi-implicit Euler steps of 0.025 s; walls without bounce at 2.4 m."""
        place, speed, angle, turn = state.unbind(-1)
        push = action[..., 0].clamp(-1, 1)
        reward = angle.cos() - 0.1 * place.square() - 0.01 * push.square()
        for _ in range(2):
            cos, sin = angle.cos(), angle.sin()
            inner = (self.force * push + 0.05 * turn.square() * sin) / 1.1
            bend = (9.8 * sin - cos * inner) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
            turn = (turn + 0.025 * bend).clamp(-20, 20)
            speed = speed + 0.025 * (inner - 0.05 * bend * cos / 1.1)
            angle, moved = angle + 0.025 * turn, place + 0.025 * speed
            place = moved.clamp(-2.4, 2.4)
            speed = torch.where(place == moved, speed, torch.zeros_like(speed))
        return torch.stack([place, speed, angle, turn], -1), reward


@dataclass(frozen=True)
class Point:
    """Drive a point with momentum to the middle of the plane and stay: two actions."""

    horizon: int = 50
    """Steps of 0.1 s."""
    acceleration: float = 2.0
    """m/s^2 at action 1, along each axis."""
    drag: float = 0.3
    """Share of the speed that is lost in a second."""

    state_size, observation_size, action_size = 4, 4, 2

    def reset(self, uniform: Tensor) -> Tensor:
        """Anywhere within 1.5 m along each axis, slow."""
        return (2 * uniform - 1) * uniform.new_tensor([1.5, 1.5, 0.2, 0.2])

    def observe(self, state: Tensor) -> Tensor:
        """The state."""
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Semi-implicit Euler."""
        push = action.clamp(-1, 1)
        place, speed = state.split(2, -1)
        reward = 1 - place.square().sum(-1).add(1e-6).sqrt() - 0.01 * push.square().sum(-1)
        speed = speed * (1 - 0.1 * self.drag) + 0.1 * self.acceleration * push
        return torch.cat([place + 0.1 * speed, speed], -1), reward


TRAINED_ON = "pendulum"
TASKS: dict[str, Task] = {
    TRAINED_ON: Pendulum(),
    "pendulum-heavy": replace(Pendulum(), mass=1.4, length=1.2, torque=3.0),
    "pendulum-long": replace(Pendulum(), horizon=128),
    "cart-pole": CartPole(),
    "cart-pole-swing-up": replace(CartPole(), spread=math.pi),
    "point": Point(),
}
"""The first is what evolution sees; the others are held out."""
