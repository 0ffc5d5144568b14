"""Turn run folders into a report: curves, tables, aggregates over tasks, saliency and videos.

    python -m experiments.report runs/sgqn-cartpole-1 --out report/
    python -m experiments.report runs/ --out report/ --overwrite
    python -m experiments.report 'runs/*cartpole*' --statistic iqm --out report/

Runs of one agent on one task are seeds of one experiment and are reported together. report.html
carries its pictures and videos inside; beside it lie the figures (PNG), the numbers (CSV), and the
tables for a paper (report.md, tables.tex).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from agents.core.errors import UserError
from experiments.reporting import csv_tables, plots, plots_across
from experiments.reporting.aggregates import Aggregates, aggregate
from experiments.reporting.blocks import Table, slug
from experiments.reporting.fine_tuning import fine_tuning_rows
from experiments.reporting.html import render_html
from experiments.reporting.page import Contents, blocks, title_of
from experiments.reporting.published import Comparison, compare
from experiments.reporting.runs import find_runs, read_run
from experiments.reporting.scores import Summary, summarize
from experiments.reporting.statistics import Statistic, interquartile_mean, mean
from experiments.reporting.text import render_latex, render_markdown
from experiments.running.arguments import Parser, make_folder, run_command

PAGE = "report.html"
TASK_FIGURES = ("curves", "efficiency", "generalization", "diagnostics")
TABLES = ("curves", "efficiency", "generalization", "aggregates", "saliency", "runs", "fine_tuning")
OURS = (
    PAGE,
    "report.md",
    "tables.tex",
    "aggregates.png",
    "profiles.png",
    *(f"{kind}_*.png" for kind in TASK_FIGURES),
    *(f"{kind}.csv" for kind in TABLES),
)
"""What a report may replace in its folder."""
STATISTICS = {"mean": mean, "iqm": interquartile_mean}


def build_report(
    runs: Sequence[Path],
    out: Path,
    *,
    overwrite: bool = False,
    statistic: Literal["mean", "iqm"] = "mean",
) -> Path:
    """Write the report of some runs and return its page.

    Args:
        runs: run folders, folders of run folders, or glob patterns.
        out: folder for the page, figures and tables; made if absent.
        overwrite: replace an earlier report in `out`; other files there are left alone.
        statistic: what the learning curves show over seeds.

    Raises:
        UserError: no runs, a folder that is no run, or an `out` that exists.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; --out is a folder, give another one")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"'{out}' exists and is not empty; add --overwrite or give another --out")
    summary = summarize([read_run(path) for path in find_runs(runs)])
    make_folder(out, "--out")  # before the work of minutes
    aggregates = aggregate(summary)
    comparisons = {env_id: compare(summary, env_id) for env_id in summary.env_ids}
    figures = _figures(summary, aggregates, comparisons, STATISTICS[statistic])
    tables = _tables(summary, aggregates, STATISTICS[statistic])
    names = (*figures, *tables, "report.md", "tables.tex")
    found = blocks(Contents(summary, aggregates, comparisons, figures.keys(), names, statistic))
    title = title_of(summary)
    files = {
        **figures,
        **tables,
        "report.md": render_markdown(found).encode(),
        "tables.tex": render_latex(title, [b for b in found if isinstance(b, Table)]).encode(),
        PAGE: render_html(title, found, figures).encode(),
    }
    # All is computed before the first file is touched: a failure leaves the old report whole.
    for pattern in OURS:
        for stale in out.glob(pattern):
            stale.unlink()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out / PAGE


def _figures(
    summary: Summary,
    aggregates: Aggregates | None,
    comparisons: Mapping[str, Sequence[Comparison]],
    statistic: Statistic,
) -> dict[str, bytes]:
    """Return PNG bytes by file name; what there is no data for is absent."""
    found: dict[str, bytes | None] = {}
    for env_id in summary.env_ids:
        drawn = (
            plots.learning_curves(summary, env_id, statistic, comparisons[env_id]),
            plots.efficiency(summary, env_id, statistic),
            plots.generalization(summary, env_id, comparisons[env_id]),
            plots.diagnostics(summary, env_id),
        )
        found |= {
            f"{kind}_{slug(env_id)}.png": png for kind, png in zip(TASK_FIGURES, drawn, strict=True)
        }
    if aggregates:
        found["aggregates.png"] = plots_across.aggregates(summary, aggregates)
        found["profiles.png"] = plots_across.profiles(summary, aggregates)
    return {name: png for name, png in found.items() if png}


def _tables(
    summary: Summary, aggregates: Aggregates | None, statistic: Statistic
) -> dict[str, bytes]:
    """Return CSV bytes by file name; what there is no data for is absent, but for the first ones."""
    found = (
        csv_tables.curve_rows(summary, statistic),
        csv_tables.efficiency_rows(summary, statistic),
        csv_tables.score_rows(summary),
        csv_tables.aggregate_rows(aggregates),
        csv_tables.looks_rows(summary),
        csv_tables.run_rows(summary),
        fine_tuning_rows(summary),
    )
    contents = {
        f"{kind}.csv": csv_tables.to_csv(rows) for kind, rows in zip(TABLES, found, strict=True)
    }
    return {name: content for name, content in contents.items() if content.strip()}


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.report", description=__doc__)
    p.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, a folder of run folders, or a glob pattern",
    )
    p.add_argument("--out", type=Path, required=True, help="folder for the report")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")
    p.add_argument(
        "--statistic",
        choices=tuple(STATISTICS),
        default="mean",
        help="what the learning curves show over seeds [mean]",
    )
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = parser().parse_args(argv)
    page = build_report(given.runs, given.out, overwrite=given.overwrite, statistic=given.statistic)
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
