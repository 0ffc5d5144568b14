"""What a report says of runs that began with another run's policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.report import build_report
from experiments.reporting.fine_tuning import UNCLEAR, base_of, clears, fine_tuning_table, score
from experiments.reporting.runs import read_run
from experiments.reporting.scores import Summary, summarize
from tests.experiments.run_folders import run_maker, write_evaluation, write_metrics

TASK = "toy/reach"


def finished(
    folder: Path, agent: str, seed: int, successes: dict[str, int], base: Path | None = None
) -> Path:
    """Write a run that was evaluated in 20 episodes of each distraction, so many of which succeeded."""
    run = run_maker(folder)(agent, seed, metrics=False, id=TASK)
    config = json.loads((run / "config.json").read_text())
    if base is not None:
        config["base"] = {"run": str(base.resolve()), "checkpoint": "step-1", "digest": "0" * 64}
    (run / "config.json").write_text(json.dumps(config))
    write_metrics(run, [(1000, 1.0), (2000, 2.0)])
    results = {}
    for name, count in successes.items():
        success = [1.0] * count + [0.0] * (20 - count)
        results[name] = {"returns": [10 * s for s in success], "success": success, "lengths": [5] * 20}  # fmt: skip
    write_evaluation(run, "benchmark", results)
    return run


@pytest.fixture(name="runs")
def _runs(tmp_path: Path) -> list[Path]:
    base = finished(tmp_path, "flow-policy", 1, {"clean": 8, "color_hard": 4})
    better = [finished(tmp_path, "dppo", s, {"clean": 17 + s, "color_hard": 6}, base) for s in (1, 2, 3)]  # fmt: skip
    unclear = [finished(tmp_path, "fpo", s, {"clean": 4 * s, "color_hard": 0}, base) for s in (1, 2, 3)]  # fmt: skip
    return [base, *better, *unclear, finished(tmp_path, "sac", 1, {"clean": 20})]


def summary(paths: list[Path]) -> Summary:
    return summarize([read_run(path) for path in paths])


def test_every_row_says_whether_it_clears_its_base(runs: list[Path]) -> None:
    table = fine_tuning_table(summary(runs), TASK)
    assert table is not None
    assert table.head == ["policy", "decisions", "environment frames", "minutes", "clean", "color_hard"]  # fmt: skip
    names = [row[0].text for row in table.rows]
    assert names == ["flow-policy (base)", "dppo", "fpo"], "sac began with nothing"
    base, dppo, fpo = table.rows
    assert (base[4].text, base[4].below) == ("40.0", ())
    assert (dppo[4].text, dppo[4].aside) == ("95.0", "[90.0, 100.0]")
    assert (dppo[0].flag, fpo[0].flag) == ("", UNCLEAR)
    assert [row[4].below[0] for row in (dppo, fpo)] == ["clears the base", UNCLEAR]
    assert [row[5].below[0] for row in (dppo, fpo)] == [UNCLEAR, UNCLEAR]
    assert [cell.text for cell in dppo[1:4]] == ["2,000", "16,000", "3.33"]


def test_intervals_are_over_seeds_and_of_one_seed_over_episodes(runs: list[Path]) -> None:
    found = [read_run(path) for path in runs]
    one = score(found[:1], "clean", is_success=True)
    three = score(found[4:7], "clean", is_success=True)
    assert one is not None
    assert three is not None
    assert (float(one.point), float(three.point)) == pytest.approx((40.0, 40.0))
    # Of 20 episodes of which 8 succeed, the binomial's 2.5 % and 97.5 %; of three seeds, the least and the greatest.
    assert (float(one.low), float(one.high)) == pytest.approx((20.0, 60.0), abs=5.0)
    assert (float(three.low), float(three.high)) == pytest.approx((20.0, 60.0), abs=0.1)
    returns = score(found[:1], "clean", is_success=False)
    assert returns is not None
    assert float(returns.point) == 4.0
    assert score(found[:1], "video_hard", is_success=True) is None
    assert clears(one, None) is None
    assert clears(one, one) is False


def test_a_base_is_found_where_it_was_and_in_an_archive(runs: list[Path], tmp_path: Path) -> None:
    base, tuned = read_run(runs[0]), read_run(runs[1])
    other = read_run(runs[-1])
    assert base_of(tuned, [other, base]) is base
    assert base_of(tuned, [other]) is None
    assert base_of(base, [base, tuned]) is None
    moved = tmp_path / "archive" / runs[0].name
    shutil.copytree(runs[0], moved)
    copied = read_run(moved)
    assert base_of(tuned, [other, copied]) is copied
    assert base_of(tuned, [copied, base]) is base, "the run itself before its copy"


def test_the_report_has_the_table_where_there_is_a_base(runs: list[Path], tmp_path: Path) -> None:
    page = build_report(runs, tmp_path / "report")
    assert UNCLEAR in page.read_text()
    assert f"({UNCLEAR})" in (tmp_path / "report" / "report.md").read_text()
    assert fine_tuning_table(summary(runs[1:]), TASK) is None
    without = build_report(runs[1:4], tmp_path / "without")
    assert "Fine-tuning" not in without.read_text()


def test_a_task_without_success_is_told_in_returns(tmp_path: Path) -> None:
    base = finished(tmp_path, "bc", 1, {"clean": 10})
    tuned = finished(tmp_path, "ppo", 1, {"clean": 20}, base)
    for run in (base, tuned):
        file = run / "evaluations" / "benchmark.json"
        content = json.loads(file.read_text())
        content["results"]["clean"]["success"] = None
        file.write_text(json.dumps(content))
    table = fine_tuning_table(summary([base, tuned]), TASK)
    assert table is not None
    assert "return per episode" in table.caption
    assert [float(row[4].text) for row in table.rows] == pytest.approx([5.0, 10.0])
    assert np.char.find(table.caption, "success") == -1
