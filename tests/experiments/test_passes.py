"""pass@k against brute force, and the command that measures it."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import envs
from experiments.passes import (
    FAILED,
    UNTOLD,
    attempt,
    main,
    pass_at_k,
    powers_of_two,
    scores,
    ways_at_k,
)
from tests.experiments.helpers import train


@pytest.mark.parametrize("attempts", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_success(attempts: int) -> None:
    for successes in range(attempts + 1):
        outcome = [True] * successes + [False] * (attempts - successes)
        for k in range(1, attempts + 1):
            subsets = list(itertools.combinations(outcome, k))
            expected = np.mean([any(subset) for subset in subsets])
            assert pass_at_k(attempts, successes, k) == pytest.approx(expected)


def test_ways_at_k_is_the_mean_number_of_behaviors_in_subsets() -> None:
    outcome = [0, 0, 0, 1, 4, 4, FAILED, FAILED]
    counts = [outcome.count(way) for way in (0, 1, 4)]
    for k in range(1, 9):
        subsets = list(itertools.combinations(outcome, k))
        expected = np.mean([len({*subset} - {FAILED}) for subset in subsets])
        assert ways_at_k(8, counts, k) == pytest.approx(expected)


def test_pass_at_k_is_unbiased_where_the_plain_estimate_is_not() -> None:
    """Over many samples of ten attempts at a rate of .2: 1 - .8**4 is .590; 1 - (1 - c/n)**4 gives .55."""
    rng = np.random.default_rng(0)
    successes = rng.binomial(10, 0.2, 20_000)
    ours = np.mean([pass_at_k(10, int(c), 4) for c in successes])
    plain = np.mean(1 - (1 - successes / 10) ** 4)
    assert ours == pytest.approx(1 - 0.8**4, abs=0.01)
    assert plain < 1 - 0.8**4 - 0.02


def test_scores_are_means_over_starts() -> None:
    rows = scores([[0, 0, FAILED, 1], [FAILED] * 4], [1, 4])
    assert rows["pass_at_k"] == {"1": 0.375, "4": 0.5}
    assert rows["ways_at_k"] == {"1": 0.375, "4": 1.0}
    untold = scores([[UNTOLD, FAILED]], [1, 2])
    assert untold == {"pass_at_k": {"1": 0.5, "2": 1.0}, "ways_at_k": None}


def test_powers_of_two_end_with_the_limit() -> None:
    assert [powers_of_two(n) for n in (1, 2, 8, 9)] == [[1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 9]]


def test_attempts_begin_in_one_state_and_the_first_episode_counts() -> None:
    with closing(envs.make_vec("toy/goals", 3, seed=0, observation="state")) as vector:
        begun = []

        def steady(seen: np.ndarray) -> np.ndarray:
            begun.append(seen)
            return np.array([3, 2, len(begun) % 2])  # up, down, to and fro: never there

        assert attempt(steady, vector, start=5, attempts=5) == [3, 2, FAILED, 3, 2]
        assert (begun[0] == begun[0][0]).all()
        first = begun[0].copy()
        begun.clear()
        attempt(steady, vector, start=6, attempts=1)
        assert (begun[0] != first).any()


def test_the_command_writes_what_it_prints_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("ppo", "toy/goals", tmp_path / "run", steps=24, observation="state")
    words = [str(run), "--attempts", "12", "--starts", "2", "--num-envs", "5"]
    assert main([*words, "--name", "first"]) == 0
    assert "ways@k" in capsys.readouterr().out
    assert main([*words, "--name", "again", "--workers", "2"]) == 0
    first, again = (
        json.loads((run / "passes" / f"{n}.json").read_text()) for n in ("first", "again")
    )
    assert first == again
    assert {*first["policy"]["pass_at_k"]} == {"1", "2", "4", "8", "12"}
    assert [len(ends) for ends in first["policy"]["behaviors"]] == [12, 12]
    assert first["policy"]["behaviors"] != first["random_policy"]["behaviors"]
    for words_, said in (
        ([*words, "--name", "first"], "exists; use --overwrite"),
        ([*words, "--k", "13"], "--k is 13"),
        ([*words[:1], "--starts", "0"], "--starts is 0"),
        ([str(tmp_path)], "no run folder"),
    ):
        assert main(words_) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_task_that_tells_no_success_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("ppo", "toy/catch", tmp_path / "run", steps=24, observation="state")
    assert main([str(run), "--attempts", "2", "--starts", "1"]) == 2
    assert 'info["success"]' in capsys.readouterr().err
