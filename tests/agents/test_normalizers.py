"""Running statistics against those of everything at once."""

import numpy as np
import pytest
import torch

from agents.core.normalizers import RewardScale, RunningMoments


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
