"""What became of a base policy: runs that began with another run's policy, beside that run.

A row **clears the base** under a distraction where the lower limit of its interval lies above the upper limit of the
base's. An agent that acts from zero noise when it is evaluated (FPO++, Gaussian PPO) is held against the base from zero
noise: what it began with, which may be better than the base as it draws.

An interval is a percentile bootstrap of seeds and, within each, of its episodes; of one seed, as is usual for the base,
of its episodes alone. A bootstrap of few seeds is too narrow: means of three seeds have no more than ten different
resamples, and lie on one side of the truth in one case of four.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.registry import AGENTS
from experiments.reporting.blocks import Cell, Table, cells, count, limits, number, slug
from experiments.reporting.runs import Evaluation, Run
from experiments.reporting.scores import CLEAN, Summary
from experiments.reporting.statistics import Interval, nested_bootstrap

UNCLEAR = "does not clear the base"
MINUTE = 60.0
ENOUGH_SEEDS = 5
"""Below these, a bootstrap over seeds is too narrow."""


@dataclass(frozen=True)
class Row:
    """One policy, or all runs of one agent that began with it."""

    name: str
    """What it is called."""
    runs: list[Run]
    scores: Mapping[str, Interval | None]
    """By distraction."""
    bar: Row | None = None
    """What it is to clear; None for bases."""

    def clears(self, name: str) -> bool | None:
        """Return whether it clears its bar under a distraction; None where one of both is not known."""
        return clears(self.scores[name], self.bar.scores[name]) if self.bar else None


@dataclass(frozen=True)
class Families:
    """The bases of a task, each with all that began with it."""

    rows: list[list[Row]]
    is_success: bool
    """Scores are percent of episodes that succeed; otherwise returns."""
    notes: tuple[str, ...]
    """What a reader must know of them."""


def base_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run whose policy a run began with; None where it is not among `runs`.

    It is known by task, folder name and, where its evaluation tells, the digest of its weights. Where an older one does
    not, it is the folder itself, or else its copy beside the run, as archives hold them, or else the only copy.
    """
    about = run.config.get("base")
    if not isinstance(about, dict) or "run" not in about:
        return None
    place = Path(str(about["run"]))
    alike = [r for r in runs if r.env_id == run.env_id and r.path.resolve().name == place.name]
    exact = [r for r in alike if r.path.resolve() == place]
    same = [r for r in (*exact, *alike) if about.get("digest") in weights_of(r)]
    if same:
        return same[0]
    untold = [r for r in alike if not weights_of(r)]
    exact = [r for r in untold if r in exact]
    beside = [r for r in untold if r.path.resolve().parent == run.path.resolve().parent]
    found = exact or beside or untold
    return found[0] if len(found) == 1 else None


def weights_of(run: Run) -> tuple[str, ...]:
    """Return the digests of what a run was evaluated as; none where its evaluation does not tell."""
    return run.evaluation.weights if run.evaluation else ()


def families(summary: Summary, env_id: str) -> Families | None:
    """Return the bases of a task with all that began with them; None without any that is among the runs."""
    members: dict[int, tuple[Run, list[tuple[str, list[Run]]]]] = {}
    for group in summary.of(env_id):
        bases = [base_of(run, summary.runs) for run in group.runs]
        first = bases[0]
        if first is not None and all(base is first for base in bases):
            members.setdefault(id(first), (first, []))[1].append((group.agent, group.runs))
    notes = [
        f"Left out: what began with runs called {base.path.name}, for their weights differ, and none of them tells "
        "which are its own: evaluate the base anew."
        for base, groups in members.values()
        if _is_disputed(base, groups)
    ]
    known = [(base, groups) for base, groups in members.values() if not _is_disputed(base, groups)]
    if not known:
        return None
    names = summary.distractions(env_id)
    evaluations = [
        evaluation
        for base, groups in known
        for run in (base, *(run for _, runs in groups for run in runs))
        for evaluation in (run.evaluation, run.zero_noise)
        if evaluation
    ]
    is_success = all(
        len(result.successes) for one in evaluations for result in one.results.values()
    )

    def scored(*found: Evaluation | None) -> dict[str, Interval | None]:
        return {name: score(found, name, is_success=is_success) for name in names}

    rows = []
    for base, groups in known:
        before = Row(f"{base.agent} (base)", [base], scored(base.evaluation))
        family, without = [before], None
        if base.zero_noise:
            without = Row(f"{base.agent} (base, zero noise)", [base], scored(base.zero_noise))
            family.append(without)
        for agent, runs in groups:
            needs = all(map(acts_from_zero_noise, runs)) and not acts_from_zero_noise(base)
            if needs and without is None:
                notes.append(
                    f"{agent} acts from zero noise and its base was not evaluated so: it is held against the base as "
                    "it draws."
                )
            bar = without if needs and without is not None else before
            family.append(Row(agent, runs, scored(*(run.evaluation for run in runs)), bar))
        rows.append(family)
    return Families(rows, is_success, tuple(notes))


def acts_from_zero_noise(run: Run) -> bool:
    """Return whether a run's policy starts its chains from zeros when it is evaluated."""
    parts = run.config.get("configs", {}).values()
    return any(isinstance(part, dict) and part.get("start_noise") == 0 for part in parts)


def _is_disputed(base: Run, groups: Sequence[tuple[str, Sequence[Run]]]) -> bool:
    """Return whether runs began with different weights, and a base does not tell which are its own.

    Agents that need a base keep a digest of all that it is, others one of its policy alone: only those of one kind are
    to be the same.
    """
    if weights_of(base):
        return False
    found: dict[bool, dict[str, None]] = {}
    for _, runs in groups:
        for run in runs:
            spec = AGENTS.get(str(run.config.get("agent")))
            kind = found.setdefault(spec is not None and spec.needs_base, {})
            kind[str(run.config["base"].get("digest"))] = None
    return any(len(digests) > 1 for digests in found.values())


def fine_tuning_table(summary: Summary, env_id: str) -> Table | None:
    """Return each base of a task with all that began with it; None without any whose base is among the runs."""
    found = families(summary, env_id)
    if found is None:
        return None
    names = summary.distractions(env_id)
    rows = []
    for row in (row for family in found.rows for row in family):
        head = Cell(row.name)
        if row.bar:
            flag = UNCLEAR if CLEAN in names and row.clears(CLEAN) is False else ""
            head = Cell(row.name, below=(count(len(row.runs), "seed"),), flag=flag)
        drawn = [_cell(row.scores[name], row.clears(name), row.bar) for name in names]
        rows.append([head, *_costs(row.runs), *drawn])
    measure = "success in percent" if found.is_success else "return per episode"
    caption = (
        f"Fine-tuning on {env_id}: {measure}, with a 95 % percentile bootstrap interval of seeds and, within each, of "
        "its episodes (of one seed: of its episodes alone, which says nothing of other seeds). With fewer than "
        f"{ENOUGH_SEEDS} seeds it is too narrow. A row '{UNCLEAR}' where the lower limit of its interval is not above "
        "the upper limit of its base's, from zero noise for an agent that acts so. A decision is of as many actions as "
        "stand beside it; environment frames compare."
    )
    head_row = ["policy", "decisions", "environment frames", "minutes", *names]
    return Table(f"fine-tuning-{slug(env_id)}", caption, head_row, rows, notes=found.notes)


def fine_tuning_rows(summary: Summary) -> Iterable[Mapping[str, object]]:
    """Return a line per task, policy and distraction, for a CSV file."""
    for env_id in summary.env_ids:
        found = families(summary, env_id)
        if found is None:
            continue
        for row in (row for family in found.rows for row in family):
            seeds = len(row.runs)
            for name, value in row.scores.items():
                if value is None:
                    continue
                yield {
                    "env": env_id,
                    "policy": row.name,
                    "base": row.bar.name if row.bar else None,
                    "distraction": name,
                    "measure": "success_percent" if found.is_success else "return",
                    "mean": float(value.point),
                    "low_95": float(value.low),
                    "high_95": float(value.high),
                    "seeds": seeds,
                    "interval_of": "seeds and their episodes" if seeds > 1 else "episodes",
                    "too_narrow": seeds < ENOUGH_SEEDS,
                    "clears_base": row.clears(name),
                }


def score(
    evaluations: Sequence[Evaluation | None], name: str, *, is_success: bool
) -> Interval | None:
    """Return the mean of some runs under a distraction with its interval; None where none was evaluated there.

    Args:
        evaluations: of runs of one method.
        name: of the distraction.
        is_success: percent of episodes that succeed; otherwise returns.
    """
    found = [one.results[name] for one in evaluations if one and name in one.results]
    if not found:
        return None
    return nested_bootstrap(
        [100 * result.successes if is_success else result.returns for result in found]
    )


def clears(after: Interval | None, before: Interval | None) -> bool | None:
    """Return whether a score's interval lies above another's; None where one is not known."""
    if after is None or before is None:
        return None
    return bool(after.low > before.high)


def _cell(value: Interval | None, clear: bool | None, bar: Row | None) -> Cell:
    if value is None:
        return Cell("–")
    told = "clears the base" if clear else UNCLEAR
    below = (told,) if bar is not None and clear is not None else ()
    scale = max(abs(float(value.point)), 10.0)
    return Cell(number(float(value.point), scale), limits(value.low, value.high, scale), below)


def _costs(runs: Sequence[Run]) -> list[Cell]:
    """Return decisions with the actions in each, environment frames and minutes, means over runs."""
    counters = [run.counters for run in runs if run.counters]
    if not counters:
        return cells(["–"] * 3)
    means = {name: float(np.mean([c[name] for c in counters])) for name in counters[0]}
    frames = means["env_frames"]
    minutes = Cell(number(means["wall_seconds"] / MINUTE))
    if not frames:  # an imitation: its steps are gradient steps
        return [Cell("–"), Cell("–"), minutes]
    chunks = dict.fromkeys(int(run.config["env"].get("action_chunk", 1)) for run in runs)
    aside = f"of {' or '.join(map(str, chunks))} {'action' if list(chunks) == [1] else 'actions'}"
    return [Cell(f"{means['agent_steps']:,.0f}", aside), Cell(f"{frames:,.0f}"), minutes]
