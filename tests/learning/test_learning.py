"""Every agent learns toy/reach from pixels in seconds, and does not when it is broken.

A random policy scores 12.7, one that stays in the middle 14.1, the best script 23.9.
"""

import pytest

from agents import AGENTS
from agents.off_policy import ddpg, sac
from tests.learning.training import score, train

STEPS = 1200
FEW_UPDATES = {"steps": 550, "num_envs": 4}
LEARNED = 17.0
NOT_LEARNED = 15.5
VEILED = {"veil": 0.7, "episodes": 60}
VEILED_STEPS = 1100
ROBUST = 15.8
"""What SVEA and SGQN reach under a veil, and miss without their own terms.

The veil is an image that lies over an episode's pictures and hides 0.7 of them. Measured over 60 episodes at
the seeds 0, 1, 2, with the random shift off, as it is a help against distractions of its own:

| 1100 steps | with its terms   | without          | clean, with      | clean, without   |
| ---------- | ---------------- | ---------------- | ---------------- | ---------------- |
| SVEA       | 17.4, 17.7, 16.6 | 12.2, 14.3, 15.0 | 18.4, 17.1, 18.0 | 17.0, 17.9, 17.4 |
| SGQN       | 17.5, 17.9, 18.2 | 12.5, 12.5, 13.8 | 18.8, 18.9, 19.5 | 17.0, 16.0, 17.9 |

The threshold was set after seeing these scores. Before a video (video_hard) or repainted (color_hard), agents without
SVEA's term kept acting as well as those with it at one seed of three: the toy scene has too little background.
"""

METHODS = {
    "svea": {"svea_alpha": 1.0, "svea_beta": 0.0},
    "sgqn": {"consistency_weight": 0.0, "auxiliary_every": 10**9},
}
"""Each method with the settings that remove its own terms."""


@pytest.mark.parametrize("name", ["sac", "ddpg"])
def test_agents_learn_from_a_state(name):
    agent = train(name, steps=STEPS, observation="state")
    assert score(agent, observation="state") > LEARNED


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n == "drqv2-sgqn" else [])
        for n in sorted(AGENTS)
    ],
)
def test_agents_learn_from_pixels(name):
    """SAC's family on half the updates and twice the pictures: 18.5 and more at seed 0, 16.9 and more at 1 and 2."""
    is_sac = isinstance(AGENTS[name].configs[0], sac.SACConfig)
    assert score(train(name, **(FEW_UPDATES if is_sac else {"steps": STEPS}))) > LEARNED


@pytest.mark.parametrize("name", ["sac", "ddpg"])
def test_shuffled_rewards_teach_nothing_to_the_bases(name):
    agent = train(name, steps=STEPS, observation="state", shuffle_rewards=True)
    assert score(agent, observation="state") < NOT_LEARNED


@pytest.mark.parametrize(("name", "module"), [("sac", sac), ("ddpg", ddpg)])
def test_an_actor_with_the_wrong_sign_does_not_learn(name, module, monkeypatch):
    right = module.actor_loss
    monkeypatch.setattr(module, "actor_loss", lambda *arguments: -right(*arguments))
    agent = train(name, steps=STEPS, observation="state")
    assert score(agent, observation="state") < NOT_LEARNED


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_acting_behind_a_veil_that_they_never_saw(name):
    agent = train(name, steps=VEILED_STEPS, augmentation="none")
    assert score(agent, **VEILED) > ROBUST


@pytest.mark.parametrize("name", METHODS)
def test_without_their_own_terms_they_do_not(name):
    agent = train(name, steps=VEILED_STEPS, augmentation="none", **METHODS[name])
    assert score(agent, **VEILED) < ROBUST


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_that_is_so_at_other_seeds_too(name, seed):
    settings = {"steps": VEILED_STEPS, "seed": seed, "augmentation": "none"}
    assert score(train(name, **settings), **VEILED) > ROBUST
    assert score(train(name, **settings, **METHODS[name]), **VEILED) < ROBUST


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(AGENTS))
def test_shuffled_rewards_teach_nothing_from_pixels(name):
    assert score(train(name, steps=STEPS, shuffle_rewards=True)) < NOT_LEARNED


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(AGENTS))
def test_an_actor_with_the_wrong_sign_does_not_learn_from_pixels(name, monkeypatch):
    for module in (sac, ddpg):
        right = module.actor_loss
        monkeypatch.setattr(module, "actor_loss", lambda *a, right=right: -right(*a))
    assert score(train(name, steps=STEPS)) < NOT_LEARNED
