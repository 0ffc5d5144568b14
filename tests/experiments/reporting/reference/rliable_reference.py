"""Make rliable_reference.json: what rliable 1.2.0 says about a few fixed score matrices.

rliable needs older packages than this project, so it gets an environment of its own:

    python -m venv /path/to/rliable-venv
    /path/to/rliable-venv/bin/pip install 'rliable==1.2.0' 'pandas<3' 'numpy<2.3'
    /path/to/rliable-venv/bin/python tests/experiments/reporting/reference/rliable_reference.py

Writes the scores beside the answers, so that the test depends on no random generator.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rliable import library, metrics

THRESHOLDS = [-0.1, 0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0, 1.2]
REPETITIONS = 20_000


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return pairs of score matrices [runs, tasks]: two agents on the same tasks."""
    rng = np.random.default_rng(20211213)
    gauss = rng.normal(0.6, 0.2, (10, 5)), rng.normal(0.5, 0.3, (8, 5))
    skewed = rng.beta(0.5, 0.5, (5, 3)), rng.beta(2.0, 2.0, (5, 3))
    tied = rng.integers(0, 4, (6, 4)) / 3, rng.integers(0, 4, (7, 4)) / 3
    return {"gauss": gauss, "skewed": skewed, "tied": tied}


def main() -> None:
    """Write the file beside this script."""
    content: dict[str, Any] = {
        "made_by": Path(__file__).name,
        "versions": {name: version(name) for name in ("rliable", "arch", "numpy", "scipy")},
        "thresholds": THRESHOLDS,
        "repetitions": REPETITIONS,
        "cases": {},
    }
    taus = np.array(THRESHOLDS)

    def aggregates(scores: np.ndarray) -> np.ndarray:
        return np.array([
            metrics.aggregate_mean(scores),
            metrics.aggregate_iqm(scores),
            metrics.aggregate_optimality_gap(scores),
        ])  # fmt: skip

    for name, (ours, theirs) in cases().items():
        points, limits = library.get_interval_estimates(
            {"a": ours}, aggregates, reps=REPETITIONS, random_state=np.random.RandomState(1)
        )
        profile, profile_limits = library.create_performance_profile(
            {"a": ours}, taus, reps=REPETITIONS
        )
        better, better_limits = library.get_interval_estimates(
            {"a,b": (ours, theirs)},
            lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
            reps=4_000,
            random_state=np.random.RandomState(2),
        )
        answers = {
            key: {"point": points["a"][i], "low": limits["a"][0, i], "high": limits["a"][1, i]}
            for i, key in enumerate(("mean", "interquartile_mean", "optimality_gap"))
        }
        answers["probability_of_improvement"] = {
            "point": better["a,b"][0],
            "low": better_limits["a,b"][0, 0],
            "high": better_limits["a,b"][1, 0],
        }
        answers["performance_profile"] = {
            "point": profile["a"].tolist(),
            "low": profile_limits["a"][0].tolist(),
            "high": profile_limits["a"][1].tolist(),
        }
        content["cases"][name] = {
            "ours": ours.tolist(),
            "theirs": theirs.tolist(),
            "answers": answers,
        }
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(content, indent=1, default=float) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
