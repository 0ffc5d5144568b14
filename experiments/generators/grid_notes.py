"""What a reader must know of a grid's tables: its budget and costs, changed settings, prompts and checkpoints, gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.core.settings import from_dict
from agents.generative_models.methods import METHODS
from agents.generative_models.tuning_config import TuningConfig
from experiments.generators.finetuning import STRICT
from experiments.generators.finetuning_configs import PRESETS
from experiments.generators.grid_archive import without_folders
from experiments.generators.grid_results import Grid, Job, Result, base_results, groups
from experiments.reporting.fine_tuning import ENOUGH_SEEDS, UNCLEAR

LEAST_DIFFERENCE = 1e-6
"""Of two means of one prompt, above which the base was drawn in another way."""
OF_MACHINES = (
    "denoising_steps guidance prompts group batch_size learning_rate average_decay checkpoint_activations"
).split()
"""Settings by which presets fit machines and bases: no note tells them of a method that says nothing of them itself."""


def notes(found: Sequence[Result], jobs: Sequence[Job], grid: Grid) -> list[str]:
    """Return what a reader must know of the tables, a line each."""
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    report = found[0].report
    said = [
        f"Base: {without_folders(grid.base)}. Seeds {', '.join(map(str, seeds))}; {report['prompts']} held-out prompts "
        f"of each, {report['images_per_prompt']} images of a prompt, the same prompts for all methods of a seed. What "
        "was trained begins with the base's noise, what steers with other.",
        "Gains are after less before of the same prompts, with 95 % percentile bootstrap intervals of seeds and of "
        f"prompts, which seeds have in common; with fewer than {ENOUGH_SEEDS} seeds they are too narrow. A row "
        f"'{UNCLEAR}' where the lower limit of its gain is not above 0: of {STRICT} where it was measured, else of the "
        f"gold reward, {without_folders(grid.gold)}, and never of what it optimizes. Its gold fell where the upper "
        "limit of its own gold reward's gain is below 0. Distance and recall are those of the images after; KL is in "
        "nats of a chain, by the monitor.",
    ]
    limits = [f"{most:,} {name}" for name, most in grid.budget.items() if most]
    if limits:
        said.append(
            f"Budget of a training: {' and '.join(limits)}; a run ends where another iteration as dear as its dearest "
            "would go over one of them, or earlier by its monitor (ended_by in results.csv). The tables say what each "
            "has spent."
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
        said.append(
            f"Over the budget, by a first iteration or one dearer than all before it: {', '.join(over)}."
        )
    said += [told_minutes(found, grid), *candidates(found)]
    if grid.left_out:
        said.append(f"Left out, for {grid.reward} has no gradient: {', '.join(grid.left_out)}.")
    missing = [job for job in jobs if all(result.job is not job for result in found)]
    if missing:
        runs = ", ".join(f"{job.label} (seed {job.seed})" for job in missing)
        said.append(f"Not finished: {runs}.")
    return [*said, *changed_settings(jobs), *other_bases(found)]


def told_minutes(found: Sequence[Result], grid: Grid) -> str:
    """Return what minutes are of."""
    threads = sorted({int(result.system["threads"]) for result in found})
    of_what = f"{' or '.join(map(str, threads))} CPU thread{'s' * (threads != [1])}"
    at_once = f", {grid.jobs} at a time" if grid.jobs else ""
    return f"Minutes include the monitor's evaluations, and are of runs with {of_what}{at_once}."


def candidates(found: Sequence[Result]) -> list[str]:
    """Return of how many checkpoints the monitor chose each method's best, and whether by prompts of their own."""
    by_count: dict[str, list[str]] = {}
    for label, results in groups(result for result in found if not result.job.steers).items():
        counts = sorted({len(result.report["history"]) for result in results})
        ends = dict.fromkeys((counts[0], counts[-1]))
        by_count.setdefault(" to ".join(map(str, ends)), []).append(label)
    if not by_count:
        return []
    told = "; ".join(f"{count}: {', '.join(labels)}" for count, labels in by_count.items())
    said = [
        f"Evaluations from which a checkpoint of the most gold was chosen, the base's too, {told}."
    ]
    if any(
        not set(result.job.config["monitored"]).isdisjoint(result.job.config["held_out"])
        for result in found
    ):
        said.append("Prompts of these tables have chosen the checkpoints, too: there are too few.")
    return said


def changed_settings(jobs: Sequence[Job]) -> list[str]:
    """Return which settings methods do not have of themselves: a preset or flags have replaced them."""
    first: dict[str, Job] = {}
    for job in jobs:
        if not job.steers:
            first.setdefault(job.label, job)
    methods: dict[str, list[str]] = {}
    for label, job in first.items():
        own, preset = METHODS[job.method], PRESETS.get(job.config["preset"], {})
        now, before = from_dict(TuningConfig, job.config["tuning"]), own.config()
        for name in now.fields_read():
            value, usual = getattr(now, name), getattr(before, name)
            if value == usual or (name in OF_MACHINES and name not in own.settings):
                continue
            whose = f"the preset {job.config['preset']}" if preset.get(name) == value else "flags"
            change = f"{name} is {_told(value)} by {whose} instead of {_told(usual)}"
            methods.setdefault(change, []).append(label)
    return [
        f"{change}: {'all that are trained' if len(labels) == len(first) > 1 else ', '.join(labels)}."
        for change, labels in methods.items()
    ]


def _told(value: Any) -> str:
    if value is None:
        return "its rule's"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


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
