"""Natural steps under a limit, against explicit matrices."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from agents.core.distributions import Categorical, Gaussian, Policy, kl
from agents.core.trust_region import (
    assign,
    conjugate_gradient,
    damped_curvature,
    flattened,
    hessian_product,
    line_search,
    natural_step,
)


def positive_definite(size, seed=0):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return torch.from_numpy(root @ root.T / size + 0.1 * np.eye(size))


def tiny_policy(kind, seed=0):
    """A network in float64, its parameters, and what it makes of eight states."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    log_std = nn.Parameter(torch.tensor([0.3, -0.6], dtype=torch.float64))
    states = torch.randn(8, 3, dtype=torch.float64)
    parameters = [*net.parameters(), *([log_std] if kind == "gaussian" else [])]

    def policy() -> Policy:
        head = net(states)
        return Gaussian(head, log_std) if kind == "gaussian" else Categorical(head)

    return policy, parameters


def seen(policy):
    """The same distributions as constants."""
    return type(policy).unpacked(policy.packed().detach())


def explicit_hessian(value, parameters):
    """By differentiating every entry of the gradient, one after the other."""
    gradient = flattened(torch.autograd.grad(value, parameters, create_graph=True))
    rows = [
        flattened(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True))
        for entry in gradient
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_products_are_those_of_the_explicit_hessian(kind):
    policy, parameters = tiny_policy(kind)
    old = seen(policy())
    matrix = explicit_hessian(kl(old, policy()).mean(), parameters)
    vector = torch.randn(len(matrix), dtype=torch.float64)
    product = hessian_product(kl(old, policy()).mean(), parameters, vector)
    torch.testing.assert_close(product, matrix @ vector)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12, "a Fisher matrix"


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_the_hessian_of_the_kl_is_the_fisher_matrix(kind):
    """Jacobians times the Fisher matrix of a head in closed form: inverse variances and 2; diag(p) - p p^T."""
    policy, parameters = tiny_policy(kind)
    packed = policy().packed()
    jacobian = torch.stack(
        [
            torch.stack(
                [
                    flattened(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True))
                    for entry in row
                ]
            )
            for row in packed
        ]
    )  # fmt: skip
    if kind == "gaussian":
        variance = torch.exp(2 * policy().log_std.detach())
        head = torch.diag(torch.cat([1 / variance, torch.full((2,), 2.0, dtype=torch.float64)]))
        heads = head.expand(len(packed), -1, -1)
    else:
        p = packed.detach().softmax(-1)
        heads = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = (jacobian.mT @ heads @ jacobian).mean(0)
    vector = torch.randn(len(fisher), dtype=torch.float64)
    product = hessian_product(kl(seen(policy()), policy()).mean(), parameters, vector)
    torch.testing.assert_close(product, fisher @ vector)


def test_the_fisher_matrix_is_the_covariance_of_scores():
    policy, parameters = tiny_policy("categorical")
    fisher = explicit_hessian(kl(seen(policy()), policy()).mean(), parameters)
    log_probs = policy().logits.log_softmax(-1)
    expected = torch.zeros_like(fisher)
    for state in range(len(log_probs)):
        for action in range(log_probs.shape[1]):
            entry = log_probs[state, action]
            score = flattened(torch.autograd.grad(entry, parameters, retain_graph=True))
            expected += entry.exp().detach() * torch.outer(score, score) / len(log_probs)
    torch.testing.assert_close(fisher, expected)


def test_parts_sum_to_the_whole_and_damping_is_added():
    policy, parameters = tiny_policy("gaussian")
    old = seen(policy())

    def parts():
        for half in (slice(0, 4), slice(4, 8)):
            yield kl(old, policy())[half].mean() / 2

    vector = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    product = damped_curvature(parts, parameters, damping=0.3)
    whole = hessian_product(kl(old, policy()).mean(), parameters, vector)
    torch.testing.assert_close(product(vector), whole + 0.3 * vector)
    torch.testing.assert_close(product(2 * vector), 2 * (whole + 0.3 * vector), msg="asked again")


def test_products_through_convolutions_equal_forward_differentiation():
    """The Gauss-Newton form, whose Jacobians come from the other mode of differentiation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    pictures = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    names, parameters = zip(*net.named_parameters(), strict=True)
    vector = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    old = seen(Categorical(net(pictures)))
    product = hessian_product(kl(old, Categorical(net(pictures))).mean(), parameters, vector)
    parts = vector.split([p.numel() for p in parameters])
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(parameter, part.view(parameter.shape))
            for name, parameter, part in zip(names, parameters, parts, strict=True)
        }
        out = torch.func.functional_call(net, duals, (pictures,))
        logits, tangent = forward_ad.unpack_dual(out)
        p = logits.detach().softmax(-1)
        pulled = p * (tangent.detach() - (p * tangent.detach()).sum(-1, keepdim=True)) / len(p)
        expected = torch.autograd.grad(logits, parameters, pulled)
    torch.testing.assert_close(product, flattened(expected))


@pytest.mark.parametrize("size", [1, 5, 20])
def test_conjugate_gradients_solve_what_numpy_solves(size):
    matrix = positive_definite(size)
    target = torch.randn(size, dtype=torch.float64)
    solution = conjugate_gradient(matrix.mv, target, iterations=2 * size, tolerance=1e-24)
    expected = np.linalg.solve(matrix.numpy(), target.numpy())
    np.testing.assert_allclose(solution.numpy(), expected, rtol=1e-8)


def test_conjugate_gradients_come_nearer_with_every_iteration():
    matrix, target = positive_definite(30), torch.randn(30, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, target)

    def distance(iterations):
        error = conjugate_gradient(matrix.mv, target, iterations=iterations) - exact
        return (error @ matrix @ error).item()

    distances = [distance(iterations) for iterations in range(12)]
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))


def test_nothing_happens_where_there_is_nothing_to_solve():
    """Neither without a target nor after convergence, in single precision too."""
    assert conjugate_gradient(lambda x: x, torch.zeros(4), iterations=5).tolist() == [0] * 4
    target = torch.tensor([3.0, -4.0])
    solved = conjugate_gradient(lambda x: 2 * x, target, iterations=50)
    torch.testing.assert_close(solved, target / 2)
    step, gain = natural_step(lambda x: x, torch.zeros(4), limit=0.01, iterations=5)
    assert step.tolist() == [0] * 4
    assert gain == 0


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_step_does_not_depend_on_the_unit_of_what_is_to_grow(unit):
    """An absolute tolerance took gradients of small rewards for no gradient at all: the policy never moved."""
    matrix, gradient = positive_definite(6).float(), torch.randn(6)
    step, gain = natural_step(matrix.mv, gradient, limit=0.02, iterations=6)
    scaled_step, scaled_gain = natural_step(matrix.mv, unit * gradient, limit=0.02, iterations=6)
    assert step.norm() > 0.1
    torch.testing.assert_close(scaled_step, step, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled_gain, unit * gain, rtol=1e-4, atol=0)


def test_the_step_is_the_best_one_within_a_quadratics_limit():
    """Of all steps with 1/2 s A s = limit, A^-1 g direction gains most: sqrt(2 limit g A^-1 g)."""
    matrix, gradient = positive_definite(6), torch.randn(6, dtype=torch.float64)
    step, gain = natural_step(matrix.mv, gradient, limit=0.02, iterations=30)
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(0.02)
    best = math.sqrt(2 * 0.02 * (gradient @ torch.linalg.solve(matrix, gradient)).item())
    assert gain.item() == pytest.approx(best)
    others = torch.randn(1000, 6, dtype=torch.float64)
    sizes = torch.einsum("ni,ij,nj->n", others, matrix, others) / 2
    others *= (0.02 / sizes).sqrt()[:, None]
    assert (others @ gradient).max() < gain


def quadratic(fraction):
    """Gains until .5, within a limit of .1 until sqrt(.1)."""
    return torch.tensor(fraction - 2 * fraction**2), torch.tensor(fraction**2)


def test_the_search_takes_the_first_fraction_that_gains_and_keeps_the_limit():
    found = line_search(quadratic, limit=0.1, shrink=0.5, attempts=10)
    assert found.fraction == 0.25, "at 1 nothing is gained, at .5 neither, and the limit is passed"
    assert found.gain.item() == pytest.approx(0.125)
    assert found.divergence.item() == pytest.approx(0.0625)
    tight = line_search(quadratic, limit=0.01, shrink=0.5, attempts=10)
    assert tight.fraction == 0.0625


@pytest.mark.parametrize(
    "measure",
    [
        lambda fraction: (torch.tensor(-fraction), torch.tensor(0.0)),
        lambda fraction: (torch.tensor(fraction), torch.tensor(1.0)),
        lambda fraction: (torch.tensor(math.nan), torch.tensor(0.0)),
        lambda fraction: (torch.tensor(fraction), torch.tensor(math.nan)),
        lambda fraction: (torch.tensor(0.0), torch.tensor(0.0)),
    ],
)
def test_a_search_that_finds_nothing_says_so(measure):
    found = line_search(measure, limit=0.1, shrink=0.8, attempts=4)
    assert found == (0, 0, 0)


def test_assigning_keeps_storage_and_memory_format():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    parameters = list(conv.parameters())
    places = [p.data_ptr() for p in parameters]
    before = flattened(parameters).detach()
    assign(parameters, before + 1)
    torch.testing.assert_close(flattened(parameters).detach(), before + 1)
    assert [p.data_ptr() for p in parameters] == places
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
