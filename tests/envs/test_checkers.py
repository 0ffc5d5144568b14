"""Gymnasium's and Stable-Baselines3's own checkers pass on every family, with every kind of
distraction."""

import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import envs

EXPECTED = "different from the unwrapped version"
"""What we hand out is a wrapper; Gymnasium says so and checks it all the same."""

LIMITS = ("minimum value is -infinity", "maximum value is infinity")
"""The states of simulators have no limits that could be told; pictures have."""

IDS = (
    "dmc/walker-walk",
    "metaworld/drawer-open",
    "gym/HalfCheetah-v5",
    "gym/CartPole-v1",
    "toy/reach",
    "toy/catch",
    "toy/goals",
    "toy/recall",
)
slow = pytest.mark.slow
MORE = [pytest.param(id, marks=slow) for id in ("dmc/quadruped-walk", "gym/Taxi-v4", "toy/balance")]


def check(env: gymnasium.Env, *also_expected: str) -> None:
    """Run both checkers; any warning but the expected ones is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check(env)
        sb3_check(env)
    env.close()
    messages = [str(warning.message) for warning in caught]
    expected = (EXPECTED, *also_expected)
    assert [m for m in messages if not any(part in m for part in expected)] == []


@pytest.mark.parametrize("id", [*IDS, *MORE])
def test_checkers_pass(id: str) -> None:
    check(envs.make(id, size=40, quality="fast", seed=0))


@pytest.mark.parametrize(
    "distraction",
    [
        "color_hard",
        "video_hard",
        *(pytest.param(d, marks=slow) for d in ("color_easy", "video_easy")),
    ],
)
@pytest.mark.parametrize(
    "id", ["dmc/walker-walk", "metaworld/drawer-open", "toy/reach", "toy/catch"]
)
def test_checkers_pass_under_distraction(id: str, distraction: str) -> None:
    check(envs.make(id, distraction=distraction, size=40, quality="fast", seed=0))


@pytest.mark.parametrize("distraction", ["dcs_hard", "randomized", "clean,textures+noise_easy"])
@pytest.mark.parametrize("id", ["toy/reach", "dmc/cartpole-swingup"])
def test_checkers_pass_under_suites_and_lists(id: str, distraction: str) -> None:
    check(envs.make(id, distraction=distraction, size=40, quality="fast", seed=0))


@pytest.mark.parametrize(
    "distraction", ["video_hard", pytest.param("color_hard", marks=pytest.mark.slow)]
)
def test_checkers_pass_on_gymnasiums_own_tasks_under_distraction(distraction: str) -> None:
    check(envs.make("gym/HalfCheetah-v5", distraction=distraction, size=40, quality="fast", seed=0))


@pytest.mark.parametrize("id", [*IDS[1:4], pytest.param("dmc/walker-walk", marks=slow)])
def test_checkers_pass_on_states_but_for_their_limits(id: str) -> None:
    check(envs.make(id, observation="state", seed=0), *LIMITS)


@pytest.mark.parametrize("id", ["toy/reach", pytest.param("dmc/walker-walk", marks=slow)])
def test_checkers_pass_on_pixels_with_state(id: str) -> None:
    env = envs.make(id, observation="both", size=40, quality="fast", seed=0)
    check(env, *LIMITS)


@pytest.mark.parametrize("id", ["metaworld/drawer-open", "toy/catch"])
def test_checkers_pass_on_what_gymnasium_makes(id: str) -> None:
    check(gymnasium.make(f"{id}-v0", size=40, quality="fast", distraction="video_hard"))
