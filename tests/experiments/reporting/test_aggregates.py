"""Aggregates over tasks: normalized by what a task allows, over the tasks that all agents share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.report import build_report
from experiments.reporting.aggregates import Aggregates, aggregate, normalized
from experiments.reporting.runs import Result, read_run
from experiments.reporting.scores import Summary, curve, summarize
from experiments.reporting.tables import learned_notes, scores_table
from experiments.reporting.tables_across import (
    aggregate_tables,
    gap_table,
    improvement_tables,
    looks_table,
)
from tests.experiments.run_folders import (
    ENV,
    MakeRun,
    table,
    text_of,
    write_evaluation,
    write_metrics,
)

WALKER = "dmc/walker-walk"


def summary_of(runs: list[Path]) -> Summary:
    return summarize([read_run(run) for run in runs])


@pytest.fixture
def two_tasks(make_run: MakeRun) -> Summary:
    """Return 2 agents x 2 tasks x 2 seeds: sgqn learns both tasks, sac only the walker."""
    runs = []
    for env_id, sgqn, sac in ((ENV, (800, 600), (20, 22)), (WALKER, (400, 200), (500, 300))):
        for seed in (0, 1):
            values = {"clean": [float(sgqn[seed])] * 2, "hard": [sgqn[seed] / 2] * 2}
            runs.append(make_run("sgqn", seed, **values, id=env_id))
            values = {"clean": [float(sac[seed])] * 2, "hard": [sac[seed] / 4] * 2}
            runs.append(make_run("sac", seed, **values, id=env_id))
    return summary_of(runs)


def aggregates_of(summary: Summary) -> Aggregates:
    found = aggregate(summary)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("env_id", "length", "success", "expected"),
    [
        ("dmc/walker-walk", None, None, 0.012),
        ("dmc/walker-walk", 100, None, 0.12),
        ("dmc/lqr-lqr_2_1", None, None, None),
        ("metaworld/reach", None, 0.25, 0.25),
        ("metaworld/reach", None, None, None),
        ("toy/reach", None, None, 12 / 25),
        ("toy/reach-drift", 50, None, 12 / 50),
        ("toy/balance", None, None, 12 / 40),
        ("toy/catch", None, None, 12 / 6),
        ("gym/HalfCheetah-v5", None, None, None),
    ],
)
def test_scores_are_normalized_by_what_the_task_allows(
    make_run: MakeRun, env_id: str, length: int | None, success: float | None, expected: float
) -> None:
    run = read_run(make_run(id=env_id, episode_length=length))
    score = normalized(run, Result(np.array([10.0, 14.0]), success))
    assert score == (None if expected is None else pytest.approx(expected))


def test_aggregates_are_those_computed_by_hand(two_tasks: Summary) -> None:
    found = aggregates_of(two_tasks)
    assert found.tasks["clean"] == [ENV, WALKER]
    sgqn = found.scores["sgqn", "clean"]
    assert sgqn.mean.point == pytest.approx((0.8 + 0.6 + 0.4 + 0.2) / 4)
    assert sgqn.iqm.point == pytest.approx((0.6 + 0.4) / 2)
    assert sgqn.optimality_gap.point == pytest.approx(1 - 0.5)
    # On the walker sgqn wins 1 of 4 pairs, on cartpole all of them.
    better = found.improvement["sgqn", "sac", "clean"]
    assert better.point == pytest.approx((4 / 4 + 1 / 4) / 2)
    assert found.scores["sgqn", "video_hard"].gap.point == pytest.approx(50)  # type: ignore[union-attr]
    assert found.scores["sgqn", "clean"].profile.point[[0, 30, 70]] == pytest.approx(
        [1, 0.75, 0.25]
    )


def test_agent_that_did_not_learn_everywhere_has_no_gap_and_a_flag(two_tasks: Summary) -> None:
    found = aggregates_of(two_tasks)
    assert found.unlearned == {"sac": [ENV], "sgqn": []}
    assert found.scores["sac", "video_hard"].gap is None
    for shown in (*aggregate_tables(found), gap_table(found)):
        assert shown is not None
        flags = {row[0].text: row[0].flag for row in shown.rows}
        assert flags == {"sac": "did not learn on 1 of 2 tasks", "sgqn": ""}
        assert "Learned on all of them: sgqn." in shown.notes


def test_only_tasks_that_all_agents_share_count_and_the_others_are_named(
    two_tasks: Summary, make_run: MakeRun
) -> None:
    easy = read_run(make_run("sgqn", clean=[999.0, 999.0], id="dmc/cup-catch"))
    unknown = read_run(make_run("sac", clean=[5e6, 6e6], id="mine/task"))
    before, after = (
        aggregates_of(two_tasks),
        aggregates_of(summarize([*two_tasks.runs, easy, unknown])),
    )
    for key, score in before.scores.items():
        np.testing.assert_array_equal(score.mean.point, after.scores[key].mean.point)
    assert any("dmc/cup-catch is left out: not every agent" in text for text in after.left_out)
    assert any("mine/task is left out: its best score" in text for text in after.left_out)


def test_one_run_per_task_has_no_interval(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(agent, clean=[500.0, 600.0]) for agent in ("sgqn", "sac")]
    found = aggregates_of(summary_of(runs))
    assert not found.has_intervals
    assert all(row[1].aside == "†" for row in aggregate_tables(found)[0].rows)
    assert improvement_tables(found) == [], "a matrix of ones and zeros"
    assert [row[0].below for row in aggregate_tables(found)[0].rows] == [("1 run",)] * 2
    page = build_report([tmp_path / "runs"], tmp_path / "out")
    assert {row["low_95"] for row in table(page.parent / "aggregates.csv")} == {""}
    assert "P(improvement) under" not in text_of(page)


def test_tasks_without_a_known_best_have_no_aggregate_section(
    make_run: MakeRun, tmp_path: Path
) -> None:
    page = build_report([make_run(clean=[5.0, 6.0], id="gym/Ant-v5")], tmp_path / "out")
    assert "All tasks together" not in text_of(page)
    assert not (page.parent / "aggregates.csv").exists()


def test_a_task_on_which_nobody_learned_says_so(make_run: MakeRun) -> None:
    groups = summary_of([make_run(seed=s, clean=[20.0, 21.0]) for s in (1, 2)]).groups
    assert learned_notes(groups) == (f"{ENV}: no agent learned on this task; did not learn: sgqn.",)


def test_every_table_of_a_task_names_who_learned(two_tasks: Summary) -> None:
    shown = scores_table(two_tasks, ENV)
    assert shown is not None
    assert shown.notes == (f"{ENV}: learned: sgqn; did not learn: sac.",)
    assert {row[0].text: row[0].flag for row in shown.rows}["sac"] == "did not learn"


def test_efficiency_is_over_every_cost_and_meets_at_common_places(make_run: MakeRun) -> None:
    runs = []
    for seed, stop in ((1, 2000), (2, 1600)):
        run = make_run(seed=seed)
        write_metrics(run, [(s, float(s)) for s in range(100, stop, 100)])
        runs.append(read_run(run))
    # As `write_metrics` has it: 8 frames, half an update and a tenth of a second per agent step.
    for axis, per_step in (("env_frames", 8), ("gradient_updates", 0.5), ("wall_minutes", 1 / 600)):
        line = curve(runs, "train/episode_return", axis=axis)  # type: ignore[arg-type]
        assert line is not None
        inner = slice(3, -3)
        np.testing.assert_allclose(line.spent[inner], per_step * line.point[inner], rtol=0.05)
        assert line.spent[-1] <= 1500 * per_step


def saliency(value: float) -> dict[str, list[float]]:
    return {key: [value, value + 0.1] for key in ("iou", "energy", "pointing", "area")}


def test_where_agents_look_is_the_mean_over_runs_and_absent_where_it_was_not_measured(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = []
    for seed, value in ((1, 0.2), (2, 0.6)):
        runs.append(make_run("sgqn", seed))
        clean = {"returns": [500.0, 500.0], "saliency": saliency(value)}
        write_evaluation(runs[-1], "1", {"clean": clean, "video_hard": {"returns": [400.0]}})
    old = make_run("sac", clean=[500.0, 500.0])
    shown = looks_table(summary_of([*runs, old]), ENV)
    assert shown is not None
    rows = {(row[0].text, row[1].text): row[2:] for row in shown.rows}
    assert rows["sgqn", "clean"][0].text == "0.45"
    assert rows["sgqn", "clean"][0].aside == "[0.25, 0.65] n = 2"
    assert [cell.text for cell in rows["sac", "clean"]] == ["–"] * 4
    assert ("sgqn", "video_hard") not in rows
    assert looks_table(summary_of([old]), ENV) is None

    page = build_report([tmp_path / "runs"], tmp_path / "out")
    values = [float(row["value"]) for row in table(page.parent / "saliency.csv")]
    assert sorted(set(values)) == pytest.approx([0.25, 0.65])
    assert text_of(page).count("Saliency overlays on") == 1  # clean, both agents side by side
    assert "sac, seed 1" in text_of(page)


def test_broken_saliency_becomes_a_sentence(make_run: MakeRun) -> None:
    run = make_run()
    clean = {"returns": [1.0], "saliency": {"iou": [0.5, None], "energy": "much", "new": [1.0]}}
    write_evaluation(run, "1", {"clean": clean, "video_hard": {"returns": [1.0], "saliency": 3}})
    read = read_run(run)
    assert read.evaluation is not None
    assert read.evaluation.results["clean"].saliency == {"iou": 0.5}
    assert read.evaluation.results["video_hard"].saliency == {}
    assert sum("saliency scores are missing" in note for note in read.notes) == 2
    json.dumps(read.notes)
