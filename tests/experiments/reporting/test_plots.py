"""Figures say what they show: labels with units, seed counts, and who did not learn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.reporting import plots, plots_across
from experiments.reporting.aggregates import aggregate
from experiments.reporting.blocks import Table
from experiments.reporting.page import Contents, blocks
from experiments.reporting.runs import find_runs, read_run
from experiments.reporting.scores import Summary, summarize
from experiments.reporting.statistics import mean
from tests.experiments.run_folders import ENV, MakeRun, write_evaluation, write_metrics


@pytest.fixture
def summary(two_agents: Path) -> Summary:
    return summarize([read_run(run) for run in find_runs([two_agents])])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, two_agents: Path) -> list[Figure]:
    """Return the list that every figure is put into instead of being written."""
    kept: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        kept.append(figure)
        return b""

    for module in (plots, plots_across):
        monkeypatch.setattr(module, "png", keep)
    return kept


def draw(name: str, summary: Summary) -> Any:
    if name in ("aggregates", "profiles"):
        found = aggregate(summary)
        assert found is not None
        return getattr(plots_across, name)(summary, found)
    arguments = (mean,) if name in ("learning_curves", "efficiency") else ()
    return getattr(plots, name)(summary, ENV, *arguments)


@pytest.mark.parametrize(
    "name", ["learning_curves", "efficiency", "generalization", "aggregates", "profiles"]
)
def test_legends_count_seeds_and_name_who_did_not_learn(
    name: str, summary: Summary, figures: list[Figure]
) -> None:
    draw(name, summary)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert "sac (n = 3, did not learn)" in labels
    assert "sgqn (n = 3)" in labels


def test_every_axis_of_every_figure_is_labeled(summary: Summary, figures: list[Figure]) -> None:
    for name in ("learning_curves", "efficiency", "generalization", "aggregates", "profiles"):
        draw(name, summary)
        figure = figures[-1]
        for axes in figure.axes:
            assert axes.get_xlabel() or figure.get_supxlabel(), name
            shared = name == "aggregates"  # its rows are named by distraction
            assert axes.get_ylabel() or figure.get_supylabel() or shared, name
    assert [axes.get_xlabel() for axes in figures[1].axes] == [
        "agent steps",
        "environment frames",
        "gradient updates",
        "wall clock (minutes)",
    ]


def test_agents_differ_in_more_than_color(summary: Summary, figures: list[Figure]) -> None:
    draw("learning_curves", summary)
    lines = [line for line in figures[0].axes[0].lines if "n = 3" in str(line.get_label())]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines) == 2


def test_fifteen_agents_differ_in_line_and_marker(make_run: MakeRun) -> None:
    runs = [make_run(f"agent-{index:02}", metrics=False) for index in range(15)]
    found = summarize([read_run(run) for run in runs])
    looks = [plots.style(found, f"agent-{index:02}") for index in range(15)]
    assert len({(line, marker) for _, line, marker in looks}) == 15
    assert len({look[0] for look in looks[:7]}) == len(plots.COLORS)


def test_equal_returns_whose_mean_is_rounded_are_drawn(
    summary: Summary, figures: list[Figure], make_run: MakeRun
) -> None:
    """The mean of ten times 0.1 lies 1e-17 beside its interval."""
    found = summarize([read_run(make_run("tenths", clean=[0.1] * 10))])
    [group] = found.groups
    low = group.scores["clean"].low
    assert group.scores["clean"].mean != low, "rounding shows: without, this test shows nothing"
    plots.generalization(found, ENV)
    assert figures


def test_seeds_without_a_common_range_of_minutes_are_named_not_dropped(
    make_run: MakeRun, figures: list[Figure]
) -> None:
    runs = []
    for seed, slower in ((7, 1), (8, 100)):
        run = make_run("slow", seed)
        write_metrics(run, [(step, 1.0) for step in (1000, 2000)])
        text = (run / "metrics.csv").read_text()
        (run / "metrics.csv").write_text(
            text.replace(",100.0,train", f",{100 * slower}.0,train").replace(
                ",200.0,train", f",{200 * slower}.0,train"
            )
        )
        runs.append(read_run(run))
    draw("efficiency", summarize(runs))
    texts = [[text.get_text() for text in axes.texts] for axes in figures[0].axes]
    assert texts == [[], [], [], ["not drawn, seeds share no range: slow"]]
    assert np.isfinite(figures[0].axes[0].lines[0].get_ydata()).all()  # type: ignore[arg-type]


def test_every_table_with_agents_flags_who_did_not_learn(summary: Summary) -> None:
    contents = Contents(summary, aggregate(summary), {ENV: []}, (), (), "mean")
    tables = [block for block in blocks(contents) if isinstance(block, Table)]
    assert len(tables) >= 6
    for table in tables:
        flags = {row[0].text: row[0].flag for row in table.rows}
        assert flags["sac"] == "did not learn", table.name
        assert flags["sgqn"] == "", table.name
        assert any("earned" in note and "sgqn" in note for note in table.notes), table.name


NAMES = (
    "clean", "color_easy", "color_hard", "video_easy", "video_hard", "camera_easy", "camera_hard", "light_easy",
    "light_hard", "noise_easy", "noise_hard", "dcs_easy", "dcs_medium", "dcs_hard", "randomized",
)  # fmt: skip


@pytest.mark.parametrize("names", [NAMES[:5], NAMES], ids=["few", "many"])
def test_names_of_distractions_do_not_overlap(
    names: tuple[str, ...], two_agents: Path, figures: list[Figure]
) -> None:
    for run in find_runs([two_agents]):
        row = {"returns": [800.0, 810.0], "success": None, "lengths": [125, 125]}
        write_evaluation(run, "20270101-000000", dict.fromkeys(names, row))
    runs = [read_run(run) for run in find_runs([two_agents])]
    plots.generalization(summarize(runs), ENV)
    draw("aggregates", summarize(runs))
    bars, across = figures
    for figure in figures:
        figure.set_dpi(160)
        figure.canvas.draw()
    ticks = bars.axes[0].get_xticklabels()
    assert {tick.get_text() for tick in ticks} == set(names)
    places = bars.axes[0].transData.transform([(i, 0) for i in range(len(names))])[:, 0]
    for tick, left, right in zip(ticks, places, places[1:], strict=False):
        angle = np.deg2rad(tick.get_rotation())
        tick.set_rotation(0)
        box = tick.get_window_extent()
        needed = box.width if angle == 0 else box.height / np.sin(angle)
        assert needed < right - left
    boxes = [tick.get_window_extent() for tick in across.axes[0].get_yticklabels()]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
    assert across.get_figheight() < 11, "it fits on a page"
