"""What became of a base policy: runs that began with another run's policy, beside that run.

A row **clears the base** under a distraction where the lower limit of its interval lies above the upper limit of the
base's. Each interval is over seeds, or over episodes where there is one seed, as is usual for the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.reporting.blocks import Cell, Table, cells, count, limits, number, slug
from experiments.reporting.runs import Result, Run
from experiments.reporting.scores import CLEAN, Group, Summary
from experiments.reporting.statistics import Interval, stratified_bootstrap

UNCLEAR = "does not clear the base"
MINUTE = 60.0


def base_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run whose policy a run began with; None where it is not among `runs`.

    It is known by its folder; a copy of it, as archives hold them, by task and name of that folder.
    """
    about = run.config.get("base")
    if not isinstance(about, dict) or "run" not in about:
        return None
    place = Path(str(about["run"]))
    alike = [r for r in runs if r.env_id == run.env_id and r.path.resolve().name == place.name]
    exact = [r for r in alike if r.path.resolve() == place]
    return next(iter([*exact, *alike]), None)


def fine_tuning_table(summary: Summary, env_id: str) -> Table | None:
    """Return each base of a task with all that began with it; None without any whose base is among the runs."""
    families: dict[int, tuple[Run, list[Group]]] = {}
    for group in summary.of(env_id):
        bases = [base_of(run, summary.runs) for run in group.runs]
        first = bases[0]
        if first is not None and all(base is first for base in bases):
            families.setdefault(id(first), (first, []))[1].append(group)
    if not families:
        return None
    names = summary.distractions(env_id)
    rows: list[list[Cell]] = []
    is_success = True
    for base, groups in families.values():
        members = [[base], *(group.runs for group in groups)]
        is_success = is_success and all(
            len(result.successes) for runs in members for run in runs for result in _results(run)
        )
    for base, groups in families.values():
        before = {name: score([base], name, is_success=is_success) for name in names}
        rows.append([Cell(f"{base.agent} (base)"), *_costs([base]), *map(_cell, before.values())])
        for group in groups:
            after = {name: score(group.runs, name, is_success=is_success) for name in names}
            told = [clears(after[name], before[name]) for name in names]
            drawn = zip(after.values(), told, strict=True)
            head = Cell(group.agent, below=(count(len(group.runs), "seed"),))
            if CLEAN in names and told[names.index(CLEAN)] is False:
                head = Cell(group.agent, below=head.below, flag=UNCLEAR)
            rows.append(
                [head, *_costs(group.runs), *(_cell(value, clear) for value, clear in drawn)]
            )
    measure = "Success in percent" if is_success else "Return per episode"
    caption = (
        f"Fine-tuning on {env_id}: {measure.lower()}, with its 95 % interval over seeds (one seed: over episodes). A "
        f"row '{UNCLEAR}' where the lower limit of its interval is not above the upper limit of its base's."
    )
    head_row = ["policy", "decisions", "environment frames", "minutes", *names]
    return Table(f"fine-tuning-{slug(env_id)}", caption, head_row, rows)


def score(runs: Sequence[Run], name: str, *, is_success: bool) -> Interval | None:
    """Return the mean of some runs under a distraction with its interval; None where none was evaluated there.

    Args:
        runs: of one method.
        name: of the distraction.
        is_success: percent of episodes that succeed; otherwise returns.
    """
    evaluations = [run.evaluation.results for run in runs if run.evaluation]
    found = [results[name] for results in evaluations if name in results]
    if not found:
        return None
    values = [100 * result.successes if is_success else result.returns for result in found]
    drawn = np.array([one.mean() for one in values]) if len(values) > 1 else values[0]
    return stratified_bootstrap([drawn])


def clears(after: Interval | None, before: Interval | None) -> bool | None:
    """Return whether a score's interval lies above another's; None where one is not known."""
    if after is None or before is None:
        return None
    return bool(after.low > before.high)


def _results(run: Run) -> list[Result]:
    return list(run.evaluation.results.values()) if run.evaluation else []


def _cell(value: Interval | None, clear: bool | None = None) -> Cell:
    if value is None:
        return Cell("–")
    below = ("clears the base" if clear else UNCLEAR,) if clear is not None else ()
    scale = max(abs(float(value.point)), 10.0)
    return Cell(number(float(value.point), scale), limits(value.low, value.high, scale), below)


def _costs(runs: Sequence[Run]) -> list[Cell]:
    """Return decisions, environment frames and minutes, means over runs."""
    counters = [run.counters for run in runs if run.counters]
    if not counters:
        return cells(["–"] * 3)
    means = {name: float(np.mean([c[name] for c in counters])) for name in counters[0]}
    frames = means["env_frames"]
    steps = f"{means['agent_steps']:,.0f}" if frames else "–"  # of an imitation: gradient steps
    minutes = number(means["wall_seconds"] / MINUTE)
    return cells([steps, f"{frames:,.0f}" if frames else "–", minutes])
