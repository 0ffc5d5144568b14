"""Turn run folders into one HTML page with curves, a generalization table and videos.

    python -m experiments.report runs/sgqn-cartpole-1 --out report/
    python -m experiments.report runs/ --out report/ --overwrite
    python -m experiments.report 'runs/*cartpole*' --statistic iqm --out report/

Runs of one agent on one task are seeds of one experiment and are reported together. The page
carries its pictures and videos inside; the same figures (PNG) and tables (CSV) lie beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from agents.core.errors import UserError
from experiments.arguments import Parser, run_command
from experiments.report_html import render_html, slug
from experiments.report_plots import diagnostics, generalization, learning_curves
from experiments.report_runs import find_runs, read_run
from experiments.report_scores import Summary, curve, differing, return_tags, settings, summarize
from experiments.statistics import Statistic, interquartile_mean, mean

PAGE = "report.html"
OURS = (
    PAGE,
    *(f"{kind}_*.png" for kind in ("curves", "generalization", "diagnostics")),
    *(f"{kind}.csv" for kind in ("curves", "generalization", "runs")),
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
    figures: dict[str, bytes] = {}
    for env_id in summary.env_ids:
        drawn = {
            "curves": learning_curves(summary, env_id, STATISTICS[statistic]),
            "generalization": generalization(summary, env_id),
            "diagnostics": diagnostics(summary, env_id),
        }
        figures |= {f"{kind}_{slug(env_id)}.png": png for kind, png in drawn.items() if png}
    tables = {
        "generalization.csv": _csv(_score_rows(summary)),
        "curves.csv": _csv(_curve_rows(summary, STATISTICS[statistic])),
        "runs.csv": _csv(_run_rows(summary)),
    }
    page = render_html(summary, figures, [*figures, *tables], statistic)
    # All is computed before the first file is touched: a failure leaves the old report whole.
    out.mkdir(parents=True, exist_ok=True)
    for pattern in OURS:
        for stale in out.glob(pattern):
            stale.unlink()
    for name, content in {**figures, **tables, PAGE: page.encode()}.items():
        (out / name).write_bytes(content)
    return out / PAGE


def _score_rows(summary: Summary) -> Iterable[dict[str, object]]:
    for env_id in summary.env_ids:
        rows = [
            (group.agent, name, group.scores[name], group.learned)
            for group in summary.of(env_id)
            for name in summary.distractions(env_id)
            if name in group.scores
        ]
        if env_id in summary.random:
            rows.append(("random", "clean", summary.random[env_id], None))
        for agent, name, score, learned in rows:
            over = "seeds" if score.runs > 1 else "episodes"
            low, high = score.gap_interval or (None, None)
            yield {
                "env": env_id,
                "agent": agent,
                "distraction": name,
                "mean": score.mean,
                "low_95": score.low,
                "high_95": score.high,
                "iqm": score.iqm,
                "gap_percent": score.gap,
                "gap_low_95": low,
                "gap_high_95": high,
                "success": score.success,
                "seeds": score.runs if agent != "random" else None,
                "episodes": score.episodes,
                "interval_over": over,
                "learned": learned,
            }


def _curve_rows(summary: Summary, statistic: Statistic) -> Iterable[dict[str, object]]:
    for group in summary.groups:
        for tag in return_tags(group.runs):
            line = curve(group.runs, tag, statistic)
            if line is None:
                continue
            for step, point, low, high in zip(
                line.steps, line.point, line.low, line.high, strict=True
            ):
                yield {
                    "env": group.env_id,
                    "agent": group.agent,
                    "tag": tag,
                    "agent_steps": step,
                    "value": point,
                    "low_95": low if line.seeds > 1 else None,
                    "high_95": high if line.seeds > 1 else None,
                    "seeds": line.seeds,
                }


def _run_rows(summary: Summary) -> Iterable[dict[str, object]]:
    names = differing(summary.runs)
    for group in summary.groups:
        for run in group.runs:
            found = settings(run)
            returns = run.evaluation.results if run.evaluation else {}
            yield {
                "run": str(run.path),
                "env": run.env_id,
                "agent": run.agent,
                "seed": run.seed,
                **run.counters,
                **{f"return {name}": result.returns.mean() for name, result in returns.items()},
                **{name: found.get(name) for name in names},
            }


def _csv(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Return a table whose columns are all keys in order of appearance; None is an empty cell."""
    rows = [
        {key: f"{value:.7g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


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
