"""Markdown and LaTeX hold the page's tables, with every name escaped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.report import build_report
from experiments.reporting.blocks import Cell, Table
from experiments.reporting.text import latex, render_latex, render_markdown
from tests.experiments.run_folders import MakeRun

UNRULY = r"50% & #1_{x} ~ ^2 \cmd $y$ a|b <script> *bold* `code` [link]"


@pytest.fixture
def table() -> Table:
    rows = [
        [Cell(UNRULY, flag="did not learn"), Cell("850", "[800, 900]", ("IQM 850", "gap 40 %"))]
    ]
    return Table("scores-x", "Scores of a_b.", ["agent", "video_hard"], rows, ("n: 50 %.",))


def test_latex_escapes_every_special_sign() -> None:
    escaped = latex(UNRULY)
    for plain in (r"50\%", r"\&", r"\#1", r"\_\{x\}", r"\textasciitilde{}", r"\textasciicircum{}2"):
        assert plain in escaped
    assert r"\textbackslash{}cmd \$y\$" in escaped
    # Nothing special is left once the escapes themselves are taken away.
    rest = re.sub(r"\\text[a-z]+\{\}|\\[%&#_{}$]|\{\[\}", "", escaped)
    assert not re.search(r"[%&#_{}$~^\\\[]", rest)


def test_latex_table_is_booktabs_with_balanced_braces_and_as_many_cells_as_columns(
    table: Table,
) -> None:
    text = render_latex("title", [table])
    for line in (
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\label{tab:scores-x}",
        "did not learn",
    ):
        assert line in text
    depth = 0
    for sign in re.sub(r"\\[{}]", "", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    body = text.split(r"\midrule%")[1].split(r"\bottomrule")[0]
    row = re.sub(r"\\shortstack\[l\]\{.*?\}(?= &| \\\\%)", "cell", body)
    assert len(re.findall(r"(?<!\\)&", row)) == 1
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1


def test_markdown_table_keeps_its_columns_whatever_names_hold(table: Table) -> None:
    lines = render_markdown([table]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert "**850** \\[800, 900\\]<br>IQM 850<br>gap 40 %" in rows[2]
    assert "**(did not learn)**" in rows[2]
    assert "<script" not in re.sub(r"\\<", "", rows[2])


def test_a_report_has_its_tables_on_every_medium(two_agents: Path, tmp_path: Path) -> None:
    out = build_report([two_agents], tmp_path / "out").parent
    markdown, tex = (out / "report.md").read_text(), (out / "tables.tex").read_text()
    assert "**850** \\[800, 900\\]<br>IQM 850" in markdown
    assert r"850 {\scriptsize {[}800, 900]}" in tex
    for shown in (markdown, tex):
        assert "did not learn" in shown
    for name in re.findall(r"\]\((\S+\.png)\)", markdown):
        assert (out / name).is_file()
    labels = re.findall(r"\\label\{(.*?)\}", tex)
    assert len(labels) == len(set(labels)) >= 6
    assert tex.count(r"\toprule") == len(labels)


def test_commands_stay_literal_in_markdown(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(clean=[1.0, 2.0])
    (run / "command.txt").write_text("train --note '`x`' _a_\n")
    page = build_report([run], tmp_path / "out")
    assert "`` train --note '`x`' _a_ ``" in (page.parent / "report.md").read_text()
