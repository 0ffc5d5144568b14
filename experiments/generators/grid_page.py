"""The page of a grid of fine-tuning methods: a row for each, what it gained and spent, and what a reader must know.

`results.csv` has a line for each run, `results.md` the tables, `gains.png` the gains.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.core.errors import UserError
from agents.generative_models.methods import METHODS
from experiments.generators.finetuning import STRICT
from experiments.generators.grid_archive import without_folders
from experiments.generators.grid_results import (
    Grid,
    Job,
    Result,
    base_results,
    csv_line,
    gain,
    groups,
    judge,
)
from experiments.generators.plots import gains_plot
from experiments.reporting.fine_tuning import ENOUGH_SEEDS, UNCLEAR
from experiments.reporting.statistics import Interval, nested_bootstrap
from experiments.running.runs import command_line, describe_system

CLEAR = "better than the base"
LEAST_DIFFERENCE = 1e-6
"""Of two means of one prompt, above which the base was drawn in another way."""


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
    gains = {}
    for label, results in groups(found).items():
        if (judged := judge(results, grid)) is not None:
            gains[label] = judged
    gains_plot(out / "gains.png", gains, of_what=STRICT if _has_strict(found) else grid.gold)


def _has_strict(found: Sequence[Result]) -> bool:
    return all(result.by_prompt(STRICT) is not None for result in found)


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
    lines = ["# Methods of fine-tuning image generators at equal budgets", ""]
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
    commits = sorted({str(_system(result)["commit"]) for result in found})
    lines += [f"Command: `{without_folders(command_line())}`", ""]
    lines += [f"Collected on: {hardware}. Runs' commits: {', '.join(commits)}.", ""]
    return "\n".join(lines)


def _system(result: Result) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((result.job.results / "system.json").read_text())
    return content


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
        *(f"{name}: gain" for name in measures),
        "distance",
        "recall",
        *costs,
        "verdict",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    bases = base_results(all_found)
    values = []
    for name in measures:
        means = [result.by_prompt(name) for result in bases]
        known = [each[0] for each in means if each is not None]
        values.append(_shown(nested_bootstrap(known) if known else None))
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
        judged = judge(results, grid)
        clears = judged is not None and judged.low > 0
        lines.append(f"| {' | '.join([*cells, CLEAR if clears else f'**{UNCLEAR}**'])} |")
    return lines


def _name(label: str, results: Sequence[Result], seeds: Sequence[int], grid: Grid) -> str:
    aside = []
    if (reward := results[0].job.config["reward"]) != grid.reward:
        aside.append(f"optimizes {reward}")
    known = [result.job.seed for result in results]
    if known != list(seeds):
        aside.append(f"of seed {', '.join(map(str, known))} alone")
    return f"{label} ({'; '.join(aside)})" if aside else label


def notes(found: Sequence[Result], jobs: Sequence[Job], grid: Grid) -> list[str]:
    """Return what a reader must know of the tables, a line each."""
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    report = found[0].report
    said = [
        f"Base: {without_folders(grid.base)}. Seeds {', '.join(map(str, seeds))}; {report['prompts']} held-out prompts "
        f"of each, {report['images_per_prompt']} images of a prompt, the same prompts and noise for all methods of a "
        "seed.",
        "Gains are after less before of the same prompts, with 95 % percentile bootstrap intervals of seeds and, "
        f"within each, of prompts; with fewer than {ENOUGH_SEEDS} seeds they are too narrow. A row '{UNCLEAR}' where "
        f"the lower limit of its gain is not above 0: of {STRICT} where it was measured, else of the gold reward, "
        f"{grid.gold}. Distance and recall are those of the images after; KL is in nats of a chain, by the monitor.",
    ]
    limits = [f"{most:,} {name}" for name, most in grid.budget.items() if most]
    if limits:
        said.append(
            f"Budget of a training: {' and '.join(limits)}; a run ends before the iteration that would go over one of "
            "them, or earlier by its monitor (ended_by in results.csv). Minutes include the monitor's evaluations."
        )
    else:
        said.append(
            "No budget was given: methods have spent what their iterations cost, and do not compare."
        )
    over = [
        f"{result.job.label} (seed {result.job.seed})"
        for result in found
        if not result.job.steers
        and any(most and result.spent(name) > most for name, most in grid.budget.items())
    ]
    if over:
        said.append(f"Over the budget, by their first iteration: {', '.join(over)}.")
    if grid.left_out:
        said.append(f"Left out, for {grid.reward} has no gradient: {', '.join(grid.left_out)}.")
    missing = [job for job in jobs if all(result.job is not job for result in found)]
    if missing:
        runs = ", ".join(f"{job.label} (seed {job.seed})" for job in missing)
        said.append(f"Not finished: {runs}.")
    return [*said, *changed_settings(jobs), *other_bases(found)]


def changed_settings(jobs: Sequence[Job]) -> list[str]:
    """Return which of its own settings a method does not have here: flags, or the preset debug, have replaced them."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.label, job)
    said = []
    for label, job in first.items():
        own = {} if job.steers else METHODS[job.method].settings
        now = job.config["tuning"]
        changed = [
            f"{n} {now[n]} instead of {value}" for n, value in own.items() if now[n] != value
        ]
        if changed:
            said.append(f"{label} has not all settings of its own: {', '.join(changed)}.")
    return said


def other_bases(found: Sequence[Result]) -> list[str]:
    """Return which methods draw the base in another way than its row in the tables."""
    bases = {result.job.seed: result for result in base_results(found)}
    differ: dict[str, None] = {}
    for result in found:
        base = bases[result.job.seed]
        for row in base.report["rewards"]:
            ours, theirs = (each.by_prompt(row["name"]) for each in (result, base))
            if ours is not None and theirs is not None and _differ(ours[0], theirs[0]):
                differ[result.job.label] = None
    if not differ:
        return []
    return [
        "Against the base as they draw it (another rule of steps, or guidance), not as its row has it: "
        f"{', '.join(differ)}."
    ]


def _differ(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return not np.allclose(ours, theirs, rtol=0, atol=LEAST_DIFFERENCE)


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
