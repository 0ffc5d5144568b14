"""Statistics against those of everything at once, and ranges there and back."""

import numpy as np
import pytest
import torch

from agents.core.errors import UserError
from agents.core.normalizers import RangeNormalizer, RewardScale, RunningMoments


def test_moments_of_batches_are_those_of_everything():
    rng = np.random.default_rng(0)
    moments = RunningMoments((3,))
    batches = [rng.normal(loc=1e3, scale=[1, 10, 0.1], size=(n, 3)) for n in (1, 7, 400, 2)]
    for batch in batches:
        moments.update(torch.tensor(batch))
    whole = np.concatenate(batches)
    np.testing.assert_allclose(moments.mean, whole.mean(0))
    np.testing.assert_allclose(moments.variance, whole.var(0), rtol=1e-6)
    scaled = moments.normalize(torch.tensor(whole))
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0, correction=0), 1, rtol=1e-4)
    assert moments.normalize(torch.tensor([[1e9, 0.0, 0.0]])).abs().max() == 10


def test_nothing_seen_leaves_values_alone():
    values = torch.tensor([[0.5, -2.0]])
    torch.testing.assert_close(RunningMoments((2,)).normalize(values), values)


def test_rewards_are_divided_by_the_spread_of_the_discounted_return():
    rng = np.random.default_rng(1)
    scale = RewardScale(2, discount=0.9)
    running, returns = np.zeros(2), []
    for _ in range(3):
        reward, ended = rng.normal(size=(20, 2)), rng.random((20, 2)) < 0.1
        scale.update(torch.tensor(reward), torch.tensor(ended))
        for now, end in zip(reward, ended, strict=True):
            running = running * 0.9 + now
            returns.extend(running)
            running = running * ~end
    spread = np.std(returns)
    assert scale.scale(torch.tensor([2.0])).item() == pytest.approx(2 / spread, rel=1e-5)
    np.testing.assert_allclose(scale.running, running)


def test_lost_steps_tell_no_return():
    """Their reward is blanked; counted, many of them would make the spread small."""
    rng = np.random.default_rng(2)
    reward, ended = rng.normal(size=(40, 3)) + 2, rng.random((40, 3)) < 0.1
    kept = rng.random((40, 3)) < 0.6
    returns = []
    for n in range(3):
        running = 0.0
        for t in range(40):
            running = running * 0.9 + reward[t, n]
            if kept[t, n]:
                returns.append(running)
            if ended[t, n] or not kept[t, n]:
                running = 0.0
    scale = RewardScale(3, discount=0.9)
    scale.update(torch.tensor(reward * kept), torch.tensor(ended), torch.tensor(kept))
    assert scale.spread.item() == pytest.approx(np.std(returns), rel=1e-6)
    assert scale.moments.count == kept.sum()


def test_ranges_become_minus_one_to_one_and_back():
    data = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    normalizer = RangeNormalizer(3)
    normalizer.fit(data)
    scaled = normalizer.normalize(data)
    torch.testing.assert_close(scaled.amin((0, 1)), -torch.ones(3))
    torch.testing.assert_close(scaled.amax((0, 1)), torch.ones(3))
    torch.testing.assert_close(normalizer.restore(scaled), data)
    again = RangeNormalizer(3)
    again.load_state_dict(normalizer.state_dict())
    assert torch.equal(again.normalize(data), scaled)


def test_constant_dimensions_are_shifted_not_stretched():
    data = torch.tensor([[0.3, 1.0], [0.3 + 1e-6, 3.0]])
    normalizer = RangeNormalizer(2)
    normalizer.fit(data)
    assert normalizer.normalize(data)[:, 0].abs().max() < 1e-5
    assert normalizer.normalize(data)[:, 1].tolist() == [-1.0, 1.0]
    torch.testing.assert_close(normalizer.restore(torch.zeros(1, 2)), torch.tensor([[0.3, 2.0]]))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.zeros(0, 2), "at least one"),
        (torch.zeros(4, 3), r"\[..., 2\]"),
        (torch.zeros(2), "at least one"),
        (torch.tensor([[0.0, float("nan")]]), "NaN"),
        (torch.tensor([[0.0, float("inf")]]), "NaN"),
    ],
)
def test_ranges_of_bad_data_are_refused(data, match):
    with pytest.raises(UserError, match=match):
        RangeNormalizer(2).fit(data)
