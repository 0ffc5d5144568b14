"""What a grid of fine-tuning methods came to: its runs, their gains over the base with intervals, and what they cost.

A gain is of the same prompts, after less before; its interval is a percentile bootstrap of seeds and of prompts, which
seeds have in common. With fewer than about five seeds that is too narrow. A method **does not clear the base** where
the lower limit of its gain is not above 0: of the strict score of drawings, or, where prompts ask for other things, of
the gold reward; never of what it optimizes itself.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.core.errors import UserError
from agents.generative_models.rewards import parse_reward
from experiments.generators.finetuning import STRICT
from experiments.generators.grid_archive import read_archive, without_folders
from experiments.generators.report import FOLDER, read_report
from experiments.generators.steering import STEERING
from experiments.reporting.statistics import Interval, crossed_bootstrap


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
            return read_archive(self.results)[f"{FOLDER}/report.json"]
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

    def of_prompts(self, reward: str) -> tuple[dict[Hashable, float], dict[Hashable, float]] | None:
        """Return the same by the prompts' texts: what the base has, and the gain over it."""
        means = self.by_prompt(reward)
        if means is None:
            return None
        before, after = means
        prompts = self.job.config["held_out"]
        base = dict(zip(prompts, before.tolist(), strict=True))
        return base, dict(zip(prompts, (after - before).tolist(), strict=True))

    @property
    def system(self) -> dict[str, Any]:
        """What it ran on."""
        content: dict[str, Any] = json.loads((self.job.results / "system.json").read_text())
        return content

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
    jobs: int | None = None
    """Runs at a time; None where nobody knows."""

    @property
    def measures(self) -> list[str]:
        """Rewards of the tables' columns."""
        return list(dict.fromkeys((STRICT, self.reward, self.gold)))

    @property
    def judges(self) -> tuple[str, str]:
        """Rewards by which a method is judged: the first of them that was measured, and that it does not optimize."""
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
    """Return a reward's name without what a report says of it, and, as archives have it, without folders."""
    bare: str = without_folders(name.removesuffix(" (optimized)").removesuffix(" (not optimized)"))
    return bare


def csv_line(result: Result, grid: Grid) -> dict[str, Any]:
    """Return a run's line of results.csv."""
    job, report = result.job, result.report
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
        "candidates": "" if job.steers else len(report["history"]),
        "images": report["prompts"] * report["images_per_prompt"] if job.steers else "",
        "ended_by": report["made_of"].get("over") or "",
        "commit": result.system["commit"],
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
    means = [result.of_prompts(reward) for result in results]
    runs = [each[1] for each in means if each is not None]
    return crossed_bootstrap(runs) if len(runs) == len(results) else None


@dataclass(frozen=True)
class Judged:
    """What a method is judged by."""

    reward: str
    gain: Interval
    gold_fell: bool
    """Whether the upper limit of the gain of its own gold reward is below 0, as where it has hacked its reward."""

    @property
    def clears(self) -> bool:
        """Whether it is better than the base."""
        return bool(self.gain.low > 0)


def judge(results: Sequence[Result], grid: Grid) -> Judged | None:
    """Return what a method is judged by: never a part of what it optimizes itself."""
    config = results[0].job.config
    gold = gain(results, config["gold"])
    gold_fell = gold is not None and bool(gold.high < 0)
    for reward in dict.fromkeys((*grid.judges, config["gold"])):
        if not is_optimized(reward, config["reward"]) and (found := gain(results, reward)):
            return Judged(reward, found, gold_fell)
    return None


def is_optimized(reward: str, optimized: str) -> bool:
    """Whether a part of a reward is one of what is optimized."""
    return any(
        term.is_same(other) for term in parse_reward(reward) for other in parse_reward(optimized)
    )


def base_results(found: Sequence[Result]) -> list[Result]:
    """Return the run of each seed that tells what the base is: the first, and one that was trained if there is one."""
    first: dict[int, Result] = {}
    for result in sorted(found, key=lambda result: result.job.steers):
        first.setdefault(result.job.seed, result)
    return list(first.values())
