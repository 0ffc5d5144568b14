"""Steering at inference on Gaussian data, where the tilted distribution and its normalizer are known."""

import math

import pytest
import torch

from agents.core.errors import UserError
from agents.core.noise_paths import CosineVP, RectifiedFlow
from agents.core.sampling import Sampler
from agents.core.step_rules import FlowSDE, Posterior
from agents.generative_models import steering
from agents.generative_models.steering import (
    NoiseSearchSettings,
    SteeringSettings,
    best_of_n,
    effective,
    fk_steer,
    length_penalty,
    optimize_noise,
    systematic,
)
from tests.agents.gaussians import exact_denoiser, variance_after

VARIANCE, SLOPE, STRENGTH, DIMENSION = 0.5, torch.tensor([1.0, -0.5]), 1.5, 2
STEPS = 6
PATHS = {"flow": (RectifiedFlow(), "velocity"), "diffusion": (CosineVP(), "v")}


def sampler_of(name="flow", rule=None, steps=STEPS):
    path, kind = PATHS[name]
    return Sampler(path, kind, rule or Posterior(1.0), path.times(steps)), exact_denoiser(
        path, kind, 0.0, VARIANCE
    )


def linear(x):
    return x @ SLOPE.to(x.dtype)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def steered(
    potential="difference", least=0.5, rows=1500, particles=8, name="flow", every=1, seed=0
):
    sampler, denoiser = sampler_of(name)
    start = torch.randn(rows * particles, DIMENSION, generator=draws(seed))
    settings = SteeringSettings(particles, STRENGTH, potential, every, least)
    said = fk_steer(sampler, denoiser, linear, start, None, draws(seed + 1), settings)
    return said, variance_after(sampler, denoiser, 1.0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("potential", ["difference", "max", "add", "rt"])
@pytest.mark.parametrize("least", [0.0, 0.5, 2.0])
def test_the_normalizer_is_unbiased_and_the_target_is_tilted(potential, least, name):
    """x ~ N(0, v) and a linear reward b x: E[exp(s b x)] = exp(s^2 |b|^2 v / 2), and the target is N(s v b, v).

    Never resampled, at few effective particles (where the published code loses its weights), and at every look.
    """
    # Sums of rewards so far overshoot what the end makes up for: two looks, or one group in many counts.
    said, variance = steered(potential, least, name=name, every=2 if potential == "add" else 1)
    exact = math.exp(0.5 * STRENGTH**2 * float(SLOPE.square().sum()) * variance)
    estimates = said.log_normalizer.exp()
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean()) - exact) < 4 * error
    assert error < 0.06 * exact
    # Weighted by its normalizer each group counts as much as it should: then averages are consistent.
    weight = (said.log_weight + said.log_normalizer[:, None]).exp()
    mean = (weight[..., None] * said.data).sum((0, 1)) / weight.sum()
    torch.testing.assert_close(
        mean, STRENGTH * variance * SLOPE.double(), atol=0.1, rtol=0, check_dtype=False
    )


def test_forgetting_weights_between_resamplings_would_show(monkeypatch):
    """The published defect: a look that does not resample, but forgets the weight that it gave."""
    right = steering.effective
    said, variance = steered("difference", 0.5)
    monkeypatch.setattr(
        steering, "effective", lambda w: right(w) + 0 * w.sub_(w.clone()).sum(1)
    )  # looks, then forgets
    forgot, _ = steered("difference", 0.5)
    exact = math.exp(0.5 * STRENGTH**2 * float(SLOPE.square().sum()) * variance)
    assert abs(float(said.log_normalizer.exp().mean()) / exact - 1) < 0.1
    assert abs(float(forgot.log_normalizer.exp().mean()) / exact - 1) > 0.2


@pytest.mark.parametrize(
    ("potential", "expected"),
    [
        ("difference", [1, 1, 1, 1, 1]),
        ("max", [1, 2, 3, 4, 5]),
        ("add", [1, 3, 6, 10, 15]),
        ("rt", [1, 2, 3, 4, 5]),
    ],
)
def test_weights_of_a_constant_reward_are_those_of_the_published_potentials(
    potential, expected, monkeypatch
):
    """Five looks at a reward of 1 and strength 1: e^(r - last), e^max, e^sum and e^r in the authors' fkd_class.py."""
    seen, right = [], steering.effective
    monkeypatch.setattr(steering, "effective", lambda w: seen.append(float(w[0, 0])) or right(w))
    sampler, denoiser = sampler_of()
    settings = SteeringSettings(2, 1.0, potential, 1, 0.0)
    start = torch.randn(2, DIMENSION, generator=draws())
    fk_steer(sampler, denoiser, lambda x: torch.ones(len(x)), start, None, draws(), settings)
    assert seen == expected


def test_steering_finds_better_images_than_chance():
    said, _ = steered(particles=4, rows=200)
    sampler, denoiser = sampler_of()
    plain = sampler.sample(denoiser, torch.randn(200, 2, generator=draws()), None, draws(1))
    assert linear(said.best()).mean() > linear(plain).mean() + 0.5


def test_systematic_resampling_keeps_floor_or_ceil_of_each_weight_and_is_unbiased():
    log_weight = torch.randn(1, 8, generator=draws()).double().expand(4000, -1)
    uniform = torch.rand(4000, generator=draws(1))
    kept = systematic(log_weight + 7.0, uniform)
    counts = torch.nn.functional.one_hot(kept, 8).sum(1).double()
    expected = 8 * torch.softmax(log_weight[0], 0)
    assert (counts >= expected.floor()).all()
    assert (counts <= expected.ceil()).all()
    torch.testing.assert_close(counts.mean(0), expected, atol=0.04, rtol=0)


def test_effective_numbers_are_those_of_the_definition():
    log_weight = torch.randn(5, 6, generator=draws(), dtype=torch.float64)
    weight = torch.softmax(log_weight, 1)
    torch.testing.assert_close(effective(log_weight + 3), 1 / weight.square().sum(1))
    torch.testing.assert_close(effective(torch.zeros(1, 6)), torch.tensor([6.0]))


def test_reno_climbs_the_reward_and_never_falls_below_its_start():
    sampler, denoiser = sampler_of(rule=Posterior(0.0), steps=3)
    start = torch.randn(16, DIMENSION, generator=draws(2))

    def distance(x):
        return -(x - torch.tensor([1.0, -1.0])).square().sum(1)

    before = distance(sampler.sample(denoiser, start))
    settings = NoiseSearchSettings(iterations=30, learning_rate=2.0)
    after = distance(optimize_noise(sampler, denoiser, distance, start, None, settings))
    assert (after >= before - 1e-6).all()
    assert after.mean() > 0.3 * before.mean()
    wrong = distance(
        optimize_noise(sampler, denoiser, lambda x: -distance(x), start, None, settings)
    )
    assert wrong.mean() < before.mean()


def test_the_length_of_a_noise_is_penalized_as_the_chi_distribution_says():
    noise = torch.randn(7, 3, 4, 4, generator=draws(), dtype=torch.float64)
    length = noise.flatten(1).norm(dim=1)
    log_density = (
        torch.distributions.Chi2(torch.tensor(48.0).double()).log_prob(length**2) + length.log()
    )
    penalty = length_penalty(noise) + log_density
    torch.testing.assert_close(penalty, penalty[:1].expand(7))


def test_the_best_of_n_is_the_maximum_of_its_group():
    sampler, denoiser = sampler_of(rule=FlowSDE(0.7))
    start = torch.randn(12, DIMENSION, generator=draws())
    best = best_of_n(sampler, denoiser, linear, start, None, 4, draws(1))
    everything = linear(sampler.sample(denoiser, start, None, draws(1))).view(3, 4)
    torch.testing.assert_close(linear(best), everything.max(1).values)


def test_impossible_steering_is_refused():
    still, denoiser = sampler_of(rule=Posterior(0.0))
    noisy, _ = sampler_of()
    start = torch.zeros(6, DIMENSION)
    with pytest.raises(UserError, match="cannot part"):
        fk_steer(still, denoiser, linear, start, None, draws(), SteeringSettings(2))
    with pytest.raises(UserError, match="groups of 4"):
        fk_steer(noisy, denoiser, linear, start, None, draws(), SteeringSettings(4))
    with pytest.raises(UserError, match="1 particles"):
        SteeringSettings(1)
    for bad in ({"strength": -1.0}, {"strength": math.nan}, {"least_effective": math.nan}):
        with pytest.raises(UserError, match="0 or more"):
            SteeringSettings(**bad)
    for name in ("iterations", "learning_rate", "regularization", "max_gradient_norm"):
        with pytest.raises(UserError, match=f"{name} is -1"):
            NoiseSearchSettings(**{name: -1})
    with pytest.raises(UserError, match="learning_rate is nan"):
        NoiseSearchSettings(learning_rate=math.nan)
    with pytest.raises(UserError, match="deterministic"):
        optimize_noise(noisy, denoiser, linear, start, None, NoiseSearchSettings())
    with pytest.raises(UserError, match="no gradient"):
        optimize_noise(
            still, denoiser, lambda x: linear(x).detach(), start, None, NoiseSearchSettings()
        )
    with pytest.raises(UserError, match="groups of 5"):
        best_of_n(still, denoiser, linear, start, None, 5)
