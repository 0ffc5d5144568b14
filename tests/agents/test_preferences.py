"""Losses on pairs against closed forms, loops, finite differences and the policies that they are derived from."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from agents.core.errors import UserError
from agents.core.preferences import bradley_terry, denoising_log_ratio, dpo, ipo

PAIRS = torch.tensor([[0.3, -2.0, 5.0, 0.0], [1.1, -2.5, -4.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("label", [1.0, 0.0, 0.5, torch.tensor([1.0, 0.0, 0.3, 0.5])])
def test_bradley_terry_is_the_likelihood_of_a_comparison(label):
    log_prob = Bernoulli(logits=PAIRS[0] - PAIRS[1], validate_args=False).log_prob(
        torch.as_tensor(label, dtype=torch.float64)
    )
    torch.testing.assert_close(bradley_terry(PAIRS, label), -log_prob.float())


def test_bradley_terry_learns_strengths_from_shares_of_wins():
    """The shares of wins of three players whose strengths are known give their differences back."""
    strength = torch.tensor([0.0, 1.0, -0.5])
    first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    shares = torch.sigmoid(strength[first] - strength[second])
    learned = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([learned], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        bradley_terry(torch.stack([learned[first], learned[second]]), shares).mean().backward()
        optimizer.step()
    differences = learned.detach() - learned.detach()[0]
    torch.testing.assert_close(differences, strength, atol=1e-2, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_the_papers_formula(beta):
    expected = [-math.log(1 / (1 + math.exp(-beta * (w - lo)))) for w, lo in PAIRS.T.tolist()]
    torch.testing.assert_close(dpo(PAIRS, beta=beta), torch.tensor(expected))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_is_the_papers_formula(beta):
    expected = [(w - lo - 0.5 / beta) ** 2 for w, lo in PAIRS.T.tolist()]
    torch.testing.assert_close(ipo(PAIRS, beta=beta), torch.tensor(expected))


@pytest.mark.parametrize(
    "loss", [dpo, ipo, lambda pairs, beta: dpo(pairs, beta=beta, smoothing=0.2)]
)
def test_gradients_are_finite_differences(loss):
    pairs = PAIRS.float().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(pairs, beta=0.7).sum(), pairs)
    for place in range(pairs.numel()):
        step = torch.zeros_like(pairs).flatten()
        step[place] = 1e-2
        step = step.view_as(pairs)
        with torch.no_grad():
            slope = (loss(pairs + step, beta=0.7) - loss(pairs - step, beta=0.7)).sum() / 2e-2
        torch.testing.assert_close(gradient.flatten()[place], slope, atol=5e-3, rtol=5e-3)


def optimum(loss, share, beta):
    """Return log(pi / pi_ref) of two answers at the loss's optimum, when the first wins a share of comparisons."""
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.05)
    reference = torch.tensor([0.5, 0.5]).log()
    for _ in range(600):
        log_ratio = torch.log_softmax(torch.stack([logit, -logit]), 0) - reference
        optimizer.zero_grad()
        expected = share * loss(log_ratio, beta=beta) + (1 - share) * loss(
            log_ratio.flip(0), beta=beta
        )
        expected.backward()
        optimizer.step()
    return float((log_ratio[0] - log_ratio[1]).detach())


def test_dpo_s_optimum_is_the_reward_s_policy():
    """pi ~ pi_ref * exp(reward / beta), and the reward's difference is the log-odds of winning."""
    share, beta = 0.8, 0.5
    assert optimum(dpo, share, beta) == pytest.approx(
        math.log(share / (1 - share)) / beta, abs=1e-2
    )


def test_ipo_s_optimum_is_the_share_of_wins():
    """The margin is (p(first wins) - 1/2) / beta (eq. 7 and 10 of the paper, for two answers)."""
    share, beta = 0.8, 0.5
    assert optimum(ipo, share, beta) == pytest.approx((share - 0.5) / beta, abs=1e-2)


def test_ipo_stops_where_dpo_goes_on():
    far = torch.tensor([[50.0], [0.0]], requires_grad=True)
    (on,) = torch.autograd.grad(dpo(far, beta=0.1).sum(), far)
    (back,) = torch.autograd.grad(ipo(far, beta=0.1).sum(), far)
    assert on[0] < 0 < back[0]


def test_denoising_errors_are_log_densities_of_a_step():
    """Predictions as means of a Gaussian of spread 1 around the noise that was drawn."""
    draws = torch.Generator().manual_seed(0)
    noise, prediction, reference = (torch.randn(5, 7, generator=draws) for _ in range(3))
    expected = Normal(prediction, 1.0).log_prob(noise).sum(1) - Normal(reference, 1.0).log_prob(
        noise
    ).sum(1)
    errors = [(mean - noise).square().sum(1) for mean in (prediction, reference)]
    torch.testing.assert_close(denoising_log_ratio(*errors), expected)


def test_bad_numbers_are_refused():
    for call in (lambda: dpo(PAIRS, beta=0.0), lambda: ipo(PAIRS, beta=-1.0)):
        with pytest.raises(UserError, match="beta"):
            call()
    with pytest.raises(UserError, match="smoothing"):
        dpo(PAIRS, smoothing=0.5)
    with pytest.raises(ValueError, match="preferred first"):
        dpo(PAIRS.T)
