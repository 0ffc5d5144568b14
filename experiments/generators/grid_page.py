"""The page of a grid of fine-tuning methods: a row for each, what it gained and spent, and what a reader must know.

`results.csv` has a line for each run, `results.md` the tables, `gains.png` the gains.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from agents.core.errors import UserError
from experiments.generators.grid_archive import without_folders
from experiments.generators.grid_notes import notes
from experiments.generators.grid_results import (
    Grid,
    Job,
    Judged,
    Result,
    base_results,
    csv_line,
    gain,
    groups,
    judge,
)
from experiments.generators.plots import gains_plot
from experiments.reporting.fine_tuning import UNCLEAR
from experiments.reporting.statistics import Interval, crossed_bootstrap
from experiments.running.runs import command_line, describe_system

CLEAR = "better than the base"


def collect(jobs: Sequence[Job], out: Path, grid: Grid) -> None:
    """Write results.csv, results.md and gains.png of the runs that have finished.

    Raises:
        UserError: none has.
    """
    found = [Result(job, report) for job in jobs if (report := job.report) is not None]
    if not found:
        raise UserError("no run of this grid has finished; see the runs' logs")
    lines = [csv_line(result, grid) for result in found]
    with (out / "results.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    (out / "results.md").write_text(markdown(found, jobs, grid))
    of_what = main_judge(found, grid)
    trained: dict[str, Interval] = {}
    steered: dict[str, Interval] = {}
    for label, results in groups(found).items():
        if (judged := judge(results, grid)) is not None:
            shown = label if judged.reward == of_what else f"{label}, by {judged.reward}"
            (steered if results[0].job.steers else trained)[shown] = judged.gain
    gains_plot(out / "gains.png", trained, steered, of_what=of_what)


def main_judge(found: Sequence[Result], grid: Grid) -> str:
    """Return the reward that methods are judged by unless their row says another."""
    judged = [judge(results, grid) for results in groups(found).values()]
    used = [each.reward for each in judged if each is not None]
    return next((name for name in grid.judges if name in used), grid.gold)


def verdict(judged: Judged | None, of_what: str) -> str:
    """Return what a method's row says at its end.

    Args:
        judged: None where nothing was measured that it does not optimize.
        of_what: the reward that others are judged by.
    """
    if judged is None:
        return f"**{UNCLEAR}**"
    said = CLEAR if judged.clears else f"**{UNCLEAR}**"
    if judged.reward != of_what:
        said += f" by {without_folders(judged.reward)}"
    if judged.gold_fell:
        said += ", **but its gold fell**" if judged.clears else ", and its gold fell"
    return said


def markdown(found: Sequence[Result], jobs: Sequence[Job], grid: Grid) -> str:
    """Return the page of a grid.

    Args:
        found: its finished runs.
        jobs: all of its runs.
        grid: what it is of.
    """
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    trained = [result for result in found if not result.job.steers]
    steered = [result for result in found if result.job.steers]
    within = ", within the same budget" if any(grid.budget.values()) else ""
    lines = [f"# Methods of fine-tuning image generators{within}", ""]
    if trained:
        lines += ["## The checkpoint of the most gold", ""]
        lines += _table(trained, found, seeds, grid, _COSTS)
        ends = [Result(result.job, result.report, of_last=True) for result in trained]
        lines += ["", "## The last checkpoint", ""]
        lines += _table(ends, found, seeds, grid, _COSTS)
    if steered:
        lines += ["", "## Steering at inference: nothing is trained, and every image costs", ""]
        lines += _table(steered, found, seeds, grid, _COSTS_OF_IMAGES)
    lines += ["", *(f"- {note}" for note in notes(found, jobs, grid)), "", "![](gains.png)", ""]
    hardware = describe_system()["hardware"]
    commits = sorted({str(result.system["commit"]) for result in found})
    lines += [f"Command: `{without_folders(command_line())}`", ""]
    lines += [f"Collected on: {hardware}. Runs' commits: {', '.join(commits)}.", ""]
    return "\n".join(lines)


Costs = Mapping[str, Callable[[Result], float | None]]
_COSTS: Costs = {
    "KL": lambda result: result.compared["kl"],
    "evaluations": lambda result: result.spent("evaluations"),
    "rewards": lambda result: result.spent("rewards"),
    "minutes": lambda result: result.spent("wall_seconds") / 60,
}
_COSTS_OF_IMAGES: Costs = {
    "evaluations per image": lambda result: result.spent("evaluations"),
    "rewards per image": lambda result: result.spent("rewards"),
    "seconds per image": lambda result: result.spent("wall_seconds"),
}


def _table(
    found: Sequence[Result],
    all_found: Sequence[Result],
    seeds: Sequence[int],
    grid: Grid,
    costs: Costs,
) -> list[str]:
    """Return a table's lines: the base's values, then each method's gains over it."""
    measures = [name for name in grid.measures if any(r.by_prompt(name) is not None for r in found)]
    head = [
        "method",
        *(f"{without_folders(name)}: gain" for name in measures),
        "distance",
        "recall",
        *costs,
        "verdict",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    bases = base_results(all_found)
    values, of_what = [], main_judge(all_found, grid)
    for name in measures:
        means = [result.of_prompts(name) for result in bases]
        known = [each[0] for each in means if each is not None]
        values.append(_shown(crossed_bootstrap(known) if known else None))
    values += [
        _mean([result.report["diversity"][name][0] for result in bases])
        for name in ("distance", "recall")
    ]
    values += ["-"] * (len(costs) + 1)
    lines.append(f"| the base's values | {' | '.join(values)} |")
    for label, results in groups(found).items():
        cells = [_name(label, results, seeds, grid)]
        cells += [_shown(gain(results, name)) for name in measures]
        for name in ("distance", "recall"):
            cells.append(_mean([result.compared["diversity"][name][1] for result in results]))
        cells += [_mean([cost(result) for result in results]) for cost in costs.values()]
        cells.append(verdict(judge(results, grid), of_what))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _name(label: str, results: Sequence[Result], seeds: Sequence[int], grid: Grid) -> str:
    aside, (job, config) = [], (results[0].job, results[0].job.config)
    if config["reward"] != grid.reward:
        aside.append(f"optimizes {without_folders(config['reward'])}")
    if config["gold"] != grid.gold and not (job.steers or results[0].of_last):
        aside.append(f"chosen by {without_folders(config['gold'])}")
    known = [result.job.seed for result in results]
    if known != list(seeds):
        aside.append(f"of seed {', '.join(map(str, known))} alone")
    return f"{label} ({'; '.join(aside)})" if aside else label


def _shown(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{float(value.point):.3f} [{float(value.low):.3f}, {float(value.high):.3f}]"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = float(np.mean(known))
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"
