"""Action distributions against `torch.distributions`."""

import math

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from agents.core.distributions import (
    Categorical,
    Gaussian,
    bound_log_std,
    clipped_gaussian,
    kl,
    squashed_gaussian,
)


def test_squashed_log_prob_equals_torch_distributions_in_double_precision():
    torch.manual_seed(0)
    mean, log_std = torch.randn(64, 3).double(), torch.randn(64, 3).double().clamp(-2, 1)
    noise = torch.randn(64, 3).double()
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    u = mean + log_std.exp() * noise
    expected = reference.log_prob(reference.transforms[0](u)).sum(-1)
    torch.testing.assert_close(action, torch.tanh(u))
    torch.testing.assert_close(log_prob, expected)


def test_squashed_log_prob_stays_finite_at_the_border():
    action, log_prob = squashed_gaussian(
        torch.full((1, 2), 30.0), torch.zeros(1, 2), torch.zeros(1, 2)
    )
    assert action.max() <= 1
    assert torch.isfinite(log_prob).all()


def test_squashed_density_integrates_to_one():
    u = torch.linspace(-8, 8, 20001).double()
    mean, log_std = torch.tensor([0.3]).double(), torch.tensor([-0.4]).double()
    noise = ((u - mean) / log_std.exp())[:, None]
    action, log_prob = squashed_gaussian(mean.expand(len(u), 1), log_std.expand(len(u), 1), noise)
    assert abs(torch.trapezoid(log_prob.exp(), action[:, 0]).item() - 1) < 1e-5


def test_bound_log_std_covers_its_interval():
    raw = torch.tensor([-50.0, 0.0, 50.0])
    assert bound_log_std(raw, -10, 2).tolist() == [-10.0, -4.0, 2.0]


def test_clipped_gaussian_bounds_noise_and_action():
    mean, noise = torch.tensor([[0.0, 0.95]]), torch.tensor([[5.0, 5.0]])
    action = clipped_gaussian(mean, 1.0, noise, 0.3)
    torch.testing.assert_close(action, torch.tensor([[0.3, 1.0 - 1e-6]]))


def test_clipped_gaussian_keeps_the_gradient_of_the_mean_at_the_border():
    mean = torch.tensor([[0.99]], requires_grad=True)
    clipped_gaussian(mean, 1.0, torch.tensor([[3.0]]), None).sum().backward()
    assert mean.grad.item() == 1.0


def test_gaussians_and_categoricals_equal_torch_distributions():
    torch.manual_seed(0)
    mean, log_std = torch.randn(5, 3), torch.randn(3)
    action = torch.randn(5, 3)
    reference = Normal(mean, log_std.exp())
    ours = Gaussian(mean, log_std)
    torch.testing.assert_close(ours.log_prob(action), reference.log_prob(action).sum(-1))
    torch.testing.assert_close(ours.entropy(), reference.entropy().sum(-1))
    logits = torch.randn(5, 4)
    choice = torch.tensor([0, 3, 1, 1, 2])
    discrete, expected = Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(discrete.log_prob(choice), expected.log_prob(choice))
    torch.testing.assert_close(discrete.entropy(), expected.entropy())
    assert torch.equal(discrete.mode(), logits.argmax(-1))
    assert torch.equal(ours.mode(), mean)


def test_draws_have_their_distributions_moments_and_repeat_with_the_generator():
    mean, log_std = torch.tensor([[1.0, -2.0]]).expand(100_000, 2), torch.tensor([0.5, -1.0])
    draws = Gaussian(mean, log_std).sample(torch.Generator().manual_seed(0))
    again = Gaussian(mean, log_std).sample(torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    torch.testing.assert_close(draws.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(draws.std(0), log_std.exp(), atol=0.02, rtol=0)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(100_000, 3)
    counts = Categorical(logits).sample(torch.Generator().manual_seed(0)).bincount() / 100_000
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.01, rtol=0)


def test_kl_equals_torch_distributions_and_is_zero_at_itself():
    torch.manual_seed(0)
    means, spreads = torch.randn(2, 5, 3), torch.randn(2, 3)
    ours = [Gaussian(mean, log_std) for mean, log_std in zip(means, spreads, strict=True)]
    theirs = [Normal(g.mean, g.log_std.exp().expand(5, 3)) for g in ours]
    torch.testing.assert_close(kl(*ours), kl_divergence(*theirs).sum(-1))
    assert (kl(ours[0], ours[0]) == 0).all()
    choices = [Categorical(logits) for logits in torch.randn(2, 5, 4)]
    reference = [torch.distributions.Categorical(logits=c.logits) for c in choices]
    torch.testing.assert_close(kl(*choices), kl_divergence(*reference))
    assert (kl(choices[1], choices[1]) == 0).all()


def test_the_kl_of_spreads_that_hardly_differ_keeps_its_digits():
    """exp(2x) - 1 - 2x in single precision would be a multiple of 1e-7."""
    for x in (1e-2, 1e-3, 1e-4):
        old, new = (Gaussian(torch.zeros(1, 1), torch.tensor([s])) for s in (0.0, -x))
        assert kl(old, new).item() == pytest.approx(0.5 * (math.expm1(2 * x) - 2 * x), rel=1e-2)


@pytest.mark.parametrize("kind", [Gaussian, Categorical])
def test_what_is_unpacked_equals_what_was_packed(kind):
    torch.manual_seed(0)
    head = torch.randn(6, 4)
    policy = Gaussian(head, torch.randn(4)) if kind is Gaussian else Categorical(head)
    again = kind.unpacked(policy.packed())
    action = torch.randn(6, 4) if kind is Gaussian else torch.randint(4, (6,))
    assert torch.equal(again.log_prob(action), policy.log_prob(action))
    assert torch.equal(again.entropy(), policy.entropy())
