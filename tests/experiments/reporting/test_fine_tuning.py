"""What a report says of runs that began with another run's policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.report import build_report
from experiments.reporting.fine_tuning import (
    UNCLEAR,
    base_of,
    clears,
    fine_tuning_rows,
    fine_tuning_table,
    score,
)
from experiments.reporting.runs import read_run
from experiments.reporting.scores import Summary, summarize
from tests.experiments.run_folders import run_maker, write_evaluation, write_metrics

TASK = "toy/reach"


def finished(
    folder: Path, agent: str, seed: int, successes: dict[str, int], base: Path | None = None,
    digest: str = "0", start_noise: float = 1.0, **task: object,
) -> Path:  # fmt: skip
    """Write a run that was evaluated in 20 episodes of each distraction, so many of which succeeded."""
    run = run_maker(folder)(agent, seed, metrics=False, id=TASK, **task)
    config = json.loads((run / "config.json").read_text())
    if base is not None:
        config["base"] = {"run": str(base.resolve()), "checkpoint": "step-1", "digest": digest}
    config["configs"] = {"DenoisingConfig": {"start_noise": start_noise}}
    (run / "config.json").write_text(json.dumps(config))
    write_metrics(run, [(1000, 1.0), (2000, 2.0)])
    evaluated(run, "benchmark", successes)
    return run


def evaluated(run: Path, name: str, successes: dict[str, int], **changed: object) -> None:
    results = {}
    for distraction, count in successes.items():
        success = [1.0] * count + [0.0] * (20 - count)
        returns = [10 * s for s in success]
        results[distraction] = {"returns": returns, "success": success, "lengths": [5] * 20}
    write_evaluation(run, name, results, **changed)


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
    # Seeds of 90, 95 and 100 %, and 20 episodes each: wider than these three numbers.
    assert (dppo[4].text, dppo[4].aside) == ("95.0", "[86.7, 100.0]")
    assert "of seeds and, within each, of its episodes" in table.caption
    assert "With fewer than 5 seeds it is too narrow" in table.caption
    assert (dppo[0].flag, fpo[0].flag) == ("", UNCLEAR)
    assert [row[4].below[0] for row in (dppo, fpo)] == ["clears the base", UNCLEAR]
    assert [row[5].below[0] for row in (dppo, fpo)] == [UNCLEAR, UNCLEAR]
    assert [cell.text for cell in dppo[1:4]] == ["2,000", "16,000", "3.33"]
    assert dppo[1].aside == "of 1 action"


def test_intervals_are_over_seeds_and_of_one_seed_over_episodes(runs: list[Path]) -> None:
    found = [read_run(path) for path in runs]
    one = score([found[0].evaluation], "clean", is_success=True)
    three = score([run.evaluation for run in found[4:7]], "clean", is_success=True)
    assert one is not None
    assert three is not None
    assert (float(one.point), float(three.point)) == pytest.approx((40.0, 40.0))
    # Of 20 episodes of which 8 succeed, the binomial's 2.5 % and 97.5 %. Of the three seeds' 20, 40 and 60 % alone the
    # least and the greatest; their episodes make it wider.
    assert (float(one.low), float(one.high)) == pytest.approx((20.0, 60.0), abs=5.0)
    assert 10 < float(three.low) < 20
    assert 60 < float(three.high) < 70
    returns = score([found[0].evaluation], "clean", is_success=False)
    assert returns is not None
    assert float(returns.point) == 4.0
    assert score([found[0].evaluation, None], "video_hard", is_success=True) is None
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


def test_agents_without_noise_are_held_against_the_base_without_noise(tmp_path: Path) -> None:
    """It succeeds in 17 of 20 episodes, and in 4 as it draws: an agent that still does has learned nothing."""
    base = finished(tmp_path, "flow-policy", 1, {"clean": 4})
    same = [finished(tmp_path, "fpo++", s, {"clean": 17}, base, start_noise=0) for s in (1, 2)]
    draws = [finished(tmp_path, "dppo", s, {"clean": 17}, base) for s in (1, 2)]
    before = fine_tuning_table(summary([base, *same, *draws]), TASK)
    assert before is not None
    assert [row[0].text for row in before.rows] == ["flow-policy (base)", "dppo", "fpo++"]
    assert [row[4].below[0] for row in before.rows[1:]] == ["clears the base"] * 2
    assert before.notes[0].startswith("fpo++ acts from zero noise and its base was not evaluated")
    evaluated(base, "benchmark-zero-noise", {"clean": 17}, acting={"start_noise": 0.0})
    table = fine_tuning_table(summary([base, *same, *draws]), TASK)
    assert table is not None
    names = ["flow-policy (base)", "flow-policy (base, zero noise)", "dppo", "fpo++"]
    assert [row[0].text for row in table.rows] == names
    assert [row[4].text for row in table.rows] == ["20.0", "85.0", "85.0", "85.0"]
    assert [row[4].below for row in table.rows] == [(), (), ("clears the base",), (UNCLEAR,)]
    assert table.rows[3][0].flag == UNCLEAR
    assert table.notes == ()
    lines = {str(line["policy"]): line for line in fine_tuning_rows(summary([base, *same, *draws]))}
    assert lines["fpo++"]["base"] == names[1]
    assert [lines[name]["clears_base"] for name in names] == [None, None, True, False]
    assert lines["fpo++"]["interval_of"] == "seeds and their episodes"
    assert (lines[names[0]]["interval_of"], lines["dppo"]["too_narrow"]) == ("episodes", True)
    # Of another checkpoint, it is not what they began with.
    (base / "evaluations" / "benchmark-zero-noise.json").unlink()
    more = {"acting": {"start_noise": 0.0}, "checkpoint": "step-9"}
    evaluated(base, "later-zero-noise", {"clean": 17}, **more)
    assert read_run(base).zero_noise is None


def test_decisions_say_of_how_many_actions_they_are(tmp_path: Path) -> None:
    base = finished(tmp_path, "flow-policy", 1, {"clean": 4})
    chunks = finished(tmp_path, "dppo", 1, {"clean": 17}, base, action_chunk=8)
    single = finished(tmp_path, "resfit", 1, {"clean": 17}, base, action_chunk=1)
    table = fine_tuning_table(summary([base, chunks, single]), TASK)
    assert table is not None
    assert [row[1].aside for row in table.rows[1:]] == ["of 8 actions", "of 1 action"]
    assert "environment frames compare" in table.caption


def test_bases_of_one_name_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    grids = []
    for digest, count in (("a", 4), ("b", 12)):
        folder = tmp_path / digest
        base = finished(folder, "flow-policy", 1, {"clean": count})
        evaluated(base, "later", {"clean": count}, weights=["all", digest])
        agent = {"a": "dppo", "b": "fpo"}[digest]
        # As an archive keeps it: the folder that it names is gone.
        tuned = finished(folder, agent, 1, {"clean": 17}, tmp_path / "gone" / base.name, digest)
        grids.append([base, tuned])
    (first, dppo), (second, fpo) = grids
    runs = [read_run(path) for path in (first, second, dppo, fpo)]
    assert base_of(runs[2], runs) is runs[0]
    assert base_of(runs[3], runs) is runs[1]
    assert base_of(runs[3], [runs[0], runs[2]]) is None, "whatever its name"
    table = fine_tuning_table(summary([first, second, dppo, fpo]), TASK)
    assert table is not None
    assert [(row[0].text, row[4].text) for row in table.rows] == [
        ("flow-policy (base)", "20.0"), ("dppo", "85.0"), ("flow-policy (base)", "60.0"), ("fpo", "85.0"),
    ]  # fmt: skip
    for base in (first, second):  # older evaluations do not tell: the one beside it
        (base / "evaluations" / "later.json").unlink()
    runs = [read_run(path) for path in (first, second, dppo, fpo)]
    assert [base_of(run, runs) for run in runs[2:]] == runs[:2]
    assert base_of(runs[2], [runs[1], runs[3]]) is runs[1], "nothing else is known of it"
    assert fine_tuning_table(summary([first, dppo, fpo]), TASK) is None, "which one is its own?"


def test_the_report_has_the_table_where_there_is_a_base(runs: list[Path], tmp_path: Path) -> None:
    page = build_report(runs, tmp_path / "report")
    assert UNCLEAR in page.read_text()
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"({UNCLEAR})" in text
    assert "With fewer than 5 seeds it is too narrow" in text
    assert "seeds and their episodes" in (tmp_path / "report" / "fine_tuning.csv").read_text()
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
