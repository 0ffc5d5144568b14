"""PPO learns with values that come from quantiles, and not when these learn nothing."""

import pytest

from agents.on_policy import ppo
from agents.on_policy.ppo import SURROGATES
from tests.learning.on_policy import score, train
from tests.learning.test_on_policy import LEARNED, NOT_LEARNED, ONE_STEP, REACH

QUANTILES = ("quantile", "distilled")


@pytest.mark.parametrize("critic", QUANTILES)
def test_it_learns_from_a_state(critic):
    """At the seeds 0 and 1: 22.9 and 21.3 with the quantiles' mean, 22.6 and 21.7 with PG-Rainbow's value."""
    agent, _ = train("toy/reach", critic=critic, **REACH)
    assert score(agent, "toy/reach") > LEARNED


@pytest.mark.slow
def test_it_learns_from_pixels():
    settings = {"observation": "pixels", "minibatch_size": 128, "epochs": 4}
    agent, _ = train("toy/reach", steps=4608, critic="distilled", **settings)
    assert score(agent, "toy/reach", observation="pixels") > LEARNED


@pytest.mark.parametrize("critic", QUANTILES)
def test_the_wrong_sign_does_not_learn(critic, monkeypatch):
    right = SURROGATES["ppo_clip"]

    def wrong(config):
        loss = right(config)
        return lambda log_ratio, advantage: loss(log_ratio, -advantage)

    monkeypatch.setitem(ppo.SURROGATES, "ppo_clip", wrong)
    agent, _ = train("toy/reach", critic=critic, **REACH)
    assert score(agent, "toy/reach") < NOT_LEARNED


@pytest.mark.slow
@pytest.mark.parametrize("critic", QUANTILES)
def test_values_from_quantiles_must_be_learned(critic):
    """At the seeds 0 and 1: 37.4 and 36.3 (quantile), 35.4 and 35.2 (distilled); 4.3 to 5.7 without their losses."""
    agent, _ = train("toy/balance", critic=critic, **ONE_STEP)
    assert score(agent, "toy/balance") > 30
    agent, _ = train("toy/balance", critic=critic, value_coefficient=0.0, **ONE_STEP)
    assert score(agent, "toy/balance") < 15
