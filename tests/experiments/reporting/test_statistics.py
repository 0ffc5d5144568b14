"""Aggregates and their bootstrap intervals against SciPy, plain loops and sums done by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiments.reporting.statistics import (
    crossed_bootstrap,
    interquartile_mean,
    mean,
    median,
    nested_bootstrap,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 13), st.integers(1, 4)),
        elements=st.floats(-1e3, 1e3),
    )
)
def test_interquartile_mean_equals_scipys_trimmed_mean(values: np.ndarray) -> None:
    expected = scipy.stats.trim_mean(values, 0.25, axis=0)
    np.testing.assert_allclose(interquartile_mean(values), expected, rtol=1e-12, atol=1e-9)


def test_interquartile_mean_by_hand_ignores_a_collapsed_and_a_lucky_run() -> None:
    scores = np.array([0.0, 500.0, 600.0, 700.0, 800.0, 5000.0, 650.0, 750.0])
    assert interquartile_mean(scores) == (600 + 650 + 700 + 750) / 4
    assert mean(scores) == 9000 / 8
    assert median(scores) == (650 + 700) / 2


def test_interval_of_two_runs_approaches_the_four_resamples_that_exist() -> None:
    # Of {0, 10} the resamples 0-0, 0-10, 10-0 and 10-10 are equally likely, so the means are
    # 0, 5, 5, 10: the central 40 % is exactly [5, 5], the central 60 % reaches both ends.
    narrow = stratified_bootstrap([[0.0, 10.0]], confidence=0.4)
    assert (narrow.point, narrow.low, narrow.high) == (5.0, 5.0, 5.0)
    wide = stratified_bootstrap([[0.0, 10.0]], confidence=0.6)
    assert (wide.point, wide.low, wide.high) == (5.0, 0.0, 10.0)


def test_three_runs_agree_with_all_27_resamples_enumerated() -> None:
    scores = [3.0, 7.0, 20.0]
    means = np.sort([np.mean(draw) for draw in itertools.product(scores, repeat=3)])
    interval = stratified_bootstrap([scores], confidence=0.8, repetitions=40_000)
    # The exact 10 % and 90 % points lie inside flat steps of the distribution, away from its jumps.
    assert interval.low == pytest.approx(means[int(0.1 * 27)])
    assert interval.high == pytest.approx(means[int(0.9 * 27)])


@pytest.mark.parametrize("statistic", [mean, median, interquartile_mean])
def test_vectorized_bootstrap_equals_a_plain_loop_over_resamples(statistic) -> None:
    rng = np.random.default_rng(3)
    strata = [rng.normal(size=(5, 2)), rng.normal(5.0, 2.0, size=(8, 2))]
    interval = stratified_bootstrap(strata, statistic, repetitions=300, seed=11, confidence=0.9)

    draws = np.random.default_rng(11)
    indices = [draws.integers(len(task), size=(len(task), 300)) for task in strata]
    replicates = []
    for r in range(300):
        pooled = [task[i] for task, index in zip(strata, indices, strict=True) for i in index[:, r]]
        replicates.append(statistic(np.array(pooled)))
    low, high = np.quantile(replicates, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(interval.low, low)
    np.testing.assert_allclose(interval.high, high)
    np.testing.assert_allclose(interval.point, statistic(np.concatenate(strata)))


def test_strata_keep_their_number_of_runs_so_task_difficulty_adds_no_spread() -> None:
    # Runs agree within each task; only a resampling that mixes tasks could give an interval.
    interval = stratified_bootstrap([[10.0, 10.0, 10.0], [900.0, 900.0]])
    assert interval.low == interval.high == interval.point == (30 + 1800) / 5
    mixed = stratified_bootstrap([[10.0, 10.0, 10.0, 900.0, 900.0]])
    assert mixed.high - mixed.low > 300


def test_a_run_is_resampled_whole_along_its_learning_curve() -> None:
    # The two points of each run sum to 100; independent resampling of points would break the sum.
    curves = np.array([[10.0, 90.0], [40.0, 60.0], [80.0, 20.0]])
    sums = stratified_bootstrap([curves], lambda values: values.mean(0).sum(-1))
    assert sums.low == pytest.approx(100.0)
    assert sums.high == pytest.approx(100.0)


def test_coverage_of_the_mean_is_near_nominal_for_many_runs() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = stratified_bootstrap([rng.normal(7.0, 3.0, 30)], repetitions=500, seed=trial)
        hits += bool(interval.low <= 7.0 <= interval.high)
    assert 0.88 <= hits / 200 <= 0.99


def test_same_seed_same_interval_and_another_seed_another() -> None:
    scores = [np.random.default_rng(1).normal(size=10)]
    first, again = (stratified_bootstrap(scores, seed=5) for _ in range(2))
    other = stratified_bootstrap(scores, seed=6)
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("strata", "confidence"),
    [([], 0.95), ([[1.0], []], 0.95), ([[1.0, np.nan]], 0.95), ([[1.0, 2.0]], 1.0)],
)
def test_impossible_input_is_refused(strata, confidence) -> None:
    with pytest.raises(ValueError, match=r"run|finite|confidence"):
        stratified_bootstrap(strata, confidence=confidence)


def test_optimality_gap_by_hand_gives_no_credit_beyond_the_target() -> None:
    assert optimality_gap(np.array([0.5, 0.75, 9.0, -0.25])) == pytest.approx(
        (0.5 + 0.25 + 0 + 1.25) / 4
    )
    assert optimality_gap(np.array([1.0, 3.0]), target=2.0) == pytest.approx(0.5)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)))
def test_area_under_a_profile_is_the_mean_score(scores: np.ndarray) -> None:
    thresholds = np.linspace(0, 1, 4001)
    profile = performance_profile(thresholds)(scores)
    assert (np.diff(profile) <= 0).all()
    assert np.trapezoid(profile, thresholds) == pytest.approx(scores.mean(), abs=5e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.lists(st.integers(0, 4), min_size=1, max_size=6)] * 2),
        min_size=1,
        max_size=3,
    )
)
def test_probability_of_improvement_is_mann_whitneys_u_per_pair(tasks: list) -> None:
    first, second = zip(*tasks, strict=True)
    expected = np.mean([
        scipy.stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y))
        for x, y in tasks
    ])  # fmt: skip
    found = probability_of_improvement(first, second, repetitions=50)
    reverse = probability_of_improvement(second, first, repetitions=50)
    assert found.point == pytest.approx(expected)
    assert found.point + reverse.point == pytest.approx(1.0)
    assert 0 <= found.low <= found.high <= 1 + 1e-12


def test_interval_of_an_improvement_equals_all_resamples_enumerated() -> None:
    ours, theirs = [1.0, 4.0], [2.0, 3.0, 5.0]
    shares = np.sort([
        np.mean([[x > y for y in b] for x in a])
        for a in itertools.product(ours, repeat=2)
        for b in itertools.product(theirs, repeat=3)
    ])  # fmt: skip
    found = probability_of_improvement([ours], [theirs], confidence=0.7, repetitions=40_000)
    assert found.point == pytest.approx(2 / 6)
    assert found.low == pytest.approx(np.quantile(shares, 0.15, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(shares, 0.85, method="inverted_cdf"))


def test_interval_of_seeds_and_episodes_equals_all_resamples_enumerated() -> None:
    """Two seeds of two and three episodes: every draw of seeds, and of the episodes of each that is drawn."""
    seeds = [np.array([0.0, 1.0]), np.array([2.0, 3.0, 7.0])]
    means = [
        [np.mean(drawn) for drawn in itertools.product(seed, repeat=len(seed))] for seed in seeds
    ]
    values, weights = [], []
    for first, second in itertools.product(means, repeat=2):
        for a, b in itertools.product(first, second):
            values.append((a + b) / 2)
            weights.append(0.25 / (len(first) * len(second)))
    order = np.argsort(values)
    shares = np.cumsum(np.array(weights)[order])
    found = nested_bootstrap(seeds, confidence=0.8, repetitions=60_000)
    assert found.point == pytest.approx((0.5 + 4) / 2), "seeds count alike, however many episodes"
    for limit, share in ((found.low, 0.1), (found.high, 0.9)):
        assert limit == pytest.approx(np.array(values)[order][np.searchsorted(shares, share)])


def test_episodes_widen_the_interval_of_seeds_and_decide_alone_about_one() -> None:
    random = np.random.default_rng(0)
    seeds = random.normal(random.normal(size=10), 2.0, size=(5, 10))
    found = nested_bootstrap(list(seeds.T))
    alone, reference = nested_bootstrap([seeds[:, 0]]), stratified_bootstrap([seeds[:, 0]])
    assert (alone.low, alone.high) == pytest.approx((reference.low, reference.high), abs=0.02)
    # The bootstrap's own variance: that of the seeds' means, and of what each mean is not known by.
    half = (found.high - found.low) / 2
    spread = np.sqrt((seeds.mean(0).var() + (seeds.var(0) / 5).mean()) / 10)
    assert half == pytest.approx(1.96 * spread, rel=0.04)
    outer = stratified_bootstrap([seeds.mean(0)])
    assert half > 1.2 * (outer.high - outer.low) / 2


@pytest.mark.parametrize(
    "runs",
    [
        [{"a": 0.0, "b": 1.0, "c": 5.0}, {"a": 2.0, "b": 4.0, "c": 11.0}],
        [{"a": 0.0, "b": 1.0}, {"b": 4.0, "c": 11.0}],
        [{"a": 0.0, "b": 1.0}, {"c": 11.0}],
        [{"a": 0.0, "b": 1.0, "c": 5.0}],
    ],
    ids=["the same items", "some in both", "none in both", "one run"],
)
def test_interval_of_runs_and_the_items_that_they_share_equals_all_resamples_enumerated(
    runs: list[dict[str, float]],
) -> None:
    """Every draw of runs with every draw of items, the same for all runs that are drawn."""
    items = sorted({item for run in runs for item in run})
    values = []
    for some in itertools.product(runs, repeat=len(runs)):
        for asked in itertools.product(items, repeat=len(items)):
            known = [[run[item] for item in asked if item in run] for run in some]
            means = [np.mean(each) for each in known if each]
            values += [np.mean(means)] if means else []
    found = crossed_bootstrap(runs, confidence=0.77, repetitions=60_000)
    assert found.point == pytest.approx(np.mean([np.mean(list(run.values())) for run in runs]))
    expected = np.quantile(values, [0.115, 0.885], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(("seeds", "of_seeds", "shared"), [(3, 0.0, 32), (8, 0.2, 24)])
def test_intervals_of_shared_prompts_hold_what_they_promise(
    seeds: int, of_seeds: float, shared: int
) -> None:
    """Gains of 32 prompts a seed are of prompts (spread 1), of seeds, and of both (.3).

    Over 300 experiments 93 and 92 % of the intervals have the truth, of nested ones 71 and 72 %. Where three seeds
    differ by .5, it is 87 and 76 %: of so few seeds no bootstrap knows how they differ.
    """
    random, count, own = np.random.default_rng(0), 200, 32 - shared
    hits = np.zeros(2)
    for _ in range(count):
        easy, runs = random.normal(size=shared + own * seeds), []
        for seed in range(seeds):
            asked = [*range(shared), *range(shared + own * seed, shared + own * (seed + 1))]
            gains = easy[asked] + of_seeds * random.normal() + 0.3 * random.normal(size=32)
            runs.append(dict(zip(asked, gains, strict=True)))
        crossed = crossed_bootstrap(runs, repetitions=400)
        nested = nested_bootstrap([list(run.values()) for run in runs], repetitions=400)
        hits += [each.low <= 0 <= each.high for each in (crossed, nested)]
    share = hits / count
    assert 0.9 <= share[0] <= 0.98
    assert share[1] <= 0.8


def test_agents_with_other_numbers_of_tasks_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])
