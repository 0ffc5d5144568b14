"""Run a grid of agents, tasks and seeds, evaluate every run, and collect the numbers.

    python -m experiments.benchmark --agents sgqn svea drqv2 --envs dmc/cartpole-swingup --seeds 1 2 3
    python -m experiments.benchmark --agents sgqn --seeds 1 2 3 --jobs 2 --threads 1 -- --steps 20000

Every run is a process of its own; flags after `--` go to experiments.train. The same command started again goes on:
finished runs are kept, interrupted ones resumed. `--out` gets results.csv (a line per run and distraction) and
results.md (means over seeds, with the command, commit and hardware behind them).
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.core.errors import UserError
from agents.registry import find
from envs import get_spec
from experiments.arguments import Parser, run_command
from experiments.demo import steps_left
from experiments.runs import command_line, describe_system

COLUMNS = (
    "env", "agent", "seed", "distraction", "episodes", "return_mean", "return_std", "success_mean",
    "agent_steps", "env_frames", "gradient_updates", "wall_minutes", "commit", "run",
)  # fmt: skip


STOPPED = 130
"""Exit code of a run that was stopped: it has saved, and the same command goes on."""

RESULT = "benchmark"
"""Name of the evaluation that counts."""


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    agent: str
    env: str
    seed: int
    folder: Path


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.benchmark", description=__doc__)
    p.add_argument("--agents", nargs="+", required=True, metavar="NAME", help="agents")
    p.add_argument(
        "--envs", nargs="+", default=["dmc/cartpole-swingup"], metavar="ID", help="tasks"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds [1 2 3]")
    p.add_argument("--preset", default="auto", help="preset of the training command [auto]")
    p.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where runs are kept")
    p.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="where results are written"
    )
    p.add_argument("--episodes", type=int, default=10, help="episodes per distraction [10]")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    p.add_argument("--threads", type=int, help="CPU threads of each run [torch's own]")
    p.add_argument("--collect", action="store_true", help="only collect what is there")
    p.add_argument("train_flags", nargs="*", metavar="-- FLAGS", help="flags for experiments.train")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.episodes < 1 or arguments.jobs < 1:
        raise UserError("--episodes and --jobs must be at least 1")
    for name in arguments.agents:
        find(name)
    for env in arguments.envs:
        get_spec(env)
    jobs = [
        Job(agent, env, seed, arguments.runs / env.replace("/", "-") / f"{agent}-seed{seed}")
        for seed in arguments.seeds
        for env in arguments.envs
        for agent in arguments.agents
    ]
    failed = []
    if not arguments.collect:
        flags = ["--preset", arguments.preset, *arguments.train_flags]
        threads = ["--threads", str(arguments.threads)] if arguments.threads else []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            codes = pool.map(lambda job: run_job(job, flags, threads, arguments.episodes), jobs)
            try:
                failed = [job.folder for job, code in zip(jobs, codes, strict=True) if code]
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)  # the runs under way save and leave
                raise
    for folder in failed:
        print(f"failed: {folder}, see {folder}.log", file=sys.stderr)
    collect(jobs, arguments.out)
    print(f"wrote {arguments.out / 'results.md'}")
    return 1 if failed else 0


def run_job(job: Job, flags: Sequence[str], threads: Sequence[str], episodes: int) -> int:
    """Train (or go on) and evaluate one run; return the exit code of what failed, or 0."""
    python = [sys.executable, "-m"]
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.parent / f"{job.folder.name}.log"
    if not (job.folder / "config.json").exists():
        command = [
            *python, "experiments.train", "--agent", job.agent, "--env", job.env,
            "--seed", str(job.seed), "--run-dir", str(job.folder), *flags, *threads,
        ]  # fmt: skip
    elif steps_left(job.folder):
        command = [*python, "experiments.train", "--resume", str(job.folder), *threads]
    else:
        command = []
    if command and (code := _logged(command, log)):
        return code
    if steps_left(job.folder):
        return STOPPED
    print(f"{job.agent} on {job.env}, seed {job.seed}: trained", flush=True)
    evaluate = [
        *python, "experiments.evaluate", str(job.folder), "--episodes", str(episodes),
        "--name", RESULT, "--overwrite",
    ]  # fmt: skip
    return _logged(evaluate, log)


def _logged(command: Sequence[str], log: Path) -> int:
    with log.open("a") as handle:
        return subprocess.run(
            command, stdout=handle, stderr=subprocess.STDOUT, check=False
        ).returncode


def collect(jobs: Iterable[Job], out: Path) -> None:
    """Write results.csv and results.md of the runs that have an evaluation.

    Raises:
        UserError: none has.
    """
    rows = [row for job in jobs for row in _rows(job)]
    if not rows:
        raise UserError("no run of this grid was evaluated; see the runs' logs")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (out / "results.md").write_text(_markdown(rows))


def _rows(job: Job) -> list[dict[str, object]]:
    file = job.folder / "evaluations" / f"{RESULT}.json"
    if not file.is_file():
        return []
    result = json.loads(file.read_text())
    system = json.loads((job.folder / "system.json").read_text())
    with (job.folder / "metrics.csv").open() as handle:
        wall = [float(row["wall_seconds"]) for row in csv.DictReader(handle)]
    rows = []
    for name, row in {"random policy": result["random_policy"], **result["results"]}.items():
        rows.append({
            "env": job.env,
            "agent": job.agent,
            "seed": job.seed,
            "distraction": name,
            "episodes": len(row["returns"]),
            "return_mean": round(float(np.mean(row["returns"])), 2),
            "return_std": round(float(np.std(row["returns"])), 2),
            "success_mean": round(float(np.mean(row["success"])), 3) if row["success"] else "",
            "agent_steps": result["agent_steps"],
            "env_frames": result["env_frames"],
            "gradient_updates": result["gradient_updates"],
            "wall_minutes": round(max(wall, default=0.0) / 60, 1),
            "commit": system["commit"],
            "run": job.folder.name,
        })  # fmt: skip
    return rows


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
                cells.append(f"{np.mean(values):.0f} ± {np.std(values):.0f} ({each})")
            minutes = [float(str(row["wall_minutes"])) for row in mine]
            updates = "/".join(sorted({f"{row['gradient_updates']:,}" for row in mine}))
            lines.append(f"| {agent} | {updates} | {np.mean(minutes):.0f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
