"""What a grid of fine-tuning methods came to: its runs, their gains over the base with intervals, and what they cost.

A gain is of the same
prompts, after less before; its interval is a percentile bootstrap of seeds and, within each, of prompts. With fewer
than about five seeds that is too narrow. A method **does not clear the base** where the lower limit of its gain is not
above 0: of the strict score of drawings, or, where prompts ask for other things, of the gold reward.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.core.errors import UserError
from experiments.generators.finetuning import STRICT
from experiments.generators.report import FOLDER, read_report
from experiments.generators.steering import STEERING
from experiments.reporting.statistics import Interval, nested_bootstrap


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    label: str
    """What it is called: a method's name, or a variant's."""
    method: str
    seed: int
    folder: Path
    archive: Path | None
    """Where this run is kept when it has finished."""
    words: tuple[str, ...]
    """Flags of `experiments.finetune_generator` for a new run."""
    config: Mapping[str, Any]
    """config.json's content as these flags would have it."""

    @property
    def steers(self) -> bool:
        """Whether it trains nothing."""
        return self.method in STEERING

    @property
    def results(self) -> Path:
        """The folder that holds its report: the archive, once it is there."""
        return self.archive if self.archive and self.archive.is_dir() else self.folder

    @property
    def is_archived(self) -> bool:
        """Whether the archive has it."""
        return self.results == self.archive

    @property
    def report(self) -> dict[str, Any] | None:
        """The content of its report.json; None where it has not finished."""
        if self.is_archived:
            found: dict[str, Any] = json.loads((self.results / FOLDER / "report.json").read_text())
            return found
        return read_report(self.folder)


@dataclass(frozen=True)
class Result:
    """A finished run with one of its checkpoints against the base."""

    job: Job
    report: Mapping[str, Any]
    of_last: bool = False
    """The last checkpoint, not the one of the most gold."""

    @property
    def compared(self) -> Mapping[str, Any]:
        """What the report says of that checkpoint."""
        last = self.report.get("last") if self.of_last else None
        return last or self.report

    def by_prompt(self, reward: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a reward's means of each prompt, before and after; None where it was not measured."""
        for row in self.compared["rewards"]:
            if _plain(row["name"]) == _plain(reward):
                means = row["by_prompt"]
                return np.array(means["before"]), np.array(means["after"])
        return None

    def spent(self, name: str) -> float:
        """Return what it spent; of steering, for each image."""
        total = float(self.report["spent"][name])
        if not self.job.steers:
            return total
        return total / (self.report["prompts"] * self.report["images_per_prompt"])


@dataclass(frozen=True)
class Grid:
    """What the tables of a grid say beside its numbers."""

    reward: str
    gold: str
    base: str
    budget: Mapping[str, int]
    """evaluations and rewards that a training may spend; 0 for no end."""
    left_out: Sequence[str] = ()
    """Methods that cannot climb the reward."""

    @property
    def measures(self) -> list[str]:
        """Rewards of the tables' columns; the first that a run has is what it is judged by."""
        return list(dict.fromkeys((STRICT, self.reward, self.gold)))

    @property
    def judges(self) -> tuple[str, str]:
        """Rewards by which a method is judged: the first of them that was measured."""
        return STRICT, self.gold


def check_results(out: Path, jobs: Sequence[Job]) -> None:
    """Refuse to replace the results of another grid.

    Raises:
        UserError: there are results of a run that is not among `jobs`.
    """
    file = out / "results.csv"
    if not file.is_file():
        return
    ours = {(job.label, str(job.seed)) for job in jobs}
    with file.open(newline="") as handle:
        theirs = [(row.get("method"), row.get("seed")) for row in csv.DictReader(handle)]
    for method, seed in theirs:
        if (method, seed) not in ours:
            raise UserError(
                f"'{file}' also holds {method}, seed {seed}, which this grid does not have; give another --out"
            )


def _plain(name: str) -> str:
    """Return a reward's name without what a report says of it."""
    return name.removesuffix(" (optimized)").removesuffix(" (not optimized)")


def csv_line(result: Result, grid: Grid) -> dict[str, Any]:
    """Return a run's line of results.csv."""
    job, report = result.job, result.report
    system = json.loads((job.results / "system.json").read_text())
    line: dict[str, Any] = {
        "method": job.label, "of": job.method, "seed": job.seed, "optimized": job.config["reward"],
    }  # fmt: skip
    for prefix, each in (("", result), ("last_", Result(job, report, of_last=True))):
        line[f"{prefix}iteration"] = _cell(each.compared["step"])
        for name in grid.measures:
            means = each.by_prompt(name)
            if not prefix:
                line[f"{name}_before"] = _cell(None if means is None else means[0].mean())
            line[f"{prefix}{name}_gain"] = _cell(
                None if means is None else (means[1] - means[0]).mean()
            )
        for name in ("distance", "recall"):
            before, after = each.compared["diversity"][name]
            if not prefix:
                line[f"{name}_before"] = _cell(before)
            line[f"{prefix}{name}"] = _cell(after)
        line[f"{prefix}kl"] = _cell(each.compared["kl"])
    return line | {
        "evaluations": report["spent"]["evaluations"],
        "rewards": report["spent"]["rewards"],
        "minutes": round(report["spent"]["wall_seconds"] / 60, 2),
        "images": report["prompts"] * report["images_per_prompt"] if job.steers else "",
        "ended_by": report["made_of"].get("over") or "",
        "commit": system["commit"],
        "run": job.folder.name,
    }


def _cell(value: float | None) -> float | str:
    return "" if value is None else round(float(value), 5)


def groups(found: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the runs of each method, in order."""
    result: dict[str, list[Result]] = {}
    for each in found:
        result.setdefault(each.job.label, []).append(each)
    return result


def gain(results: Sequence[Result], reward: str) -> Interval | None:
    """Return the mean gain of a method's runs with its interval; None where one of them did not measure it."""
    means = [result.by_prompt(reward) for result in results]
    runs = [each[1] - each[0] for each in means if each is not None]
    return nested_bootstrap(runs) if len(runs) == len(results) else None


def judge(results: Sequence[Result], grid: Grid) -> Interval | None:
    """Return the gain that a method is judged by."""
    found = (gain(results, reward) for reward in grid.judges)
    return next((each for each in found if each is not None), None)


def base_results(found: Sequence[Result]) -> list[Result]:
    """Return the run of each seed that tells what the base is: the first, and one that was trained if there is one."""
    first: dict[int, Result] = {}
    for result in sorted(found, key=lambda result: result.job.steers):
        first.setdefault(result.job.seed, result)
    return list(first.values())
