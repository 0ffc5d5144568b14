"""The learned drift against its formula, mirror learning's three conditions, and files that hold none."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.core import drift as drift_module
from agents.core import policy_gradient as pg
from agents.core.drift import (
    FORMAT,
    SHIPPED,
    LearnedDrift,
    drift_inputs,
    load_drift,
    save_drift,
    unflatten,
)
from agents.core.errors import UserError
from agents.on_policy.ppo import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
CASES = [(x, a) for x in (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0) for a in (-1.3, -0.2, 0.4, 2.0)]


def random_drift(seed: int, units: int = 5, scale: float = 1.0) -> LearnedDrift:
    generator = torch.Generator().manual_seed(seed)
    return unflatten(scale * torch.randn(9 * units, generator=generator))


def formula(drift: LearnedDrift, x: float, a: float) -> float:
    """Return the loss of one sample as the paper writes it, in Python's floats."""
    r = math.exp(x)
    inputs = [1 - r, (1 - r) ** 2, x, x**2]
    inputs += [value * a for value in inputs]
    network = 0.0
    for unit in range(drift.out.shape[0]):
        weights = drift.hidden[:, unit].tolist()
        network += drift.out[unit].item() * math.tanh(
            sum(w * value for w, value in zip(weights, inputs, strict=True))
        )
    return -(r * a - max(0.0, network - 1e-6))


def loss_and_gradient(drift, x, a):
    x = torch.as_tensor(x).requires_grad_()
    loss = pg.learned_drift(x, torch.as_tensor(a), drift=drift)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


@pytest.mark.parametrize("seed", [0, 1, None])
def test_values_are_the_papers_and_gradients_their_finite_differences(seed):
    drift = load_drift() if seed is None else random_drift(seed)
    bent = 0
    for x, a in CASES:
        loss, gradient = loss_and_gradient(drift, [x], [a])
        assert loss.item() == pytest.approx(formula(drift, x, a), rel=1e-5, abs=1e-5)
        slope = (formula(drift, x + 1e-6, a) - formula(drift, x - 1e-6, a)) / 2e-6
        assert gradient.item() == pytest.approx(slope, rel=1e-3, abs=1e-4), (x, a)
        bent += loss.item() > -math.exp(x) * a + 1e-3
    assert 0 < bent, "a drift that is 0 everywhere would be no test"


@given(
    st.integers(0, 1000), st.floats(-30, 30), st.floats(-5, 5), st.sampled_from([0.01, 1.0, 30.0])
)
@settings(max_examples=200, deadline=None)
def test_no_drift_is_negative_and_none_turns_the_first_step(seed, x, a, scale):
    drift = random_drift(seed, scale=scale)
    log_ratio, advantage = torch.tensor([x]), torch.tensor([a])
    value = drift(pg.ratio(log_ratio), log_ratio, advantage)
    assert value.isfinite()
    assert value >= 0
    loss, gradient = loss_and_gradient(drift, [0.0], [a])
    assert loss.item() == -advantage.item()
    assert gradient.item() == -advantage.item(), "the policy gradient, exactly"


def test_the_drift_is_zero_all_around_ratio_one_thanks_to_its_margin(monkeypatch):
    drift, x = random_drift(0), torch.tensor([-1e-7, 1e-7])
    a = torch.ones(2)
    assert (drift(pg.ratio(x), x, a) == 0).all()
    monkeypatch.setattr(drift_module, "MARGIN", 0.0)
    assert (drift(pg.ratio(x), x, a) > 0).any(), "without a margin it begins at ratio 1"


def test_every_input_vanishes_at_ratio_one_and_none_elsewhere():
    one, zero = torch.ones(1), torch.zeros(1)
    assert (drift_inputs(one, zero, 3 * one) == 0).all()
    found = drift_inputs(torch.tensor([2.0]), torch.tensor([math.log(2)]), torch.tensor([3.0]))[0]
    log = math.log(2)
    expected = [-1, 1, log, log**2, -3, 3, 3 * log, 3 * log**2]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_drifts_side_by_side_are_each_as_alone():
    drifts = [random_drift(seed) for seed in range(3)]
    flat = [torch.cat([d.hidden.flatten(), d.out]) for d in drifts]
    x, a = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    together = pg.learned_drift(x, a, drift=unflatten(torch.stack(flat)))
    for i, drift in enumerate(drifts):
        torch.testing.assert_close(together[i], pg.learned_drift(x[i], a[i], drift=drift))


def test_bfloat16_is_computed_in_float32():
    x = torch.tensor([0.01, -0.02, 0.3], dtype=torch.bfloat16)
    a = torch.tensor([1.0, -0.5, 0.25], dtype=torch.bfloat16)
    loss = pg.learned_drift(x, a, drift=random_drift(0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, pg.learned_drift(x.float(), a.float(), drift=random_drift(0)), rtol=0, atol=0
    )


@pytest.mark.parametrize("x", [-1e4, 25.0, 1e4])
@pytest.mark.parametrize("drift", [random_drift(0), load_drift()], ids=["random", "shipped"])
def test_runaway_ratios_stay_finite(x, drift):
    for a in (-1.0, 1.0):
        loss, gradient = loss_and_gradient(drift, [x], [a])
        assert loss.isfinite()
        assert gradient.isfinite()


def test_a_file_gives_back_what_was_saved_and_a_failed_write_leaves_the_old_one(
    tmp_path, monkeypatch
):
    file, first, second = tmp_path / "drift.safetensors", random_drift(0), random_drift(1, units=3)
    save_drift(file, first, {"seed": "0"})
    found = load_drift(file)
    assert found.hidden.equal(first.hidden)
    assert found.out.equal(first.out)
    with safetensors.safe_open(file, "pt") as content:
        assert content.metadata() == {"drift": json.dumps({"seed": "0", "format": FORMAT})}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drift_module.os, "fsync", full)
    with pytest.raises(UserError, match="is full"):
        save_drift(file, second, {})
    assert load_drift(file).out.equal(first.out)


GOOD = {"hidden": torch.ones(8, 3), "out": torch.ones(3)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (GOOD, {}, "has format None"),
        (GOOD, {"format": "sightline-drift-0"}, "has format sightline-drift-0"),
        ({"hidden": GOOD["hidden"]}, {"format": FORMAT}, "holds hidden, not"),
        (GOOD | {"hidden": torch.ones(7, 3)}, {"format": FORMAT}, r"shapes \(7, 3\) and \(3,\)"),
        (GOOD | {"out": torch.ones(4)}, {"format": FORMAT}, r"shapes \(8, 3\) and \(4,\)"),
        (GOOD | {"out": torch.ones(3).double()}, {"format": FORMAT}, "no finite float32"),
        (GOOD | {"out": torch.full((3,), math.nan)}, {"format": FORMAT}, "no finite float32"),
    ],
)
def test_files_that_hold_no_drift_are_refused(tensors, metadata, said, tmp_path):
    file = tmp_path / "drift.safetensors"
    safetensors.torch.save_file(tensors, file, {"drift": json.dumps(metadata)})
    with pytest.raises(UserError, match=said):
        load_drift(file)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_drift(tmp_path / "none.safetensors")
    safetensors.torch.save_file(GOOD, tmp_path / "plain")
    with pytest.raises(UserError, match="has format None"):
        load_drift(tmp_path / "plain")
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_drift(tmp_path / "text")


def test_ppo_takes_the_shipped_drift_or_a_file(tmp_path):
    x, a = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    file, own = tmp_path / "drift.safetensors", random_drift(0)
    save_drift(file, own, {})
    for config, drift in [
        (PPOConfig(surrogate="learned_drift"), load_drift()),
        (PPOConfig(surrogate="learned_drift", drift_file=str(file)), own),
    ]:
        found = config.surrogate_loss()(x, a)
        torch.testing.assert_close(found, pg.learned_drift(x, a, drift=drift), rtol=0, atol=0)


def test_the_shipped_drift_is_installed_and_takes_back_bad_steps_that_were_left_too_far_behind():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packaged["package-data"]["agents.core"] == [SHIPPED.name]
    x, a = [math.log(0.2)], [-1.0]
    assert loss_and_gradient(load_drift(), x, a)[1] < 0, "the paper's rollback"
    flat = unflatten(torch.zeros(9))
    assert loss_and_gradient(flat, x, a)[1] > 0, "without a drift it is left further behind"


def test_weights_and_their_negatives_are_one_function():
    """So evolution must not begin at 0, where twins are each other's negatives and no fitness tells them apart."""
    weights = torch.randn(45, generator=torch.Generator().manual_seed(0))
    x, a = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    ours, twins = (pg.learned_drift(x, a, drift=unflatten(w)) for w in (weights, -weights))
    torch.testing.assert_close(ours, twins)
