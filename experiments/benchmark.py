"""Run a grid of agents, tasks and seeds, evaluate every run, and collect the numbers.

    python -m experiments.benchmark --agents sgqn svea drqv2 --envs dmc/cartpole-swingup --seeds 1 2 3
    python -m experiments.benchmark --agents sgqn --seeds 1 2 3 --jobs 2 --threads 1 -- --steps 20000
    python -m experiments.benchmark --agents ppo --variant ppo-wide "ppo --clip 0.4" --envs gym/Pendulum-v1
    python -m experiments.benchmark --agents dppo fpo reinflow --base runs/toy-reach/flow-policy-seed1

Every run is a process of its own; flags after `--` go to experiments.train. The same command started again goes on:
finished runs and their evaluations are kept, interrupted ones resumed. `--out` gets results.csv (a line per run and
distraction) and results.md (means over seeds, with the command, commit and hardware behind them). `--archive DIR` also
keeps what reports need of every finished run (config, curves, evaluations, pictures of where the agent looks; it says
how much that is): a grid goes on from there when the runs themselves are gone, and `experiments.report DIR` shows it.
Agents named sb3-* are Stable-Baselines3's: they are trained by experiments.baseline.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from agents.baselines import BASELINE
from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.policy import read_config
from agents.registry import find
from envs import get_spec
from experiments import baseline, train
from experiments.benchmark_archive import (
    RESULT,
    ZERO_NOISE,
    Job,
    archive_run,
    check_results,
    collect,
    is_evaluated,
)
from experiments.compare import difference
from experiments.demo import steps_left
from experiments.evaluate import DISTRACTIONS
from experiments.running.arguments import (
    Parser,
    make_folder,
    run_command,
    split_variant,
    terminate_as_interrupt,
)
from experiments.running.configs import with_new_fields
from experiments.running.imports import add_import_flag
from experiments.running.jobs import STOPPED, run_jobs, run_logged
from experiments.running.runs import check_label
from wrappers.distraction.presets import make_distraction

DEFAULT_ENV = "dmc/cartpole-swingup"


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.benchmark", description=__doc__)
    p.add_argument("--agents", nargs="+", default=[], metavar="NAME", help="agents")
    p.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("NAME", '"AGENT FLAGS"'),
        help="an agent with flags of its own, under another name; may be given several times",
    )  # fmt: skip
    p.add_argument("--envs", nargs="+", metavar="ID", help=f"tasks [{DEFAULT_ENV}, or the base's]")
    p.add_argument(
        "--base", type=Path, metavar="RUN", help="begin every run with this one's policy"
    )
    add_import_flag(p)
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds [1 2 3]")
    p.add_argument("--preset", default="auto", help="preset of the training command [auto]")
    p.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where runs are kept")
    p.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="where results are written"
    )
    p.add_argument(
        "--archive", type=Path, metavar="DIR", help="keep what reports need of finished runs"
    )
    p.add_argument("--episodes", type=int, default=10, help="episodes per distraction [10]")
    p.add_argument(
        "--distractions", nargs="+", default=list(DISTRACTIONS), metavar="NAME",
        help=f"what to evaluate under [{' '.join(DISTRACTIONS)}]",
    )  # fmt: skip
    p.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    p.add_argument("--threads", type=int, help="CPU threads of each run [torch's own]")
    p.add_argument("--collect", action="store_true", help="only collect what is there")
    p.add_argument("train_flags", nargs="*", metavar="-- FLAGS", help="flags for experiments.train")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    terminate_as_interrupt()  # runs save and leave
    if arguments.episodes < 1 or arguments.jobs < 1:
        raise UserError("--episodes and --jobs must be at least 1")
    import_modules(arguments.imports)
    base = None if arguments.base is None else base_job(arguments)
    if arguments.envs is None:
        arguments.envs = [DEFAULT_ENV if base is None else base.env]
    jobs = grid(arguments, base)
    check_results(arguments.out, jobs)
    make_folder(arguments.out, "--out")
    if not arguments.collect:
        make_folder(arguments.runs, "--runs")
    if arguments.archive:
        make_folder(arguments.archive, "--archive")
    failed = [] if arguments.collect else run_grid(jobs, arguments)
    for folder in failed:
        print(f"failed: {folder}, see {folder}.log", file=sys.stderr)
    collect(jobs, arguments.out)
    print(f"wrote {arguments.out / 'results.md'}")
    return 1 if failed else 0


def base_job(arguments: argparse.Namespace) -> Job:
    """Return the run that the others begin with, as a job that only lacks its evaluation.

    Raises:
        UserError: it is no run, is not trained, or is of another task than asked for.
    """
    folder = arguments.base
    config = read_config(folder)
    env = config["env"]["id"]
    if arguments.envs not in (None, [env]):
        raise UserError(f"--base {folder} is of {env}; leave out --envs, or give {env} alone")
    if left := steps_left(folder):
        raise UserError(f"--base {folder} lacks {left:,} of its steps; go on with it first")
    kept = None
    if arguments.archive:
        kept = arguments.archive / env.replace("/", "-") / folder.resolve().name
    label = str(config.get("label", config["agent"]))
    return Job(label, config["agent"], env, config["train"]["seed"], folder, kept, is_base=True)


def grid(arguments: argparse.Namespace, base: Job | None = None) -> list[Job]:
    """Return the runs that the command line asks for, the base before those that begin with it.

    Raises:
        UserError: a name is unknown or given twice.
    """
    methods: dict[str, tuple[str, tuple[str, ...]]] = {
        name: (name, ()) for name in arguments.agents
    }
    for label, words in arguments.variant:
        agent, own = split_variant(label, words)
        if check_label(label) in methods:
            raise UserError(f"two methods are called '{label}'; give the variant another name")
        methods[label] = (agent, tuple(own))
    if not methods:
        raise UserError("nothing to run: give --agents, or a --variant")
    for agent, _ in methods.values():
        (baseline.check_name if agent.startswith(BASELINE) else find)(agent)
    for env in arguments.envs:
        get_spec(env)
    for distraction in arguments.distractions:
        make_distraction(distraction)
    for name in ("agents", "envs", "seeds", "distractions"):
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names one of {values} twice; once is enough")
    if base is not None and base.label in methods:
        raise UserError(f"the base is called '{base.label}', as a method; give this another name")
    jobs: list[Job] = []
    begin = () if base is None else ("--base", str(base.folder))
    for seed, env, (label, (agent, flags)) in product(
        arguments.seeds, arguments.envs, methods.items()
    ):
        place = Path(env.replace("/", "-")) / f"{label}-seed{seed}"
        kept = arguments.archive / place if arguments.archive else None
        jobs.append(Job(label, agent, env, seed, arguments.runs / place, kept, (*begin, *flags)))
    if base is None:
        return jobs
    compared = any(acts_from_zero_noise(job, arguments.train_flags) for job in jobs)
    return [replace(base, zero_noise=compared and draws_from_noise(base)), *jobs]


def acts_from_zero_noise(job: Job, flags: Sequence[str]) -> bool:
    """Return whether an agent that fine-tunes starts its chains from zeros when it is evaluated.

    Args:
        job: its run.
        flags: of all trainings; the job has its own.
    """
    if job.agent.startswith(BASELINE) or not find(job.agent).fine_tunes:
        return False
    given = vars(train.parser(job.agent).parse_args([*_method(job), *flags, *job.flags]))
    return given.get("start_noise", find(job.agent).configs[1].start_noise) == 0


def draws_from_noise(base: Job) -> bool:
    """Return whether a base draws from noise, and may as well begin with zeros."""
    if base.agent.startswith(BASELINE) or "start_noise" not in find(base.agent).acting:
        return False
    parts = read_config(base.folder)["configs"].values()
    return all(part.get("start_noise", 1.0) != 0 for part in parts)


def run_grid(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[Path]:
    """Run what is missing of a grid, and return the folders of runs that failed or were stopped."""
    imports = [f"--import={name}" for name in arguments.imports]  # the runs remember them
    flags = ["--preset", arguments.preset, *imports, *arguments.train_flags]
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    for job in jobs:
        check_same(job, flags, arguments.episodes, arguments.distractions)
    asked = arguments.episodes, arguments.distractions
    failed = run_jobs(jobs, lambda job: run_job(job, flags, threads, *asked), arguments.jobs)
    return [job.folder for job in failed]


def check_same(job: Job, flags: Sequence[str], episodes: int, distractions: Sequence[str]) -> None:
    """Refuse to take a run that is there for another one than is asked for.

    Raises:
        UserError: it was trained with other settings, or is only archived and was evaluated otherwise.
    """
    file = job.results / "config.json"
    if not file.is_file():
        return
    if not job.is_base:
        _check_training(job, flags)
    if job.results != job.archive:
        return  # it is evaluated anew where it was evaluated otherwise
    result = json.loads((job.results / "evaluations" / f"{RESULT}.json").read_text())
    if result["episodes_per_distraction"] != episodes or set(result["results"]) != set(
        distractions
    ):
        raise UserError(
            f"'{job.results}' was evaluated in {result['episodes_per_distraction']} episodes each of "
            f"{' '.join(result['results'])}; give these --episodes and --distractions, or another --archive"
        )


def _check_training(job: Job, flags: Sequence[str]) -> None:
    """Refuse a run that was trained with other settings than are asked for.

    Not compared: device and `compile`, which change rounding alone and may change with --resume, and the preset's
    name, whose values stand in the parts that are.
    """
    words = [*_method(job), *flags, *job.flags]
    is_baseline = job.agent.startswith(BASELINE)
    command = baseline if is_baseline else train
    parser = baseline.parser() if is_baseline else train.parser(job.agent)
    wanted = json.loads(json.dumps(command.new_config(vars(parser.parse_args(words)))))
    found = with_new_fields(read_config(job.results), wanted)
    for part in ("agent", "label", "env", "vector", "train", "reward", "configs"):
        if (where := difference(found.get(part), wanted.get(part), part)) is not None:
            raise UserError(
                f"'{job.results}' was trained with other settings than these ({where}); "
                "give other --runs and --archive, or the flags of that grid"
            )


def run_job(
    job: Job,
    flags: Sequence[str],
    threads: Sequence[str],
    episodes: int,
    distractions: Sequence[str],
) -> int:
    """Train (or go on), evaluate and archive one run; return the exit code of what failed, or 0.

    Args:
        job: the run; nothing is done where the archive has it, but for an evaluation that an older grid did not need.
        flags: for a new run's training.
        threads: for every training.
        episodes: of the evaluation, under each distraction; one that is there already is kept.
        distractions: what to evaluate under.
    """
    log = job.folder.parent / f"{job.folder.name}.log"
    asked = ["--episodes", str(episodes), "--distractions", *distractions]
    if job.archive and job.results == job.archive:
        kept = job.archive / "evaluations" / f"{ZERO_NOISE}.json"
        if not job.zero_noise or kept.is_file():
            return 0
        if code := _evaluated(job, ZERO_NOISE, asked, log):
            return code
        shutil.copyfile(job.folder / "evaluations" / kept.name, kept)
        return 0
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = _training(job, flags, threads)
    if command and (code := run_logged(command, log)):
        return code
    if steps_left(job.folder):
        return STOPPED
    name = f"{job.label} on {job.env}, seed {job.seed}"
    print(f"{name}: trained", flush=True)
    for evaluation in job.evaluations:
        if is_evaluated(job.folder, episodes, distractions, name=evaluation):
            print(f"{name}: evaluated already ({evaluation})", flush=True)
        elif code := _evaluated(job, evaluation, asked, log):
            return code
    if job.archive:
        size = archive_run(job.folder, job.archive)
        print(f"{name}: archived, {size / 1e3:,.0f} KB", flush=True)
    return 0


def _evaluated(job: Job, name: str, flags: Sequence[str], log: Path) -> int:
    """Evaluate a run; return the exit code."""
    acting = ["--acting", "start_noise=0"] if name == ZERO_NOISE else []
    command = [
        sys.executable, "-m", "experiments.evaluate", str(job.folder), "--name", name, "--overwrite",
        *flags, *acting,
    ]  # fmt: skip
    return run_logged(command, log)


def _training(job: Job, flags: Sequence[str], threads: Sequence[str]) -> list[str]:
    """Return the command that trains a run, or goes on with it; empty where nothing is left to train."""
    python, is_new = [sys.executable, "-m"], not (job.folder / "config.json").exists()
    if not is_new and not steps_left(job.folder):
        return []
    is_baseline = job.agent.startswith(BASELINE)
    if not is_new and not is_baseline:
        return [*python, "experiments.train", "--resume", str(job.folder), *threads]
    return [
        *python, "experiments.baseline" if is_baseline else "experiments.train",
        *_method(job), "--run-dir", str(job.folder), *flags, *job.flags, *threads,
    ]  # fmt: skip


def _method(job: Job) -> list[str]:
    """Return the flags that say what is trained."""
    label = ["--label", job.label] if job.label != job.agent else []
    return ["--agent", job.agent, *label, "--env", job.env, "--seed", str(job.seed)]


if __name__ == "__main__":
    raise SystemExit(main())
