"""What a benchmark's runs came to: one archive folder for each, and the tables of all of them.

An archive holds what reports need of a finished run: config, curves and evaluations, some KB each, and the pictures of
where the agent looks, which are most of it. `results.csv` has a line for each run and distraction, `results.md` the
means over seeds with the command, commit and hardware behind them.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.policy import read_config
from experiments import evaluate
from experiments.evaluate import RANDOM
from experiments.evaluating.unfinished import MEDIA
from experiments.evaluating.videos import PROCEDURAL
from experiments.running.runs import command_line, describe_system

COLUMNS = (
    "env", "agent", "seed", "distraction", "episodes", "return_mean", "return_std", "success_mean",
    "saliency_energy", "saliency_iou", "saliency_pointing", "foreground_area",
    "agent_steps", "env_frames", "gradient_updates", "wall_minutes", "commit", "run",
)  # fmt: skip

RESULT = "benchmark"
"""Name of the evaluation that counts."""
ZERO_NOISE = f"{RESULT}-zero-noise"
"""Name of the base's evaluation from zero noise, where agents are evaluated so."""

ARCHIVED = ("config.json", "system.json", "command.txt")
ARCHIVED_TAGS = ("eval/", "train/episode_return", "time/fps")
"""What is kept of a finished run, besides its evaluations: files whole, and of metrics.csv the tags that begin so."""


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    label: str
    """What it is called: an agent's name, or a variant's."""
    agent: str
    env: str
    seed: int
    folder: Path
    archive: Path | None = None
    """Where this run is kept when it has finished."""
    flags: tuple[str, ...] = ()
    """What a variant sets."""
    is_base: bool = False
    """It is the base of the others, and trained already."""
    zero_noise: bool = False
    """It is evaluated from zero noise, too: what agents that act so are held against."""

    @property
    def results(self) -> Path:
        """The folder that holds its evaluation: the archive, once it is there."""
        return self.archive if self.archive and self.archive.is_dir() else self.folder

    @property
    def evaluations(self) -> dict[str, str]:
        """What it is evaluated as: names of evaluations, with what tables call the policy."""
        return {RESULT: self.label} | (
            {ZERO_NOISE: f"{self.label} (zero noise)"} if self.zero_noise else {}
        )


def check_results(out: Path, jobs: Sequence[Job]) -> None:
    """Refuse to replace the results of another grid.

    Args:
        out: where results are to be written.
        jobs: the runs of this grid.

    Raises:
        UserError: there are results of a run that is not among them.
    """
    file = out / "results.csv"
    if not file.is_file():
        return
    ours = {(job.env, name, str(job.seed)) for job in jobs for name in job.evaluations.values()}
    with file.open(newline="") as handle:
        theirs = {(row["env"], row["agent"], row["seed"]) for row in csv.DictReader(handle)}
    if theirs - ours:
        env, agent, seed = min(theirs - ours)
        raise UserError(
            f"'{file}' also holds {agent} on {env}, seed {seed}, which this grid does not have; give another --out"
        )


def is_evaluated(
    run: Path, episodes: int, distractions: Sequence[str], *, name: str = RESULT
) -> bool:
    """Whether a finished run has the very evaluation that a grid asks for, of its newest checkpoint."""
    file = run / "evaluations" / f"{name}.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    # A baseline's run has none: it keeps its last policy only.
    newest = CheckpointStore(run).latest()
    asked = vars(evaluate.parser().parse_args([str(run), "--episodes", str(episodes)]))
    wanted = {
        "checkpoint": newest.name if newest else found.get("checkpoint"),
        "episodes_per_distraction": episodes,
        "num_envs": min(asked["num_envs"], episodes),
        "seed": asked["seed"],
        "split": asked["split"],
        "videos": read_config(run)["env"]["videos"] or PROCEDURAL,
    }
    is_same = all(found.get(name) == value for name, value in wanted.items())
    return is_same and set(found.get("results", ())) == set(distractions)


def archive_run(run: Path, archive: Path) -> int:
    """Keep what reports need of a finished run, and return its bytes; the archive appears whole or not at all."""
    unfinished = archive.with_name(archive.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "evaluations").mkdir(parents=True)
    for name in ARCHIVED:
        shutil.copyfile(run / name, unfinished / name)
    for name in (RESULT, ZERO_NOISE):
        if (evaluation := run / "evaluations" / f"{name}.json").is_file():
            shutil.copyfile(evaluation, unfinished / "evaluations" / evaluation.name)
    with (
        (run / "metrics.csv").open(newline="") as source,
        (unfinished / "metrics.csv").open("w", newline="") as target,
    ):
        reader = csv.DictReader(source)
        writer = csv.DictWriter(target, reader.fieldnames or ())
        writer.writeheader()
        writer.writerows(row for row in reader if row["tag"].startswith(ARCHIVED_TAGS))
    overlays = sorted((run / "evaluations" / RESULT).glob(MEDIA[1].format("*")))
    for picture in overlays:
        (unfinished / "evaluations" / RESULT).mkdir(exist_ok=True)
        shutil.copyfile(picture, unfinished / "evaluations" / RESULT / picture.name)
    size = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    unfinished.rename(archive)
    return size


def collect(jobs: Iterable[Job], out: Path) -> None:
    """Write results.csv and results.md of the runs that have an evaluation.

    Raises:
        UserError: none has.
    """
    rows = [
        row
        for job in jobs
        for name, label in job.evaluations.items()
        for row in _rows(job, name, label)
    ]
    if not rows:
        raise UserError("no run of this grid was evaluated; see the runs' logs")
    with (out / "results.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (out / "results.md").write_text(_markdown(rows))


def _rows(job: Job, evaluation: str, label: str) -> list[dict[str, object]]:
    file = job.results / "evaluations" / f"{evaluation}.json"
    if not file.is_file():
        return []
    result = json.loads(file.read_text())
    system = json.loads((job.results / "system.json").read_text())
    with (job.results / "metrics.csv").open() as handle:
        wall = [float(row["wall_seconds"]) for row in csv.DictReader(handle)]
    rows = []
    for name, row in {RANDOM: result["random_policy"], **result["results"]}.items():
        rows.append({
            "env": job.env,
            "agent": label,
            "seed": job.seed,
            "distraction": name,
            "episodes": len(row["returns"]),
            "return_mean": round(float(np.mean(row["returns"])), 2),
            "return_std": round(float(np.std(row["returns"])), 2),
            "success_mean": round(float(np.mean(row["success"])), 3) if row["success"] else "",
            **_saliency_means(row.get("saliency", {})),
            "agent_steps": result["agent_steps"],
            "env_frames": result["env_frames"],
            "gradient_updates": result["gradient_updates"],
            "wall_minutes": round(max(wall, default=0.0) / 60, 1),
            "commit": system["commit"],
            "run": job.folder.name,
        })  # fmt: skip
    return rows


def _saliency_means(scores: dict[str, list[float | None]]) -> dict[str, object]:
    """Return the means over episodes, by column; empty cells where nothing was scored."""
    columns = {"energy": "saliency_energy", "iou": "saliency_iou", "pointing": "saliency_pointing",
               "area": "foreground_area"}  # fmt: skip
    means: dict[str, object] = {}
    for name, column in columns.items():
        known = [value for value in scores.get(name, []) if value is not None]
        means[column] = round(float(np.mean(known)), 4) if known else ""
    return means


def _markdown(rows: list[dict[str, object]]) -> str:
    """Return tables of the mean over seeds, with the spread over seeds and each seed's value."""
    lines = ["# Results", "", f"Command: `{command_line()}`", ""]
    hardware = describe_system()["hardware"]
    commits = sorted({str(row["commit"]) for row in rows})
    lines += [f"Collected on: {hardware}. Runs' commits: {', '.join(commits)}.", ""]
    for env in dict.fromkeys(row["env"] for row in rows):
        here = [row for row in rows if row["env"] == env]
        distractions = list(dict.fromkeys(str(row["distraction"]) for row in here))
        lines += [
            f"## {env}",
            "",
            "Mean over seeds ± standard deviation over seeds (each seed's mean).",
            "",
        ]
        lines.append(f"| agent | updates | minutes | {' | '.join(distractions)} |")
        lines.append("| --- " * (len(distractions) + 3) + "|")
        for agent in dict.fromkeys(row["agent"] for row in here):
            cells = []
            mine = [row for row in here if row["agent"] == agent]
            for distraction in distractions:
                values = [
                    float(str(row["return_mean"]))
                    for row in mine
                    if row["distraction"] == distraction
                ]
                each = ", ".join(f"{value:.0f}" for value in values)
                few = "" if len(values) == len({row["seed"] for row in mine}) else ", not all seeds"
                known = f"{np.mean(values):.0f} ± {np.std(values):.0f} ({each}{few})"
                cells.append(known if values else "-")
            minutes = [float(str(row["wall_minutes"])) for row in mine]
            updates = "/".join(sorted({f"{row['gradient_updates']:,}" for row in mine}))
            lines.append(f"| {agent} | {updates} | {np.mean(minutes):.0f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
