"""Color distractions: the published distributions, disjoint splits, and only colors change."""

import numpy as np
import pytest

from envs.toy import Reach
from envs.toy_view import TARGET
from wrappers.distraction.base import SPLITS, draw_seed
from wrappers.distraction.color import EASY, HARD, RandomColors, color_set
from wrappers.errors import UserError


@pytest.mark.parametrize(("deviation", "published"), [(EASY, 0.10), (HARD, 0.19)])
def test_deltas_have_the_published_distribution(deviation: float, published: float) -> None:
    gray = {slot: np.full(3, 0.5) for slot in ("grid1", "self", "sky")}
    sets = [color_set(gray, deviation, seed) for seed in range(4000)]
    draws = np.array([[colors[slot] for slot in gray] for colors in sets]) - 0.5
    # Clipping at 0.5 from the mean is 5 (easy) and 2.6 (hard) deviations away: 1 % of the draws.
    assert draws.std(axis=0) == pytest.approx(published, rel=0.05)
    assert draws.mean(axis=0) == pytest.approx(0, abs=0.01)
    correlation = np.corrcoef(draws.reshape(len(draws), -1).T) - np.eye(9)
    assert np.abs(correlation).max() < 0.08, "channels are independent"


def test_colors_are_clipped_and_the_second_checker_follows_the_first() -> None:
    defaults = Reach().view(24, 24).colors()
    for seed in range(200):
        colors = color_set(defaults, HARD, seed)
        assert set(colors) == set(defaults)
        assert all(0 <= color.min() and color.max() <= 1 for color in colors.values())
        expected = np.clip(colors["grid1"] + 0.1, 0, 1)
        assert colors["grid2"] == pytest.approx(expected)


def test_a_seed_repeats_and_does_not_depend_on_the_order_of_slots() -> None:
    defaults = Reach().view(24, 24).colors()
    reversed_order = dict(reversed(defaults.items()))
    first, second = color_set(defaults, HARD, 7), color_set(reversed_order, HARD, 7)
    assert all((first[slot] == second[slot]).all() for slot in defaults)


def test_splits_draw_from_disjoint_seeds() -> None:
    ranges = []
    for split in SPLITS:
        rng = np.random.default_rng(0)
        seeds = {draw_seed(rng, split) for _ in range(2000)}
        assert len(seeds) > 1990, "seeds hardly ever repeat"
        ranges.append((min(seeds), max(seeds)))
    assert ranges[0][1] < 2**32 <= ranges[1][0] <= ranges[1][1] < 2**33 <= ranges[2][0]
    with pytest.raises(UserError, match="unknown split 'trian'; did you mean train"):
        draw_seed(np.random.default_rng(0), "trian")  # type: ignore[arg-type]


def test_an_episode_keeps_its_colors_and_the_target_keeps_its_own() -> None:
    env = Reach()
    env.reset(seed=0)
    view = env.view(24, 24)
    clean = view.render()
    distraction = RandomColors(HARD, "test")
    distraction.reset(view, np.random.default_rng(0))
    first = distraction.frame(view)
    distraction.advance(view)
    assert (distraction.frame(view) == first).all()
    assert (first[0, 0] != clean[0, 0]).any()
    target = (clean == np.rint(255 * TARGET)).all(-1)
    assert target.any()
    assert (first[target] == clean[target]).all()
