"""The report tells what the runs hold: right numbers, honest flags, nothing from a network."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agents.core.errors import UserError
from experiments import benchmark, campaign, pictures, report, soak
from experiments.report import build_report, main
from experiments.reporting.runs import read_run
from experiments.reporting.scores import align, summarize
from tests.experiments.run_folders import (
    ENV,
    MakeRun,
    table,
    text_of,
    write_evaluation,
    write_metrics,
)


def test_tables_hold_the_numbers_computed_by_hand(two_agents: Path, tmp_path: Path) -> None:
    page = build_report([two_agents], tmp_path / "out")
    rows = {
        (row["agent"], row["distraction"]): row for row in table(page.parent / "generalization.csv")
    }
    clean, hard = rows["sgqn", "clean"], rows["sgqn", "video_hard"]
    assert float(clean["mean"]) == pytest.approx(850)
    assert float(hard["mean"]) == pytest.approx(510)
    assert float(hard["gap_percent"]) == pytest.approx(40)
    # Three seeds have 27 resamples; the outer ones, all of one seed, hold 1/27 > 2.5 % each.
    assert [float(clean[k]) for k in ("low_95", "high_95")] == pytest.approx([800, 900])
    assert [float(hard[k]) for k in ("low_95", "high_95")] == pytest.approx([300, 630])
    # Resampled as pairs, the gap's ends are those of single seeds, not of mixed clean and hard.
    ends = [float(hard[k]) for k in ("gap_low_95", "gap_high_95")]
    assert ends == pytest.approx([100 * (1 - 600 / 800), 100 * (1 - 300 / 850)], rel=1e-5)
    assert (clean["seeds"], clean["episodes"], clean["interval_over"]) == ("3", "6", "seeds")
    assert float(rows["random", "clean"]["mean"]) == 21.0

    shown = text_of(page)
    assert "850 [800, 900] IQM 850" in shown
    assert "510 [300, 630] IQM 510 gap 40 % [25, 65]" in shown
    assert "2,000 16,000 1,000 0:03:20 48 8 fast" in shown
    for fact in ("c0ffee1", "two cores", "llvmpipe", "numpy 2.4", "--agent sgqn"):
        assert fact in shown


def test_agent_at_random_level_is_flagged_and_gets_no_gap(two_agents: Path, tmp_path: Path) -> None:
    page = build_report([two_agents], tmp_path / "out")
    learned = {(r["agent"], r["learned"]) for r in table(page.parent / "generalization.csv")}
    assert {("sgqn", "True"), ("sac", "False")} <= learned
    shown = text_of(page)
    assert "sac did not learn" in shown
    assert "sgqn did not learn" not in shown
    assert shown.count("gap 40 %") == 1
    assert len(re.findall(r"gap \d", shown)) == 1


def test_a_mean_above_random_with_an_interval_that_reaches_it_is_not_learning(
    make_run: MakeRun,
) -> None:
    runs = [make_run(seed=seed, clean=[value]) for seed, value in ((1, 10.0), (2, 60.0), (3, 70.0))]
    assert summarize([read_run(run) for run in runs]).groups[0].learned is False


def test_curves_csv_is_the_mean_over_seeds_with_its_interval(
    two_agents: Path, tmp_path: Path
) -> None:
    page = build_report([two_agents], tmp_path / "out")
    rows = [row for row in table(page.parent / "curves.csv") if row["agent"] == "sgqn"]
    assert [float(row["agent_steps"]) for row in rows] == list(range(100, 2001, 100))
    for row in rows:
        step = float(row["agent_steps"])
        assert float(row["value"]) == pytest.approx(2 * step / 100)
        assert float(row["low_95"]) == pytest.approx(step / 100)
        assert float(row["high_95"]) == pytest.approx(3 * step / 100)


@pytest.mark.usefixtures("drawn")
def test_page_is_one_well_formed_file_that_loads_nothing(two_agents: Path, tmp_path: Path) -> None:
    page = build_report([two_agents], tmp_path / "out")
    content = page.read_text()
    assert "http" not in content
    sources = re.findall(r'(?:src|href|poster)="([^"]{0,40})', content)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert f"data:video/mp4;base64,{base64.b64encode(b'a short film').decode()}" in content
    saliency = two_agents / "sgqn-1/evaluations/20260101-000000/clean_saliency.png"
    assert base64.b64encode(saliency.read_bytes()).decode() in content
    for name in ("curves_dmc-cartpole-swingup.png", "generalization_dmc-cartpole-swingup.png"):
        png = page.parent / name
        assert base64.b64encode(png.read_bytes()).decode() in content
        assert np.asarray(Image.open(png).convert("L")).std() > 5

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(content)
    assert balance.open == []


@pytest.mark.usefixtures("drawn")
def test_same_runs_give_the_same_bytes(two_agents: Path, tmp_path: Path) -> None:
    first = build_report([two_agents], tmp_path / "a").parent
    second = build_report([two_agents], tmp_path / "b").parent
    names = sorted(path.name for path in first.iterdir())
    assert len(names) == 13
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_folders_globs_and_single_runs_name_the_same_runs_once(
    two_agents: Path, tmp_path: Path
) -> None:
    by_folder = build_report([two_agents], tmp_path / "a")
    mixed = [two_agents / "sac-*", two_agents / "sgqn-1", two_agents / "s*"]
    by_glob = build_report(mixed, tmp_path / "b")
    assert table(by_folder.parent / "generalization.csv") == table(
        by_glob.parent / "generalization.csv"
    )


def test_one_seed_is_marked_and_its_interval_is_over_episodes(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(clean=[300.0, 400.0, 500.0], hard=[100.0, 300.0])
    page = build_report([run], tmp_path / "out")
    row = table(page.parent / "generalization.csv")[0]
    assert (row["interval_over"], row["seeds"], row["gap_low_95"]) == ("episodes", "1", "")
    assert [float(row[k]) for k in ("low_95", "high_95")] == [300, 500]
    assert "400 [300, 500]†" in text_of(page)
    assert {row["low_95"] for row in table(page.parent / "curves.csv")} == {""}


def test_success_rates_are_shown_where_the_simulator_knows_success(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    returns = [400.0, 500.0, 450.0, 470.0]
    write_evaluation(run, "1", {"clean": {"returns": returns, "success": [1.0, 0.0, 1.0, 1.0]}})
    assert "success 75 %" in text_of(build_report([run], tmp_path / "out"))


def test_newest_checkpoint_on_the_test_split_is_reported_and_its_files_merge(
    make_run: MakeRun,
) -> None:
    run = make_run()
    for stamp, name, value, changed in (
        ("1", "clean", 100.0, {"agent_steps": 1000, "checkpoint": "early"}),
        ("2", "clean", 500.0, {}),
        ("3", "video_hard", 400.0, {}),
        ("7", "clean", 999.0, {"agent_steps": 2000, "split": "validation"}),
        ("5", "clean", 550.0, {}),
        ("1-own", "color_hard", 9.0, {"videos": "/my/videos"}),
        ("6", "clean", 111.0, {"agent_steps": 1000, "checkpoint": "early"}),
    ):
        write_evaluation(run, stamp, {name: {"returns": [value, value]}}, **changed)
    read = read_run(run)
    assert read.evaluation is not None
    means = {name: result.returns.mean() for name, result in read.evaluation.results.items()}
    assert means == {"clean": 550.0, "video_hard": 400.0}


def test_random_episodes_that_seeds_share_are_counted_once(two_agents: Path) -> None:
    runs = [read_run(two_agents / f"sgqn-{seed}") for seed in (1, 2, 3)]
    assert summarize(runs).random[ENV].episodes == 4


def test_what_a_killed_process_logged_after_its_checkpoint_is_left_out(make_run: MakeRun) -> None:
    run = make_run()
    resumed = [(100, 1.0), (200, 2.0), (300, -9.0), (400, -9.0), (250, 2.5), (350, 3.5)]
    write_metrics(run, resumed)
    with (run / "metrics.csv").open("a") as file:
        file.write("400,3200,200,40.0,train/episode_return,nan\n450,36")
    read = read_run(run)
    series = read.series["train/episode_return"]
    assert series.agent_steps.tolist() == [100, 200, 250, 350]
    assert series.values.tolist() == [1.0, 2.0, 2.5, 3.5]
    assert read.counters["agent_steps"] == 400
    assert any("1 unreadable line" in note for note in read.notes)
    assert any("1 logged value(s) are not finite" in note for note in read.notes)


def test_seeds_that_log_at_different_steps_meet_on_common_ones(make_run: MakeRun) -> None:
    runs = []
    for seed, every, stop in ((1, 7, 2000), (2, 31, 1500), (3, 400, 1900)):
        run = make_run(seed=seed)
        write_metrics(run, [(s, seed * s) for s in range(every, stop, every)])
        runs.append(read_run(run))
    aligned = align(runs, "train/episode_return")
    assert aligned is not None
    steps, values = aligned
    assert steps[0] >= 400
    assert steps[-1] <= 1499
    for seed, row in zip((1, 2, 3), values, strict=True):
        # The logged lines are straight, so averaging in bins may only clip at the range's ends.
        np.testing.assert_allclose(row[2:-2], seed * steps[2:-2], rtol=0.02)


def test_missing_pieces_become_sentences(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(metrics=False)
    (run / "system.json").unlink()
    (run / "command.txt").unlink()
    (run / "evaluations").mkdir()
    (run / "evaluations/1.json").write_text('{"agent_steps": 5, "resu')
    (run / "evaluations/2.json").write_text('{"agent_steps": 5, "results": {"clean": 3}}')
    shown = text_of(build_report([run], tmp_path / "out"))
    for sentence in (
        "command.txt is missing",
        "system.json is missing",
        "metrics.csv cannot be read",
        "1.json is unreadable",
        "2.json is not an evaluation",
        "was not evaluated",
        "no random policy was measured",
        "No returns were logged",
        "No run was evaluated",
        "hold no saliency overlays",
        "hold no videos",
        "Neither losses nor times were logged",
    ):
        assert sentence in shown


def test_reader_is_warned_of_mixed_settings_renderers_and_unfinished_runs(
    make_run: MakeRun, tmp_path: Path
) -> None:
    first = make_run(seed=1, clean=[500.0, 600.0])
    second = make_run(seed=2, clean=[500.0, 600.0], size=84)
    system = json.loads((second / "system.json").read_text())
    (second / "system.json").write_text(json.dumps({**system, "gl_renderer": "NVIDIA"}))
    write_metrics(second, [(100, 1.0), (900, 2.0)])
    shown = text_of(build_report([first, second], tmp_path / "out"))
    assert "its runs differ in env.size" in shown
    assert "different renderers (NVIDIA; llvmpipe)" in shown
    assert "stopped at 900 of 2,000 agent steps" in shown
    assert (
        "agent task seeds env.size system.gl_renderer sgqn dmc/cartpole-swingup 1 48 llvmpipe"
        in shown
    )


def test_negative_returns_have_no_gap_in_percent(make_run: MakeRun) -> None:
    run = make_run(clean=[-100.0, -120.0], hard=[-400.0, -420.0])
    score = summarize([read_run(run)]).groups[0].scores["video_hard"]
    assert (score.mean, score.gap) == (-410.0, None)


def test_names_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    run = make_run(clean=[1.0, 2.0], quality=attack, id=f"toy/{attack}")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "agent": f"sac{attack}"}))
    (run / "command.txt").write_text(f"train --note '{attack}'")
    page = build_report([run], tmp_path / "out").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "config", [None, "{", "[]", '{"agent": "sac"}', '{"agent": "a", "env": 3}']
)
def test_a_folder_that_is_no_run_is_named_in_one_line(
    config: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "holiday" in one_error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_newer_schema_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "schema": 2}))
    with pytest.raises(UserError, match="schema 2"):
        build_report([run], tmp_path / "out")


def test_an_earlier_report_is_replaced_only_on_request_and_only_its_own_files(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(clean=[1.0, 2.0]), tmp_path / "out"
    arguments = [str(run), "--out", str(out)]
    assert main(arguments) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    before = (out / "report.html").read_bytes()
    (out / "mine.txt").write_text("keep")
    (out / "curves_old-task.png").write_bytes(b"stale")

    assert main(arguments) == 2
    assert "--overwrite" in one_error_line(capsys)
    (run / "config.json").write_text("{")
    assert main([*arguments, "--overwrite"]) == 2
    capsys.readouterr()
    assert (out / "report.html").read_bytes() == before

    other = make_run(seed=2, clean=[700.0, 800.0])
    assert main([str(other), "--out", str(out), "--overwrite"]) == 0
    assert (out / "report.html").read_bytes() != before
    assert (out / "mine.txt").read_text() == "keep"
    assert not (out / "curves_old-task.png").exists()


def test_out_that_is_a_file_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a letter")
    with pytest.raises(UserError, match="is a file"):
        build_report([make_run()], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a letter"


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "python -m experiments.report runs/" in capsys.readouterr().out


def test_the_page_says_what_saliency_was_scored_on_and_mixes_no_two(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for seed, scored in ((1, {}), (2, {"foreground": "all but the table"})):
        run = make_run("sgqn", seed, clean=[800.0, 810.0])
        row = {"returns": [700.0], "success": None, "lengths": [125]}
        row["saliency"] = {"energy": [0.5], "iou": [0.4], "pointing": [1.0], "area": [0.1]}
        write_evaluation(run, "20270101-000000", {"clean": row}, **scored)
    shown = text_of(build_report([tmp_path / "runs"], tmp_path / "out"))
    one, other = "all but sky, floor and walls", "all but the table"
    assert f"The foreground is {one} or {other}." in shown
    assert f"saliency was scored on {one} and on {other}; do not compare it" in shown


def test_who_drew_an_evaluation_is_told_and_a_change_of_renderer_is_warned_of(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("sac", clean=[1.0, 2.0])
    old = text_of(build_report([run], tmp_path / "old"))
    assert "Evaluated by not recorded" in old
    results = {"clean": {"returns": [1.0, 2.0]}}
    system = {
        "commit": "beef",
        "gl_renderer": "NVIDIA H100",
        "hardware": {"cpu": "EPYC", "cores": 2},
    }
    write_evaluation(run, "20270101-000000", results, system=system)
    shown = text_of(build_report([run], tmp_path / "out"))
    assert "Evaluated by commit beef, NVIDIA H100, cpu EPYC, cores 2" in shown
    assert "trained on pictures of llvmpipe, evaluated on those of NVIDIA H100" in shown
    write_evaluation(run, "20280101-000000", results, system=system | {"gl_renderer": "llvmpipe"})
    assert "trained on pictures of" not in text_of(build_report([run], tmp_path / "same"))


def test_no_title_is_said_twice_in_a_row(two_agents: Path, tmp_path: Path) -> None:
    shown = text_of(build_report([two_agents], tmp_path / "out"))
    assert shown.count("What was run") == 1


@pytest.mark.parametrize("command", ["report", "soak", "campaign", "pictures", "benchmark"])
def test_a_folder_that_cannot_be_made_is_one_line_before_the_work(
    command: str, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def work(*arguments: object, **keywords: object) -> None:
        raise AssertionError("it began to work")

    (tmp_path / "file").write_text("precious")
    bad = str(tmp_path / "file" / "below")
    run = make_run("sac", clean=[1.0])
    flag, words, module, name = {
        "report": ("--out", [str(run)], report, "aggregate"),
        "soak": ("--out", ["--env", "toy/reach"], soak, "watch_training"),
        "campaign": ("--folder", ["--kills", "1"], campaign, "campaign"),
        "pictures": ("--out", [], pictures, "look"),
        "benchmark": ("--runs", ["--agents", "sac", "--out", str(tmp_path / "out")], benchmark, "run_grid"),
    }[command]  # fmt: skip
    monkeypatch.setattr(module, name, work)
    assert module.main([*words, flag, bad]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} {bad}: cannot create this folder (")
    if command == "benchmark":
        for flag in ("--out", "--archive"):
            assert (
                module.main(["--agents", "sac", "--runs", str(tmp_path / "runs"), flag, bad]) == 2
            )
            assert f"error: {flag} {bad}: cannot create" in capsys.readouterr().err
