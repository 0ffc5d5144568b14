"""Aggregates agree with rliable 1.2.0's answers, which a script beside the file recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.reporting.statistics import (
    Interval,
    interquartile_mean,
    mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)

REFERENCE = json.loads((Path(__file__).parent / "reference/rliable_reference.json").read_text())
QUANTITIES = (
    "mean",
    "interquartile_mean",
    "optimality_gap",
    "performance_profile",
    "probability_of_improvement",
)


def ours(case: dict[str, Any], quantity: str) -> Interval:
    """Return our answer; the file has scores as [runs, tasks], as rliable wants them."""
    first, second = (list(np.array(case[agent]).T) for agent in ("ours", "theirs"))
    if quantity == "probability_of_improvement":
        return probability_of_improvement(first, second)
    statistic = {
        "mean": mean,
        "interquartile_mean": interquartile_mean,
        "optimality_gap": optimality_gap,
        "performance_profile": performance_profile(REFERENCE["thresholds"]),
    }[quantity]
    return stratified_bootstrap(first, statistic)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", sorted(REFERENCE["cases"]))
def test_points_are_rliables_and_intervals_are_within_resampling_noise(
    name: str, quantity: str
) -> None:
    case = REFERENCE["cases"][name]
    expected = {key: np.array(value) for key, value in case["answers"][quantity].items()}
    interval = ours(case, quantity)
    np.testing.assert_allclose(interval.point, expected["point"], rtol=0, atol=1e-9)
    width = expected["high"] - expected["low"]
    # Two resamplings place a 2.5 % quantile of the same distribution a few percent of the width
    # apart; profiles and ties move on a grid of one run.
    grid = 1 / np.array(case["ours"]).size
    slack = 0.06 * width + (grid if quantity == "performance_profile" else 0.002)
    assert (np.abs(interval.low - expected["low"]) <= slack).all()
    assert (np.abs(interval.high - expected["high"]) <= slack).all()


def test_the_reference_is_rliables_own() -> None:
    assert REFERENCE["versions"]["rliable"] == "1.2.0"
    assert all(set(case["answers"]) == set(QUANTITIES) for case in REFERENCE["cases"].values())
