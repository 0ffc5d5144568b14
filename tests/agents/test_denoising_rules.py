"""Step rules against the papers' formulas, brute-force conditioning, and normally distributed data."""

import math
from itertools import pairwise

import pytest
import torch

from agents.core.chain_steps import standard_normal
from agents.core.errors import UserError
from agents.core.noise_paths import CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from agents.core.sampling import Sampler
from agents.core.step_rules import (
    CPS,
    DanceSDE,
    Euler,
    FlowSDE,
    Heun,
    LearnedNoise,
    Posterior,
    excess_noise,
)
from tests.agents.gaussians import exact_denoiser, marginal_variance, variance_after

CONTINUOUS = [RectifiedFlow(), LinearVP(), CosineVP()]
FLOW = RectifiedFlow()


def name(value):
    return type(value).__name__


def chain(path, rule, steps, *, kind="x0", variance=1.0, shift=1.0):
    """Return the variance that a chain of the exact denoiser ends with."""
    sampler = Sampler(path, kind, rule, path.times(steps, shift=shift))
    start = marginal_variance(path, sampler.points[0].t, variance)
    return variance_after(sampler, exact_denoiser(path, kind, variance=variance), start)


# --------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("path", [*CONTINUOUS, DiscreteVP(20)], ids=name)
def test_posterior_is_the_conditional_of_the_joint_gaussian(path):
    points = path.points(path.times(10))
    for now, then in pairwise(
        points[1:-1]
    ):  # the joint of x_s and x_t, given x0, by Schur's complement
        ratio = now.alpha / then.alpha
        cross = ratio * then.sigma**2
        x0, noise = 0.7, -1.3
        x_now = now.alpha * x0 + now.sigma * noise
        mean = then.alpha * x0 + cross / now.sigma**2 * (x_now - now.alpha * x0)
        variance = then.sigma**2 - cross**2 / now.sigma**2
        weights = Posterior(1.0).weights(now, then)
        assert weights.x0 * x0 + weights.noise * noise == pytest.approx(mean, rel=1e-9)
        assert weights.std == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_posterior_is_ddpm_s_textbook_step():
    path = DiscreteVP(20)
    beta = path.betas()
    alpha_bar = torch.cumprod(1 - beta, 0)
    points = path.points(path.times(20))
    x0, noise = -0.4, 1.1
    for step, (now, then) in enumerate(pairwise(points[:-1])):
        k = 19 - step
        x = now.alpha * x0 + now.sigma * noise
        mean = (
            alpha_bar[k - 1].sqrt() * beta[k] / (1 - alpha_bar[k]) * x0
            + (1 - beta[k]).sqrt() * (1 - alpha_bar[k - 1]) / (1 - alpha_bar[k]) * x
        )
        std = (beta[k] * (1 - alpha_bar[k - 1]) / (1 - alpha_bar[k])).sqrt()
        weights = Posterior(1.0).weights(now, then)
        assert weights.x0 * x0 + weights.noise * noise == pytest.approx(float(mean), rel=1e-9)
        assert weights.std == pytest.approx(float(std), rel=1e-9)


def mean_on_flow(weights, x, v, t):
    return weights.x0 * (x - t * v) + weights.noise * (x + (1 - t) * v)


def test_flow_sde_is_flow_grpo_s_formula():
    times = [1.0, 0.8, 0.5, 0.1, 0.0]
    x, v, a = 0.9, -0.6, 0.7
    points = FLOW.points(torch.tensor(times, dtype=torch.float64))
    for now, then in pairwise(points):
        t, dt = now.t, then.t - now.t
        sigma = a * math.sqrt(t / (1 - (0.8 if t == 1 else t)))
        mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        weights = FlowSDE(a).weights(now, then)
        assert mean_on_flow(weights, x, v, t) == pytest.approx(mean, rel=1e-12)
        assert weights.std == pytest.approx(sigma * math.sqrt(-dt), rel=1e-12)


def test_flow_sde_on_a_diffusion_is_the_reverse_sde():
    path = LinearVP()
    now, then = path.points(torch.tensor([0.6, 0.59], dtype=torch.float64))
    x0, noise, dt = 0.3, 0.8, -0.01
    beta = path.beta_min + 0.6 * (path.beta_max - path.beta_min)
    x, score = now.alpha * x0 + now.sigma * noise, -noise / now.sigma
    weights = FlowSDE(math.sqrt(2)).weights(now, then)  # Song et al. 2021, eq. 6 and 11
    mean = x + (-0.5 * beta * x - beta * score) * dt
    assert weights.x0 * x0 + weights.noise * noise == pytest.approx(mean, rel=1e-12)
    assert weights.std == pytest.approx(math.sqrt(-beta * dt), rel=1e-12)


def test_dance_sde_is_dance_grpo_s_formula():
    x, v, eta = 0.9, -0.6, 0.3
    for now, then in pairwise(FLOW.points(FLOW.times(5, shift=3.0))):
        t, dt = now.t, then.t - now.t
        x0 = x - t * v
        mean = x + (v + 0.5 * eta**2 * (x - (1 - t) * x0) / t**2) * dt
        weights = DanceSDE(eta).weights(now, then)
        assert mean_on_flow(weights, x, v, t) == pytest.approx(mean, rel=1e-12)
        assert weights.std == pytest.approx(eta * math.sqrt(-dt), rel=1e-12)


def test_cps_is_flow_cps_s_formula():
    x, v, eta = 0.9, -0.6, 0.8
    for now, then in pairwise(FLOW.points(FLOW.times(5))):
        t, s = now.t, then.t
        std = s * math.sin(eta * math.pi / 2)
        mean = (1 - s) * (x - t * v) + math.sqrt(max(0, s**2 - std**2)) * (x + (1 - t) * v)
        weights = CPS(eta).weights(now, then)
        assert mean_on_flow(weights, x, v, t) == pytest.approx(mean, rel=1e-12)
        assert weights.std == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize(
    "rule", [Posterior(0.0), FlowSDE(0.0), DanceSDE(0.0), Euler(), LearnedNoise()], ids=name
)
def test_without_noise_every_rule_is_euler_on_the_flow(rule):
    for now, then in pairwise(FLOW.points(FLOW.times(7))):
        weights = rule.weights(now, then)
        assert weights[:2] == pytest.approx((1 - then.t, then.t), abs=1e-12)
        assert weights.std in (0.0, None)


def test_cps_without_noise_is_ddim():
    path = LinearVP()
    for now, then in pairwise(path.points(path.times(7))):
        assert CPS(0.0).weights(now, then) == Posterior(0.0).weights(now, then)


@pytest.mark.parametrize(
    ("rule", "value"),
    [(Posterior, -0.1), (Posterior, 1.1), (CPS, 2), (FlowSDE, -1), (DanceSDE, -1)],
)
def test_impossible_noise_is_refused(rule, value):
    with pytest.raises(UserError, match="give"):
        rule(value)


# ------------------------------------------------------------------------- limits and convergence


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_small_posterior_steps_are_the_flow_sde_with_a_of_sqrt_2_eta(path, eta):
    def difference(dt):
        times = torch.tensor([0.6, 0.6 - dt], dtype=torch.float64)
        now, then = path.points(times)
        a, b = Posterior(eta).weights(now, then), FlowSDE(math.sqrt(2) * eta).weights(now, then)
        # What the step adds to Euler's, per unit of time, and the noise's rate.
        return max(abs(a.x0 - b.x0), abs(a.noise - b.noise)) / dt, abs(a.std / b.std - 1)

    coarse, fine = difference(0.1), difference(1e-5)
    assert coarse[1] > 0.01  # at ten steps they still differ
    assert fine[0] < 1e-3
    assert fine[1] < 1e-3


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(("rule", "order"), [(Euler(), 1), (Heun(), 2), (Posterior(0.0), 1)])
def test_ode_rules_converge_at_their_order(path, rule, order):
    errors = [abs(math.sqrt(chain(path, rule, n, variance=0.25)) - 0.5) for n in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(
    "rule", [Posterior(0.5), Posterior(1.0), FlowSDE(0.7), FlowSDE(1.4), DanceSDE(0.3)]
)
def test_stochastic_rules_converge_to_the_data_whatever_their_noise(path, rule):
    errors = [abs(chain(path, rule, n, variance=0.25) / 0.25 - 1) for n in (200, 800, 3200)]
    assert errors[2] < 0.02
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(
    ("rule", "steps", "ratio"),
    [
        (Euler(), 10, 0.77),
        (FlowSDE(0.7), 10, 0.93),
        (DanceSDE(0.3), 10, 0.79),
        (Posterior(0.5), 10, 0.75),
        (CPS(0.8), 10, 0.52),
        (Euler(), 4000, 1.0),
        (FlowSDE(0.7), 4000, 1.0),
        (Posterior(0.5), 4000, 1.0),
        (CPS(0.8), 4000, 0.65),
        (CPS(0.3), 4000, 0.94),
    ],
)
def test_variance_of_the_flow_rules_is_as_calculated(rule, steps, ratio):
    """The table of a closed-form recursion done apart from this code: CPS alone never reaches the data's variance."""
    assert chain(FLOW, rule, steps) == pytest.approx(ratio, abs=0.0051)


def test_few_shifted_sde_steps_explode_on_narrow_data_and_excess_noise_tells():
    times = FLOW.times(5, shift=3.0)
    assert chain(FLOW, FlowSDE(0.7), 5, variance=0.04, shift=3.0) / 0.04 == pytest.approx(
        4.6, abs=0.051
    )
    points = FLOW.points(times)
    assert max(excess_noise(FlowSDE(0.7), points)) > 1.05
    for rule in (Posterior(1.0), CPS(0.8), Euler()):
        assert excess_noise(rule, points) == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
@pytest.mark.parametrize(
    "rule", [Posterior(1.0), Posterior(0.0), Euler(), Heun(), FlowSDE(0.7), DanceSDE(0.3)], ids=name
)
def test_drawn_samples_have_the_data_s_mean_and_variance(path, rule):
    mean, variance, count, steps = 0.6, 0.25, 20_000, 100 if isinstance(rule, Heun) else 400
    sampler = Sampler(path, "v", rule, path.times(steps))
    generator = torch.Generator().manual_seed(0)
    start = standard_normal((count, 1), generator, dtype=torch.float64)
    begin = sampler.points[0]
    # From the marginal at the path's end, which is not quite N(0, 1) on a diffusion.
    start = begin.alpha * mean + start * math.sqrt(marginal_variance(path, begin.t, variance))
    data = sampler.sample(exact_denoiser(path, "v", mean, variance), start, generator=generator)
    # Five standard errors, and what these steps leave: DDPM's variance is 3.7 % short on the linear path.
    assert float(data.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / count) + 0.005)
    assert float(data.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / count) + 0.04)
