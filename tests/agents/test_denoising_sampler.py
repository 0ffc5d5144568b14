"""Chains: log-probabilities, what they bound and fix, whom they share a batch with, and guidance."""

import doctest
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from agents.core import sampling
from agents.core.chain_steps import Fixed, Limits, Step, reduce_log_prob, standard_normal
from agents.core.errors import UserError
from agents.core.guidance import ClassifierFree, ClassifierGuidance
from agents.core.noise_paths import CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from agents.core.sampling import Sampler
from agents.core.step_rules import CPS, DanceSDE, Euler, FlowSDE, Heun, LearnedNoise, Posterior
from tests.agents.gaussians import exact_denoiser, marginal_variance, variance_after

FLOW, STEPS = RectifiedFlow(), DiscreteVP(20)
SHAPE = (6, 4, 3)
STOCHASTIC = [Posterior(1.0), FlowSDE(), DanceSDE(), CPS(), CPS(true_log_prob=True), LearnedNoise()]


class Network(nn.Module):
    """Two layers over chunk, time and condition."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(12 + 1 + 2, 32), nn.Linear(32, 12)

    def forward(self, x, t, condition):
        parts = torch.cat([x.flatten(1), t[:, None], condition], dim=1)
        return self.second(torch.tanh(self.first(parts))).unflatten(1, (4, 3))


class Spread(Network):
    def forward(self, x, t, condition):
        return 0.1 + 0.1 * torch.sigmoid(4 * super().forward(x, t, condition))


def name(value):
    return type(value).__name__


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def recorded(rule, limits=None, *, path=FLOW, kind="velocity", steps=5, **options):
    """Return a sampler, its networks, conditions and a chain."""
    sampler = Sampler(path, kind, rule, path.times(steps), limits)
    network, spread = Network(), Spread(1) if isinstance(rule, LearnedNoise) else None
    condition = torch.randn(SHAPE[0], 2, generator=generator(7))
    start = standard_normal(SHAPE, generator(3))
    with torch.no_grad():
        chain = sampler.chain(
            network, start, condition, generator(4), noise_network=spread, **options
        )
    return sampler, network, spread, condition, chain


# ------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("rule", STOCHASTIC, ids=name)
@pytest.mark.parametrize(
    "limits", [None, Limits(x0=1.0, noise=2.0, min_std=0.05, min_log_prob_std=0.2, sample=1.5)]
)
def test_a_ratio_starts_at_exactly_one(rule, limits):
    sampler, network, spread, condition, chain = recorded(rule, limits)
    assert len(chain.stochastic) >= 4
    for place, index in enumerate(chain.stochastic):
        x, drawn = chain.samples[index], chain.samples[index + 1]
        for which in (index, torch.full((len(x),), index)):
            again = sampler.log_prob(network, x, drawn, which, condition, noise_network=spread)
            assert torch.equal(again, chain.log_prob[place])
            assert again.requires_grad
        step = sampler.step(network, chain.samples[index], index, condition, noise_network=spread)
        assert torch.equal(step.mean, chain.mean[place])


@pytest.mark.parametrize("rule", [Posterior(1.0), FlowSDE(), LearnedNoise()], ids=name)
def test_steps_of_a_mixed_batch_are_those_of_whole_ones(rule):
    limits = Limits(sample=0.8, min_std=0.05)  # the start is not clipped, what follows is
    sampler, network, spread, condition, chain = recorded(rule, limits)
    index = torch.tensor([0, 1, 2, 3, 4, 0])
    rows = torch.arange(len(index))
    mixed = sampler.log_prob(
        network,
        chain.samples[index, rows],
        chain.samples[index + 1, rows],
        index,
        condition,
        noise_network=spread,
    )
    torch.testing.assert_close(mixed, chain.log_prob[index, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", STOCHASTIC, ids=name)
def test_log_prob_is_torch_s_normal(rule):
    sampler, network, spread, condition, chain = recorded(rule)
    for place, index in enumerate(chain.stochastic):
        x, drawn = chain.samples[index], chain.samples[index + 1]
        step = sampler.step(network, x, index, condition, noise_network=spread)
        if isinstance(rule, CPS) and not rule.true_log_prob:
            constant = -0.5 * math.log(math.pi)
            torch.testing.assert_close(
                chain.log_prob[place], -((drawn - step.mean) ** 2) + constant
            )
        else:
            expected = Normal(step.mean, step.std).log_prob(drawn)
            torch.testing.assert_close(chain.log_prob[place], expected, rtol=1e-4, atol=1e-5)


def test_log_prob_has_the_score_s_gradient():
    sampler, network, _, condition, chain = recorded(FlowSDE())
    x, drawn = chain.samples[1].double(), chain.samples[2].double()
    network, condition = network.double(), condition.double()

    def denoiser(x, t, condition):
        return network(x, t.double(), condition)

    bias = network.second.bias
    sampler.log_prob(denoiser, x, drawn, 1, condition).sum().backward()
    with torch.no_grad():
        values = []
        for shift in (1e-6, -1e-6):
            bias[5] += shift
            values.append(sampler.log_prob(denoiser, x, drawn, 1, condition).sum())
            bias[5] -= shift
    assert float(bias.grad[5]) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-5)


def test_reductions_sum_or_average_what_counts():
    log_prob = torch.randn(SHAPE, generator=generator())
    mean = Independent(Normal(torch.zeros(SHAPE), 1.0), 2).log_prob(log_prob)
    elements = Normal(0.0, 1.0).log_prob(log_prob)
    torch.testing.assert_close(reduce_log_prob(elements, "sum"), mean)
    torch.testing.assert_close(reduce_log_prob(elements, "mean"), mean / 12)
    mask = torch.zeros(4, 1, dtype=torch.bool)
    mask[:2] = True
    torch.testing.assert_close(
        reduce_log_prob(elements, "mean", mask), elements[:, :2].mean((1, 2))
    )
    torch.testing.assert_close(reduce_log_prob(elements, "sum", mask), elements[:, :2].sum((1, 2)))


def test_kl_is_torch_s_and_has_a_gradient():
    mean, other = torch.randn(2, *SHAPE, generator=generator())
    mean.requires_grad_()
    step = Step(mean, 0.3, 0.5 / 0.3**2, math.log(0.3) + 0.5 * math.log(2 * math.pi))
    expected = kl_divergence(Normal(mean, 0.3), Normal(other, 0.3))
    torch.testing.assert_close(step.kl(other), expected)
    step.kl(other).sum().backward()
    torch.testing.assert_close(mean.grad, (mean - other).detach() / 0.3**2)


@pytest.mark.parametrize("which", [4, torch.tensor([0, 1, 2, 3, 4, 0])], ids=["one", "mixed"])
def test_a_step_without_noise_has_no_log_prob(which):
    sampler, network, _, condition, chain = recorded(Posterior(1.0))
    assert sampler.stochastic == chain.stochastic == (0, 1, 2, 3)
    with pytest.raises(UserError, match=r"step 4 of 0 .* draws no noise"):
        sampler.log_prob(network, chain.samples[4], chain.samples[5], which, condition)


def test_deterministic_chains_have_no_log_prob_and_need_no_generator():
    sampler = Sampler(FLOW, "velocity", Heun(), FLOW.times(3), Limits(min_std=0.1))
    chain = sampler.chain(Network(), torch.zeros(SHAPE), torch.zeros(6, 2))
    assert chain.log_prob.shape == (0, *SHAPE)
    assert chain.stochastic == ()


def test_rules_may_differ_between_steps():
    rules = [Euler(), FlowSDE(), FlowSDE(), Heun(), Posterior(0.0)]
    sampler, network, _, condition, chain = recorded(rules)
    assert chain.stochastic == (1, 2)
    x = chain.samples[0]
    for index, rule in enumerate(rules):
        alone = Sampler(FLOW, "velocity", rule, FLOW.times(5))
        step = alone.step(network, x, index, condition)
        assert torch.equal(step.mean, sampler.step(network, x, index, condition).mean)
        which = torch.full((6,), index)
        if isinstance(rule, Heun):
            with pytest.raises(UserError, match="Heun"):
                sampler.step(network, x, which, condition)
        else:
            assert torch.equal(step.mean, sampler.step(network, x, which, condition).mean)


# ------------------------------------------------------------------------------ clips and floors


def test_floors_are_dppo_s():
    limits = Limits(min_std=0.1, min_log_prob_std=0.25)
    sampler, network, _, condition, chain = recorded(
        Posterior(1.0), limits, path=STEPS, kind="noise", steps=20
    )
    assert chain.stochastic == tuple(range(20))  # the floor makes the last step stochastic, too
    free = Sampler(STEPS, "noise", Posterior(1.0), STEPS.times(20))
    for index in range(20):
        x, drawn = chain.samples[index], chain.samples[index + 1]
        step = sampler.step(network, x, index, condition)
        plain = free.step(network, x, index, condition)
        assert step.std == max(plain.std, 0.1)
        assert torch.equal(step.mean, plain.mean)
        expected = Normal(step.mean, max(step.std, 0.25)).log_prob(drawn)
        torch.testing.assert_close(chain.log_prob[index], expected, rtol=1e-4, atol=1e-5)


def test_floors_hold_for_a_learned_noise():
    limits = Limits(min_std=0.15, min_log_prob_std=0.17)
    sampler, network, spread, condition, chain = recorded(LearnedNoise(), limits)
    step = sampler.step(network, chain.samples[0], 0, condition, noise_network=spread)
    said = spread(chain.samples[0], torch.ones(6), condition)
    assert (said < 0.15).any()
    assert (said > 0.17).any()
    torch.testing.assert_close(step.std, said.clamp(min=0.15))
    expected = Normal(step.mean, said.clamp(min=0.17)).log_prob(chain.samples[1])
    torch.testing.assert_close(chain.log_prob[0], expected)
    with pytest.raises(UserError, match="noise_network"):
        sampler.step(network, chain.samples[0], 0, condition)


def test_learned_noise_has_a_gradient_to_its_network():
    sampler, network, spread, condition, chain = recorded(LearnedNoise())
    log_prob = sampler.log_prob(
        network, chain.samples[1], chain.samples[2], 1, condition, noise_network=spread
    )
    log_prob.sum().backward()
    assert spread.second.bias.grad.abs().min() > 0
    assert network.second.bias.grad.abs().min() > 0


@pytest.mark.parametrize("path", [FLOW, LinearVP(), STEPS], ids=name)
@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
@pytest.mark.parametrize("rule", [Posterior(0.7), FlowSDE(), Heun()], ids=name)
def test_clipped_x0_is_what_the_step_would_do_with_a_clipped_prediction(path, kind, rule):
    sampler = Sampler(path, kind, rule, path.times(5), Limits(x0=0.4))
    exact = Sampler(path, "x0", rule, path.times(5))
    x = standard_normal((5, 3), generator(), dtype=torch.float64)

    def x0(x, t, condition):
        return 1.5 * torch.sin(x)

    def same(x, t, condition):
        c = path.coefficients(t.double()).beside(x)
        noise = (x - c.alpha * x0(x, t, None)) / c.sigma
        return path.target(kind, x0(x, t, None), noise, t)

    for index in range(5):
        clipped = exact.step(lambda *inputs: x0(*inputs).clamp(-0.4, 0.4), x, index)
        torch.testing.assert_close(
            sampler.step(same, x, index).mean, clipped.mean, rtol=1e-5, atol=1e-6
        )


def test_noise_and_results_are_clipped_where_asked():
    def network(x, t, condition):
        return -2 * torch.ones_like(x)  # x0 = x + 2 t

    start = standard_normal((2000, 2), generator())
    final = Sampler(FLOW, "velocity", FlowSDE(), FLOW.times(4), Limits(final=1.0))
    chain = final.chain(network, start, generator=generator(1))
    assert chain.samples.abs().max() > 2
    assert torch.equal(chain.data, chain.samples[-1].clamp(-1, 1))
    part = final.sample(network, start, generator=generator(1), steps=range(2))
    assert torch.equal(part, chain.samples[2])  # not the data yet

    every = Sampler(FLOW, "velocity", Euler(), FLOW.times(4), Limits(sample=1.0))
    x = start
    for _ in range(4):
        x = (x + 0.5).clamp(-1, 1)
    torch.testing.assert_close(every.sample(network, start), x)

    mild = Sampler(FLOW, "velocity", FlowSDE(), FLOW.times(4), Limits(noise=0.5))
    chain = mild.chain(network, start, generator=generator(1))
    step = mild.step(network, chain.samples[1], 1)
    drawn = (chain.samples[2] - step.mean) / step.std
    assert float(drawn.abs().max()) == pytest.approx(0.5, abs=1e-5)


def test_temperature_scales_fresh_noise_only():
    sampler, network, _, condition, chain = recorded(FlowSDE(), temperature=0.5)
    step = sampler.step(network, chain.samples[0], 0, condition)
    full = recorded(FlowSDE())[-1]
    torch.testing.assert_close(
        2 * (chain.samples[1] - step.mean), full.samples[1] - step.mean, rtol=1e-4, atol=1e-5
    )
    none = sampler.sample(network, torch.zeros(SHAPE), condition, temperature=0.0)
    x = torch.zeros(SHAPE)
    for index in range(5):
        x = sampler.step(network, x, index, condition).mean
    assert torch.equal(none, x)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"times": torch.tensor([0.5, 1.0, 0.0])}, "descend"),
        ({"times": torch.tensor([1.0, 0.5])}, "descend"),
        ({"times": torch.tensor([0.0])}, "descend"),
        ({"rule": [Euler()]}, "1 step rules for 2 steps"),
        ({"kind": "noise"}, "nothing of the data is left"),
    ],
)
def test_impossible_chains_are_refused(options, match):
    given = {"kind": "velocity", "rule": Euler(), "times": FLOW.times(2)} | options
    with pytest.raises(UserError, match=match):
        Sampler(FLOW, **given)


def test_bad_requests_are_refused():
    sampler = Sampler(FLOW, "velocity", FlowSDE(), FLOW.times(4))
    with pytest.raises(UserError, match="give a generator"):
        sampler.sample(Network(), torch.zeros(SHAPE), torch.zeros(6, 2))
    for steps in (range(2, 6), range(0), range(0, 4, 2), range(-1, 2)):
        with pytest.raises(UserError, match="no run of steps"):
            sampler.sample(Network(), torch.zeros(SHAPE), torch.zeros(6, 2), steps=steps)
    with pytest.raises(UserError, match="2 generators for 6 samples"):
        standard_normal(SHAPE, [generator(), generator()])
    with pytest.raises(UserError, match="more than 0"):
        Limits(x0=0.0)
    with pytest.raises(UserError, match="0 or more"):
        Limits(min_std=-0.1)


# ------------------------------------------------------------------------------------ whole chains


def test_a_batch_of_one_equals_a_batch_of_many():
    sampler = Sampler(FLOW, "velocity", FlowSDE(), FLOW.times(6))
    network, condition = Network(), torch.randn(6, 2, generator=generator(7))
    many = [generator(10 + i) for i in range(6)]
    batch = sampler.sample(network, standard_normal(SHAPE, many), condition, many)
    for i in range(6):
        one = [generator(10 + i)]
        alone = sampler.sample(network, standard_normal((1, 4, 3), one), condition[i : i + 1], one)
        torch.testing.assert_close(alone[0], batch[i], rtol=1e-5, atol=1e-6)


def test_a_chain_may_be_cut_and_go_on_with_another_network():
    sampler, network, _, condition, chain = recorded(FlowSDE())
    draws = generator(4)
    first = sampler.chain(network, chain.samples[0], condition, draws, steps=range(2))
    second = sampler.chain(network, first.data, condition, draws, steps=range(2, 5))
    assert torch.equal(second.data, chain.data)
    assert (second.first, second.stochastic) == (2, (2, 3, 4))
    assert torch.equal(torch.cat([first.log_prob, second.log_prob]), chain.log_prob)
    assert torch.equal(torch.cat([first.samples[:-1], second.samples]), chain.samples)


def test_sample_is_the_chain_without_its_record():
    sampler, network, _, condition, chain = recorded(Posterior(1.0))
    data = sampler.sample(network, chain.samples[0], condition, generator(4))
    assert torch.equal(data, chain.data)


def test_rewards_have_a_gradient_through_the_whole_chain():
    sampler, network, _, condition, chain = recorded(Posterior(0.5))
    data = sampler.sample(network, chain.samples[0], condition, generator(4))
    data.square().mean().backward()
    assert network.first.weight.grad.abs().max() > 0


def test_half_precision_networks_leave_samples_in_single():
    sampler, network, _, condition, chain = recorded(FlowSDE())

    def half(x, t, condition):
        return network(x, t, condition).bfloat16()

    chain = sampler.chain(half, chain.samples[0], condition, generator(4))
    assert chain.samples.dtype == chain.log_prob.dtype == torch.float32
    again = sampler.log_prob(half, chain.samples[2], chain.samples[3], 2, condition)
    assert torch.equal(again, chain.log_prob[2])


@pytest.mark.parametrize("path", [FLOW, STEPS, CosineVP()], ids=name)
@pytest.mark.parametrize("rule", [Posterior(1.0), Posterior(0.0)])
def test_fixed_coordinates_stay_and_lie_at_their_noise_level(path, rule):
    mask = torch.zeros(1, 4, 1, dtype=torch.bool)
    mask[:, 0] = True
    values = torch.tensor([[[0.3, -0.2, 0.9]]])
    start = standard_normal(SHAPE, generator(3))
    fixed = Fixed(mask, values, start)
    sampler = Sampler(path, "v", rule, path.times(5))
    network, condition = Network(), torch.zeros(6, 2)
    chain = sampler.chain(network, start, condition, generator(4), fixed=fixed)
    assert torch.equal(chain.data[:, 0], values[:, 0].expand(6, 3))
    assert not torch.isclose(chain.data[:, 1:], values).any()
    for point, x in zip(sampler.points, chain.samples, strict=True):
        t = torch.full((6,), point.t, dtype=torch.float64)
        torch.testing.assert_close(x[:, 0], path.mix(values.expand(SHAPE), start, t)[:, 0])
    for place, index in enumerate(chain.stochastic):
        assert (chain.log_prob[place][:, 0] == 0).all()
        assert (chain.log_prob[place][:, 1:] != 0).all()
        again = sampler.log_prob(
            network, chain.samples[index], chain.samples[index + 1], index, condition, fixed=fixed
        )
        assert torch.equal(again, chain.log_prob[place])


# ----------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("path", [FLOW, LinearVP()], ids=name)
@pytest.mark.parametrize("kind", ["v", "velocity", "x0"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_moves_a_gaussian_to_scale_times_its_mean(path, kind, scale):
    """With N(m, s^2) under a condition and N(0, s^2) without, guided scores are those of N(scale * m, s^2)."""
    asked = []

    def network(x, t, condition):
        asked.append(len(x))
        conditional = exact_denoiser(path, kind, 0.5, 0.25)(x, t, None)
        without = exact_denoiser(path, kind, 0.0, 0.25)(x, t, None)
        return torch.where(condition > 0, conditional, without)

    guided = ClassifierFree(network, torch.tensor([0.0]), scale)
    sampler = Sampler(path, kind, Heun(), path.times(100))
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    exact = exact_denoiser(path, kind, scale * 0.5, 0.25)
    for t in (0.9, 0.3):
        t = torch.full((2,), t)
        torch.testing.assert_close(guided(x, t, torch.ones(2, 1)), exact(x, t, None))
    assert asked == [2 if scale in (0, 1) else 4] * 2  # one pass, and not doubled in vain
    assert variance_after(
        sampler,
        lambda x, t, c: guided(x, t, torch.ones(len(x), 1)),
        marginal_variance(path, 1.0, 0.25),
    ) == pytest.approx(0.25, rel=0.01)
    mean = sampler.sample(
        guided,
        torch.full((1, 1), scale * 0.5 * sampler.points[0].alpha),
        torch.ones(1, 1),
        temperature=0.0,
    )
    assert float(mean) == pytest.approx(scale * 0.5, abs=1e-3)


@pytest.mark.parametrize("path", [FLOW, LinearVP(), STEPS], ids=name)
@pytest.mark.parametrize("kind", ["noise", "x0", "v", "velocity"])
def test_classifier_guidance_gives_the_posterior_s_denoiser(path, kind):
    """Data N(0, v), and the class is a measurement y = x0 + N(0, r): Bayes says what the guided network must be."""
    v, r, y = 0.8, 0.3, 1.2

    def log_prob(x, t, condition):
        c = path.coefficients(t.double()).beside(x)
        total = c.alpha**2 * v + c.sigma**2
        mean, variance = c.alpha * v * x / total, v * c.sigma**2 / total  # of x0, given x_t
        return Normal(mean, (variance + r).sqrt()).log_prob(condition).sum(1)

    guided = ClassifierGuidance(exact_denoiser(path, kind, 0.0, v), path, kind, log_prob, 1.0)
    posterior = exact_denoiser(path, kind, v * y / (v + r), v * r / (v + r))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for time in (0.95, 0.5, 0.05):
        t = torch.full((9,), time)
        torch.testing.assert_close(
            guided(x, t, torch.tensor(y)), posterior(x, t, None), rtol=1e-7, atol=1e-7
        )


def test_classifier_guidance_draws_the_posterior():
    v, r, y = 0.8, 0.3, 1.2

    def log_prob(x, t, condition):
        c = FLOW.coefficients(t.double()).beside(x)
        total = c.alpha**2 * v + c.sigma**2
        return Normal(c.alpha * v * x / total, (v * c.sigma**2 / total + r).sqrt()).log_prob(
            torch.tensor(y)
        )

    sampler = Sampler(FLOW, "velocity", Posterior(0.5), FLOW.times(300))
    guided = ClassifierGuidance(
        exact_denoiser(FLOW, "velocity", 0.0, v), FLOW, "velocity", log_prob, 1.0
    )
    start = standard_normal((20_000, 1), generator(), dtype=torch.float64)
    data = sampler.sample(guided, start, generator=generator(1))
    variance = v * r / (v + r)
    assert float(data.mean()) == pytest.approx(v * y / (v + r), abs=0.02)
    assert float(data.var()) == pytest.approx(variance, rel=0.06)
    alone = sampler.sample(guided.denoiser, start, generator=generator(1))
    assert abs(float(alone.mean())) < 0.05  # what the classifier changed


def test_the_documented_example_runs():
    assert doctest.testmod(sampling).attempted > 0
    assert doctest.testmod(sampling).failed == 0
