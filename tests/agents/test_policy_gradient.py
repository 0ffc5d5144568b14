"""Surrogates against finite differences, their papers' formulas written as loops, and each other."""

import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.core import policy_gradient as pg
from agents.core.drift import load_drift

SURROGATES = {
    "reinforce": pg.reinforce,
    "ppo_clip": pg.ppo_clip,
    "dual_clip": pg.dual_clip,
    "masked": pg.masked,
    "spo": pg.spo,
    "asymmetric_trust_region": pg.asymmetric_trust_region,
    "discovered_drift": pg.discovered_drift,
    "kl_penalty": pg.kl_penalty,
}
CASES = [(x, a) for x in (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0) for a in (-1.3, -0.2, 0.4, 2.0)]
"""Log-ratios and advantages in and out of every trust region, none at a kink."""


def formula(name: str, x: float, a: float) -> float:
    """Return the loss of one sample as the papers have it, with the functions' default settings."""
    r = math.exp(x)
    if name == "reinforce":
        return -x * a
    if name == "masked":
        out = abs(r - 1) > 0.2 and ((a > 0) == (r > 1))
        return 0.0 if out else -r * a
    if name == "kl_penalty":
        return -r * a + (r - 1 - x)
    if name == "discovered_drift":
        if a >= 0:
            drift = max(0.0, (r - 1) * a - 2.0 * math.tanh((r - 1) * a / 2.0))
        else:
            drift = max(0.0, x * a - 0.6 * math.tanh(x * a / 0.6))
        return -(r * a - drift)
    epsilon = 0.05 if name == "asymmetric_trust_region" else 0.2
    clipped = min(r * a, min(max(r, 1 - epsilon), 1 + epsilon) * a)
    parabola = r * a - abs(a) / (2 * epsilon) * (r - 1) ** 2
    if name == "dual_clip":
        return -(max(clipped, 3 * a) if a < 0 else clipped)
    if name == "spo" or (name == "asymmetric_trust_region" and a < 0):
        return -parabola
    return -clipped


def value_and_gradient(function, x, a):
    x = torch.as_tensor(x).requires_grad_()
    loss = function(x, torch.as_tensor(a))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


@pytest.mark.parametrize("name", SURROGATES)
def test_values_are_the_papers_and_gradients_their_finite_differences(name):
    for x, a in CASES:
        loss, gradient = value_and_gradient(SURROGATES[name], [x], [a])
        assert loss.item() == pytest.approx(formula(name, x, a), rel=1e-5, abs=1e-6)
        if name == "masked":  # its value jumps where the gradient stops
            continue
        slope = (formula(name, x + 1e-6, a) - formula(name, x - 1e-6, a)) / 2e-6
        assert gradient.item() == pytest.approx(slope, rel=1e-4, abs=1e-6), (x, a)


@pytest.mark.parametrize("name", SURROGATES)
def test_at_ratio_one_each_is_the_policy_gradient(name):
    a = torch.tensor([-2.0, -0.3, 0.5, 1.7])
    _, gradient = value_and_gradient(SURROGATES[name], torch.zeros(4), a)
    torch.testing.assert_close(gradient, -a)


def with_advantages():
    """Return every public function of the module that takes advantages or rewards, with what else it must be given."""
    further = {"drift": load_drift(), "temperature": torch.tensor(1.0)}
    found = {}
    for name, function in inspect.getmembers(pg, inspect.isfunction):
        parameters = inspect.signature(function).parameters
        takes_credit = not {"advantage", "reward"}.isdisjoint(parameters)
        if takes_credit and not name.startswith("_"):
            needed = {key: value for key, value in further.items() if key in parameters}
            found[name] = partial(function, **needed)
    return found


def test_the_loop_over_the_module_finds_every_surrogate():
    assert with_advantages().keys() == {*SURROGATES, "learned_drift", "vmpo", "rebel"}


@pytest.mark.parametrize("name", with_advantages())
@pytest.mark.parametrize(
    ("log_ratio", "advantage"), [((6, 1), (6,)), ((6,), (6, 1)), ((2, 6), (6,))]
)
def test_shapes_that_differ_are_named_and_not_broadcast(name, log_ratio, advantage):
    first, second = (
        str(shape).replace("(", r"\(").replace(")", r"\)") for shape in (log_ratio, advantage)
    )
    with pytest.raises(ValueError, match=f"{first} and {second}"):
        with_advantages()[name](torch.zeros(log_ratio), torch.ones(advantage))


def test_vmpo_ranks_one_batch():
    with pytest.raises(ValueError, match=r"\(6, 1\) and \(6, 1\)"):
        pg.vmpo(torch.zeros(6, 1), torch.ones(6, 1), torch.tensor(1.0))


@given(st.floats(-3, 3), st.floats(-5, 5))
@settings(max_examples=200, deadline=None)
def test_the_masks_gradient_is_the_clips(x, a):
    if min(abs(math.exp(x) - 0.8), abs(math.exp(x) - 1.2)) < 1e-4:
        return  # at the kink either is right
    _, masked = value_and_gradient(pg.masked, [x], [a])
    _, clipped = value_and_gradient(pg.ppo_clip, [x], [a])
    torch.testing.assert_close(masked, clipped)


@pytest.mark.parametrize(
    ("name", "far"),
    [("ppo_clip", 0), ("dual_clip", 0), ("masked", 0), ("spo", 1), ("asymmetric_trust_region", 0)],
)
def test_where_the_advantage_has_had_its_wish_the_gradient_stops_or_leads_back(name, far):
    function = SURROGATES[name]
    _, up = value_and_gradient(function, [1.0], [1.0])
    _, down = value_and_gradient(function, [-1.0], [-1.0])
    assert up.item() == 0 if far == 0 else up.item() > 0, "no longer more of a good step"
    if name in ("spo", "asymmetric_trust_region"):
        assert down.item() < 0, "back to the bad step, which was left too far behind"
    else:
        assert down.item() == 0


@pytest.mark.parametrize("name", [n for n in SURROGATES if n != "dual_clip"])
def test_steps_against_the_advantages_wish_are_always_corrected(name):
    """A clamp without a minimum loses this gradient (seen in DPOK, D3PO, FIND)."""
    _, gradient = value_and_gradient(SURROGATES[name], [1.0, -1.0], [-1.0, 1.0])
    assert gradient[0] > 0, "a bad step that became likely is made unlikely"
    assert gradient[1] < 0, "a good step that became unlikely is made likely"


def test_clip_higher_moves_the_upper_bound_only():
    x = torch.tensor([0.22, -0.22])
    wide = pg.ppo_clip(x, torch.tensor([1.0, -1.0]), clip=0.2, clip_high=0.28)
    torch.testing.assert_close(wide, torch.tensor([-math.exp(0.22), 0.8025]), rtol=0, atol=3e-3)


def test_dual_clip_bounds_the_loss_of_bad_steps_that_became_likely():
    loss = pg.dual_clip(torch.tensor([5.0, 5.0]), torch.tensor([-1.0, 1.0]), bound=3.0)
    torch.testing.assert_close(loss, torch.tensor([3.0, -1.2]))


def test_a_divergence_decides_instead_of_the_ratio():
    x, a = torch.tensor([1.0, 1.0, -1.0]), torch.ones(3)
    loss = pg.masked(x, a, clip=0.1, divergence=torch.tensor([0.05, 0.2, 0.2]))
    torch.testing.assert_close(loss, torch.tensor([-math.e, 0.0, -1 / math.e]))


@pytest.mark.parametrize("name", SURROGATES)
def test_bfloat16_is_computed_in_float32(name):
    x = torch.tensor([0.01, -0.02, 0.3], dtype=torch.bfloat16)
    a = torch.tensor([1.0, -0.5, 0.25], dtype=torch.bfloat16)
    loss = SURROGATES[name](x, a)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SURROGATES[name](x.float(), a.float()))


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("x", [-1e4, 25.0, 1e4])
def test_runaway_ratios_stay_finite(name, x):
    for a in (-1.0, 1.0):
        loss, gradient = value_and_gradient(SURROGATES[name], [x], [a])
        assert loss.isfinite()
        assert gradient.isfinite()
    if x > 0 and name in ("spo", "asymmetric_trust_region"):
        assert gradient.item() >= 0
        assert value_and_gradient(SURROGATES[name], [x], [-1.0])[1].item() > 0, (
            "it is told to come back"
        )


@pytest.mark.parametrize("coefficient", [0.5, 1.0, 3.0])
def test_a_sampled_kl_holds_back_the_steps_whose_advantage_is_below_its_coefficient(coefficient):
    x = torch.linspace(-10, 10, 401)
    penalty = partial(pg.kl_penalty, coefficient=coefficient)
    for share in (-2.0, -0.1, 0.3, 0.9):
        _, gradient = value_and_gradient(penalty, x, torch.full_like(x, share * coefficient))
        turn = -math.log(1 - share)
        assert (gradient[x < turn - 0.1] < 0).all()
        assert (gradient[x > turn + 0.1] > 0).all(), "told to come back"
    for share in (1.0, 1.5):
        _, gradient = value_and_gradient(penalty, x, torch.full_like(x, share * coefficient))
        assert (gradient < 0).all(), "asked for more of, however far it is"


def test_the_ratio_is_smooth_where_its_line_begins():
    x = torch.tensor([19.999, 20.001], dtype=torch.float64, requires_grad=True)
    r = pg.ratio(x)
    (slope,) = torch.autograd.grad(r.sum(), x)
    torch.testing.assert_close(r[0], r[1], rtol=3e-3, atol=0)
    torch.testing.assert_close(slope[0], slope[1], rtol=2e-3, atol=0)


def test_kl_estimates_agree_with_torch_and_have_its_gradient():
    """A KL term without gradient was published (Flow-Factory issue 122)."""
    torch.manual_seed(0)
    old = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    mean = torch.tensor(0.3, requires_grad=True)
    new = torch.distributions.Normal(mean, torch.tensor(1.1))
    exact = torch.distributions.kl_divergence(old, new)
    (exact_gradient,) = torch.autograd.grad(exact, mean, retain_graph=True)
    steps = old.sample((400_000,))
    x = new.log_prob(steps) - old.log_prob(steps)
    for estimator, error in (("k1", 0.004), ("k2", 0.01), ("k3", 0.004)):
        estimate = pg.kl_estimate(x, estimator=estimator)
        assert estimate.mean().item() == pytest.approx(exact.item(), abs=error)
        (gradient,) = torch.autograd.grad(estimate.mean(), mean, retain_graph=True)
        if estimator != "k2":
            assert gradient.item() == pytest.approx(exact_gradient.item(), abs=0.01)
    assert (pg.kl_estimate(x) >= 0).all()


def test_small_divergences_are_neither_negative_nor_rounding():
    """The sizes at which image generators are clipped: 1e-2 to 1e-5."""
    x = torch.cat([torch.linspace(-2e-2, 2e-2, 2001), torch.logspace(-6, -1, 50)])
    found, exact = pg.kl_estimate(x), torch.expm1(x.double()) - x.double()
    assert (found >= 0).all()
    far = x.abs() > 1e-7  # float64 itself cancels below
    torch.testing.assert_close(found[far].double(), exact[far], rtol=2e-3, atol=0)


def test_a_divergence_from_the_policy_that_acted_does_not_turn_the_first_step():
    """Samples of the old policy: k1's own gradient is the score, whose mean is 0."""
    a = torch.tensor([-1.0, 0.5])
    for estimator in ("k2", "k3"):
        penalty = partial(pg.kl_penalty, estimator=estimator)
        torch.testing.assert_close(value_and_gradient(penalty, torch.zeros(2), a)[1], -a)


def test_vmpo_imitates_the_better_half_with_the_duals_weights():
    torch.manual_seed(0)
    advantage = torch.randn(9)
    log_prob = torch.randn(9, requires_grad=True)
    temperature = torch.tensor(0.7, requires_grad=True)
    loss = pg.vmpo(log_prob, advantage, temperature, epsilon=0.2)
    best = sorted(range(9), key=lambda i: -advantage[i].item())[:4]
    exps = [math.exp(advantage[i].item() / 0.7) for i in best]
    policy = -sum(e / sum(exps) * log_prob[i].item() for e, i in zip(exps, best, strict=True))
    assert loss.policy.item() == pytest.approx(policy, rel=1e-5)
    dual = 0.7 * (0.2 + math.log(sum(exps) / 4))
    assert loss.temperature.item() == pytest.approx(dual, rel=1e-5)
    assert torch.autograd.grad(loss.policy, temperature, retain_graph=True, allow_unused=True) == (
        None,
    )
    assert torch.autograd.grad(
        loss.temperature, log_prob, retain_graph=True, allow_unused=True
    ) == (None,)


def test_vmpos_temperature_settles_where_the_weights_are_epsilon_from_equal():
    torch.manual_seed(1)
    advantage, log_prob = torch.randn(200), torch.zeros(200)
    temperature = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.Adam([temperature], lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        pg.vmpo(log_prob, advantage, temperature, epsilon=0.1).temperature.backward()
        optimizer.step()
    weights = torch.softmax(advantage.topk(100).values / temperature.detach(), 0)
    assert (weights * (weights * 100).log()).sum().item() == pytest.approx(0.1, abs=0.005)


def test_vmpo_needs_a_half():
    with pytest.raises(ValueError, match="at least 2"):
        pg.vmpo(torch.zeros(1), torch.zeros(1), torch.tensor(1.0))


def test_rebel_regresses_differences_pair_by_pair():
    """A flattened batch once mixed the pairs of its samples: one pair alone must give what it gives among others."""
    torch.manual_seed(0)
    x, reward = torch.randn(2, 5), torch.randn(2, 5)
    losses = pg.rebel(x, reward, eta=0.5)
    assert losses.shape == (5,)
    for i in range(5):
        difference = (x[0, i] - x[1, i]) / 0.5 - (reward[0, i] - reward[1, i])
        assert losses[i].item() == pytest.approx(difference.item() ** 2, rel=1e-5)
        torch.testing.assert_close(
            pg.rebel(x[:, i : i + 1], reward[:, i : i + 1], eta=0.5), losses[i : i + 1]
        )
    with pytest.raises(ValueError, match=r"pairs.*got \(5, 2\)"):
        pg.rebel(x.T, reward.T)


def test_the_log_ratio_of_a_mean_shrinks_with_the_root_of_the_dimension():
    torch.manual_seed(0)
    spread = {}
    for d in (16, 1024):
        steps = torch.randn(4000, d)
        log_ratio = (-((steps - 0.05) ** 2) + steps**2) / 2  # every part's mean moved by .05
        spread[d] = log_ratio.mean(1).std(), log_ratio.sum(1).std()
    assert (spread[16][0] / spread[1024][0]).item() == pytest.approx(8, rel=0.1)
    assert (spread[1024][1] / spread[16][1]).item() == pytest.approx(8, rel=0.1)


def test_metrics_tell_a_policy_that_is_not_the_one_that_acted():
    same = pg.ratio_metrics(torch.zeros(10), clip=0.2)
    assert all(value == 0 for value in same.values())
    moved = pg.ratio_metrics(torch.tensor([0.0, 0.0, 0.0, math.log(1.5)]), clip=0.2)
    assert moved["ratio/outside"] == 0.25
    assert moved["ratio/largest_deviation"].item() == pytest.approx(0.5)
    assert moved["ratio/kl"].item() == pytest.approx((0.5 - math.log(1.5)) / 4)
