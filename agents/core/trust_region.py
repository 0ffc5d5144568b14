"""The natural gradient under a limit on a divergence: Fisher-vector products, conjugate gradients, line search.

What TRPO (Schulman et al. 2015, https://arxiv.org/abs/1502.05477, section 6 and appendix C) asks of numerical
mathematics, as functions that know no policy. Parameters are looked at as one vector, in the order in which they are
given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""From a vector [P] to a symmetric positive definite matrix [P, P] times it."""


def flattened(tensors: Iterable[Tensor]) -> Tensor:
    """Return one vector [P] of all entries."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Set parameters to the entries of a vector [P]; they keep their storage and memory format."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view(parameter.shape))


def hessian_product(value: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Return the Hessian of a 0-d value times a vector [P], by differentiating twice (Pearlmutter 1994).

    The Hessian of the mean KL(old || new) at new = old is the Fisher matrix, averaged over the states and exact in the
    actions (TRPO, appendix C.1): no sample of an action enters it.
    """
    gradient = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    along = flattened(gradient) @ vector
    return flattened(torch.autograd.grad(along, parameters, materialize_grads=True))


def damped_curvature(
    parts: Callable[[], Iterable[Tensor]], parameters: Sequence[Tensor], damping: float
) -> Product:
    """Return v -> (H + damping * identity) v, where H is the Hessian of a sum.

    Args:
        parts: makes the sum's terms, 0-d, anew for every product, one after the other: the graph of one is gone before
            the next is made, so that a rollout of pictures fits into memory.
        parameters: what the Hessian is of.
        damping: at least 0.
    """

    def product(vector: Tensor) -> Tensor:
        total = damping * vector
        for part in parts():
            total = total + hessian_product(part, parameters, vector)
        return total

    return product


@torch.no_grad()
def conjugate_gradient(
    product: Product, target: Tensor, *, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Return an approximate solution x [P] of A x = target (Hestenes and Stiefel 1952), starting from 0.

    Nothing is read back from the device: what has converged stays where it is for the remaining iterations.

    Args:
        product: A; symmetric and positive definite.
        target: [P].
        iterations: at most as many; P of them solve the system exactly, but for rounding.
        tolerance: squared norm of the residual, over the target's, that is taken for 0: how long is searched does not
            depend on the unit of what is to grow.
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    square = residual @ residual
    enough = tolerance * square
    for _ in range(iterations):
        with torch.enable_grad():
            image = product(direction)
        goes_on = square > enough
        step = torch.where(goes_on, square / (direction @ image), 0)
        solution = solution + step * direction
        residual = residual - step * image
        following = residual @ residual
        direction = residual + torch.where(goes_on, following / square, 0) * direction
        square = torch.where(goes_on, following, square)
    return solution


def natural_step(
    product: Product, gradient: Tensor, *, limit: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the step [P] that gains most where 1/2 step A step = limit, and the gain that a line promises, 0-d.

    TRPO's appendix C: the direction solves A x = gradient, and its length uses up the limit as far as the quadratic
    model holds. Without a gradient the step is 0.

    Args:
        product: A.
        gradient: [P], of what is to grow.
        limit: of the divergence, positive.
        iterations: of conjugate gradients.
    """
    direction = conjugate_gradient(product, gradient, iterations=iterations)
    curvature = (direction @ product(direction)).detach()
    tiny = torch.finfo(direction.dtype).tiny
    step = direction * torch.sqrt(2 * limit / curvature.clamp(min=tiny))
    step = torch.where(curvature > tiny, step, torch.zeros_like(step))
    return step, gradient @ step


class Search(NamedTuple):
    """What `line_search` found."""

    fraction: float
    """Of the whole step; 0 where no fraction would do."""
    gain: Tensor
    """0-d, at the fraction; 0 where none would do."""
    divergence: Tensor
    """0-d, likewise."""


def line_search(
    measure: Callable[[float], tuple[Tensor, Tensor]], *, limit: float, shrink: float, attempts: int
) -> Search:
    """Try a step whole, then ever smaller, until it gains something and stays within the limit.

    What is not finite does neither. Every attempt waits for the device once.

    Args:
        measure: takes a fraction of the step, and returns gain and divergence against no step, 0-d each.
        limit: largest divergence.
        shrink: factor between attempts, in (0, 1).
        attempts: at least 1.
    """
    for attempt in range(attempts):
        fraction = shrink**attempt
        gain, divergence = measure(fraction)
        if bool((gain > 0) & (divergence <= limit)):
            return Search(fraction, gain, divergence)
    return Search(0.0, torch.zeros_like(gain), torch.zeros_like(divergence))
