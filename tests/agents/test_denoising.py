"""Paths, predictions, losses and training times against definitions, finite differences and brute force."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agents.core.denoising import convert, corrupt, draw_times, squared_error
from agents.core.errors import UserError
from agents.core.noise_paths import CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from agents.core.step_rules import Euler, Posterior

CONTINUOUS = [RectifiedFlow(), LinearVP(), CosineVP()]
DISCRETE = [
    DiscreteVP(20),
    DiscreteVP(100),
    DiscreteVP(1000, "linear"),
    DiscreteVP(1000, "scaled_linear", 0.00085, 0.012),
]
PATHS = CONTINUOUS + DISCRETE
KINDS = ["noise", "x0", "v", "velocity"]


def name(value):
    return type(value).__name__ + getattr(value, "schedule", "")


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_slopes_equal_finite_differences(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    below, here, above = (path.coefficients(t + h) for h in (-1e-6, 0, 1e-6))
    for value, slope in ((0, 2), (1, 3)):
        difference = (above[value] - below[value]) / 2e-6
        torch.testing.assert_close(here[slope], difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_paths_go_from_data_to_noise(path):
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000 * path.last
    ends = path.coefficients(torch.tensor([0.0, path.last], dtype=torch.float64))
    assert ends.alpha[0] == 1
    assert ends.sigma[0] == 0
    assert ends.alpha[1] < 0.12  # the scaled linear schedule of Stable Diffusion is the loosest
    assert (path.log_snr(t).diff() < 0).all()


@pytest.mark.parametrize("path", [*DISCRETE, LinearVP(), CosineVP()], ids=name)
def test_diffusions_preserve_variance(path):
    t = torch.arange(1, 21, dtype=torch.float64) / 20 * path.last
    c = path.coefficients(t)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(t), rtol=1e-14, atol=1e-14)


def test_cosine_sigma_does_not_cancel_near_the_data():
    t = 1e-9
    first = 0.008 / 1.008 * math.pi / 2
    slope = 2 * math.tan(first) * math.pi / 2 / 1.008  # d(1 - alpha^2)/dt at 0
    sigma = CosineVP().coefficients(torch.tensor(t, dtype=torch.float64)).sigma
    assert float(sigma) == pytest.approx(math.sqrt(slope * t), rel=1e-6)


def test_linear_alpha_integrates_beta():
    path = LinearVP(0.2, 15.0)
    t = torch.linspace(0, 0.7, 20_001, dtype=torch.float64)
    integral = torch.trapezoid(0.2 + t * 14.8, t)
    torch.testing.assert_close(
        path.coefficients(t[-1:]).alpha, torch.exp(-0.5 * integral)[None], rtol=1e-9, atol=0
    )


def test_discrete_cosine_equals_a_loop_over_betas():
    def kept(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    path, alpha_bar = DiscreteVP(50), 1.0
    for k in range(50):
        alpha_bar *= 1 - min(1 - kept((k + 1) / 50) / kept(k / 50), 0.999)
        c = path.coefficients(torch.tensor((k + 1) / 50))
        assert float(c.alpha) == pytest.approx(math.sqrt(alpha_bar), rel=1e-12)
        assert int(path.index(torch.tensor((k + 1) / 50))) == k
    assert float(path.betas()[-1]) == 0.999


def test_flow_log_snr_is_that_of_the_line():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(RectifiedFlow().log_snr(t), 2 * torch.log((1 - t) / t))


@pytest.mark.parametrize("path", DISCRETE, ids=name)
def test_euler_on_a_discrete_path_is_ddim(path):
    points = path.points(path.times(path.knots))
    for now, then in pairwise(points):
        a, b = Euler().weights(now, then), Posterior(eta=0).weights(now, then)
        assert a[:3] == pytest.approx(b[:3], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("path", [DiscreteVP(1000), DiscreteVP(20), DiscreteVP(37)])
def test_times_in_single_precision_are_knots(path):
    t = torch.arange(path.knots + 1) / path.knots
    exact = torch.arange(path.knots + 1, dtype=torch.float64) / path.knots
    for a, b in zip(path.coefficients(t.float()), path.coefficients(exact), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("path", PATHS, ids=name)
@given(
    time=st.floats(0.02, 0.98),
    source=st.sampled_from(KINDS),
    target=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_every_prediction_converts_to_every_other(path, time, source, target, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64)
    t = torch.full((3,), time, dtype=torch.float64)
    x, said = corrupt(path, source, x0, noise, t)
    converted = convert(said, x, t, path, source, target)
    torch.testing.assert_close(converted, path.target(target, x0, noise, t), rtol=1e-6, atol=1e-6)
    back = convert(converted, x, t, path, target, source)
    torch.testing.assert_close(back, said, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", CONTINUOUS, ids=name)
def test_velocity_is_the_sample_s_slope_in_time(path):
    x0, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    slope = (path.mix(x0, noise, t + 1e-6) - path.mix(x0, noise, t - 1e-6)) / 2e-6
    torch.testing.assert_close(path.target("velocity", x0, noise, t), slope, rtol=1e-6, atol=1e-7)


def test_flow_velocity_is_noise_minus_data_and_v_is_salimans():
    x0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    t = torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(RectifiedFlow().target("velocity", x0, noise, t), noise - x0)
    path = DiscreteVP(1000)
    angle = torch.atan2(path.coefficients(t).sigma, path.coefficients(t).alpha)[:, None].float()
    torch.testing.assert_close(
        path.target("v", x0, noise, t), angle.cos() * noise - angle.sin() * x0, atol=2e-3, rtol=0
    )  # between knots the circle is a polygon


# --------------------------------------------------------------------------------------- training


def test_squared_error_equals_a_loop_with_weights_and_masks():
    generator = torch.Generator().manual_seed(0)
    prediction, target, weight = torch.randn(3, 5, 4, 3, generator=generator)
    mask = torch.rand(5, 4, 1, generator=generator) < 0.6
    mask[2] = False
    expected = []
    for b in range(5):
        terms = [
            float(weight[b, h, a] * (prediction[b, h, a] - target[b, h, a]) ** 2)
            for h in range(4)
            for a in range(3)
            if mask[b, h, 0]
        ]
        expected.append(sum(terms) / len(terms) if terms else 0.0)
    loss = squared_error(prediction, target, weight=weight, mask=mask)
    torch.testing.assert_close(loss, torch.tensor(expected))
    torch.testing.assert_close(
        squared_error(prediction, target), (prediction - target).square().mean((1, 2))
    )


def test_masked_elements_have_no_gradient_even_when_not_finite():
    prediction = torch.zeros(1, 2, 1, requires_grad=True)
    target = torch.tensor([[[1.0], [math.inf]]])
    loss = squared_error(prediction, target, mask=torch.tensor([[[True], [False]]]))
    loss.sum().backward()
    assert loss.tolist() == [1.0]
    assert prediction.grad.flatten().tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("choice", "cdf"),
    [
        ({}, stats.uniform().cdf),
        ({"distribution": "logit_normal", "first": -0.4, "second": 1.2}, None),
        ({"distribution": "beta", "first": 1.5, "second": 1.0}, stats.beta(1.5, 1).cdf),
        ({"distribution": "beta", "first": 0.8, "second": 2.5}, stats.beta(0.8, 2.5).cdf),
    ],
)
def test_training_times_follow_their_distribution(choice, cdf):
    t = draw_times(RectifiedFlow(), 20_000, torch.Generator().manual_seed(0), **choice).double()
    assert 0 < t.min()
    assert t.max() <= 1
    if cdf is None:
        t, cdf = torch.logit(t), stats.norm(-0.4, 1.2).cdf
    assert stats.kstest(t.numpy(), cdf).pvalue > 0.01


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_moves_the_mean_of_logit_normal_times_by_its_logarithm(shift):
    options = {"distribution": "logit_normal", "first": 0.3, "second": 0.8}
    t, other = (
        draw_times(RectifiedFlow(), 1000, torch.Generator().manual_seed(0), **options | own)
        for own in ({"shift": shift}, {"first": 0.3 + math.log(shift)})
    )
    torch.testing.assert_close(t, other)


def test_training_times_of_a_discrete_path_are_its_knots_equally_often():
    path = DiscreteVP(10)
    t = draw_times(path, (100, 500), torch.Generator().manual_seed(0))
    assert t.shape == (100, 500)
    counts = torch.bincount(path.index(t).flatten(), minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    torch.testing.assert_close(t * 10, (t * 10).round())


def test_training_times_stay_on_a_path_that_ends_early():
    t = draw_times(CosineVP(), 10_000, torch.Generator().manual_seed(0))
    assert 0.99 < t.max() <= CosineVP.last


@pytest.mark.parametrize(
    "choice",
    [
        {"distribution": "beta", "first": 0.0},
        {"distribution": "beta", "first": 1.0, "second": -1.0},
        {"distribution": "logit_normal", "second": 0.0},
    ],
)
def test_impossible_time_distributions_are_refused(choice):
    with pytest.raises(UserError, match=r"above 0|more than 0"):
        draw_times(RectifiedFlow(), 4, torch.Generator(), **choice)


def test_chain_times_by_hand():
    flow = RectifiedFlow()
    assert flow.times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert flow.times(4, shift=3.0).tolist() == pytest.approx(shifted)
    assert flow.times(3, "linspace").tolist() == pytest.approx([1.0, 0.5005, 0.001, 0.0])
    steps = DiscreteVP(100)
    assert steps.index(steps.times(5)).tolist() == [99, 79, 59, 39, 19, -1]
    assert steps.index(steps.times(5, "leading")).tolist() == [80, 60, 40, 20, 0, -1]
    assert steps.index(steps.times(5, "linspace")).tolist() == [99, 74, 50, 25, 0, -1]
    assert CosineVP().times(2).tolist() == pytest.approx([0.9946, 0.4973, 0.0])


@pytest.mark.parametrize(
    ("path", "steps", "shift"),
    [(RectifiedFlow(), 0, 1.0), (DiscreteVP(10), 11, 1.0), (DiscreteVP(10), 5, 3.0)],
)
def test_impossible_chain_times_are_refused(path, steps, shift):
    with pytest.raises(UserError, match=r"give at least 1|takes 1"):
        path.times(steps, shift=shift)
