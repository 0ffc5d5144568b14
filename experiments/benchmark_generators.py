"""Fine-tune an image generator by every method, within the same budget and over seeds, and collect what each gained.

    python -m experiments.benchmark_generators --base RUN --preset demo --max-evaluations 200000 --max-rewards 20000
    python -m experiments.benchmark_generators --base RUN --methods flow-grpo ddpo best-of-n --seeds 1 2 3 --jobs 2 \
        --threads 1 --max-rewards 20000 -- --eval-every 20
    python -m experiments.benchmark_generators --base RUN --methods flow-grpo --variant alignprop-classifier \
        "alignprop --reward classifier --gold shapes"

Every run is a process of experiments.finetune_generator; flags after `--` go to all of them, those of training not to
fk-steering, reno and best-of-n, which train nothing. The same command started again goes on: finished runs are kept,
interrupted ones resumed. All settings are checked before the first run starts. Prompts (trained on, monitored and
reported) are the same for all methods of a seed, and what is trained is evaluated from the same noise. Where a budget
is given, the monitor evaluates after every eighth of the iterations that it has room for at most, unless --eval-every
says otherwise.

`--out` gets results.csv (a line per run), results.md (a row per method: gains over the base with intervals, diversity,
KL, and what each spent) and gains.png; --collect, with the flags of the grid, writes them of what is there. `--archive
DIR` keeps what these need of finished runs, without weights: the grid goes on from there when the runs themselves are
gone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.generative_models.methods import METHODS
from agents.generative_models.rewards import make_reward
from agents.generative_models.tuning_config import TuningConfig
from agents.generative_models.tuning_loop import TuningSettings
from experiments import finetune_generator
from experiments.generators.finetuning_configs import (
    DEFAULT_REWARD,
    OF_IMAGES,
    default_gold,
    flag,
    names,
    new_config,
)
from experiments.generators.grid_archive import archive_run
from experiments.generators.grid_checks import (
    check_comparable,
    check_same,
    find_base,
    needs_gradient,
    try_out,
)
from experiments.generators.grid_page import collect
from experiments.generators.grid_results import Grid, Job, check_results
from experiments.generators.report import read_report
from experiments.generators.steering import STEERING
from experiments.running.arguments import (
    Parser,
    make_folder,
    run_command,
    split_variant,
    terminate_as_interrupt,
)
from experiments.running.imports import add_import_flag
from experiments.running.jobs import STOPPED, run_jobs, run_logged
from experiments.running.runs import abandon_run, check_label, lock_run

OF_GRID = (
    "--base", "--method", "--seed", "--preset", "--threads", "--run-dir", "--resume", "--import", "--max-evaluations",
    "--max-rewards",
)  # fmt: skip
"""Flags that are the grid's own and not a run's."""
OF_VARIANTS = ("--reward", "--gold")
"""Those that a variant may have, but not all runs."""
EVALUATIONS = 8
"""Of a run within a budget, beside the base's, where the budget's bound on images ends it."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.benchmark_generators", description=__doc__)
    p.add_argument("--base", type=Path, required=True, metavar="RUN|FOLDER|NAME",
                   help="the generator, as of finetune_generator")  # fmt: skip
    p.add_argument("--methods", nargs="*", metavar="NAME",
                   help="methods; without names, variants alone [all that can climb the reward]")  # fmt: skip
    p.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("NAME", '"METHOD FLAGS"'),
        help="a method with flags of its own, under another name; may be given several times",
    )  # fmt: skip
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds [1 2 3]")
    p.add_argument("--reward", default=DEFAULT_REWARD, metavar="NAME",
                   help=f"what is optimized [{DEFAULT_REWARD}]")  # fmt: skip
    p.add_argument("--gold", metavar="NAME", help="what is measured and not optimized "
                   "[as of finetune_generator]")  # fmt: skip
    p.add_argument("--max-evaluations", type=int, default=0, metavar="N",
                   help="samples through the denoiser that a training may spend; 0 for no end [0]")  # fmt: skip
    p.add_argument("--max-rewards", type=int, default=0, metavar="N",
                   help="images that its reward may see; 0 for no end [0]")  # fmt: skip
    add_import_flag(p)
    p.add_argument("--preset", default="auto", help="preset of finetune_generator [auto]")
    folder = Path("runs/benchmark-generators")
    p.add_argument("--runs", type=Path, default=folder, help=f"where runs are kept [{folder}]")
    p.add_argument("--out", type=Path, default=folder, help=f"where results are written [{folder}]")
    p.add_argument(
        "--archive", type=Path, metavar="DIR", help="keep what results need of finished runs"
    )
    p.add_argument("--jobs", type=int, help="runs at a time [1]")
    p.add_argument("--threads", type=int, help="CPU threads of each run [torch's own]")
    p.add_argument("--collect", action="store_true", help="only collect what is there")
    p.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags for finetune_generator")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    terminate_as_interrupt()  # runs save and leave
    if any(each is not None and each < 1 for each in (arguments.jobs, arguments.threads)):
        raise UserError("--jobs and --threads must be at least 1")
    import_modules(arguments.imports)
    methods, left_out = choose_methods(arguments)
    jobs = grid(arguments, methods)
    check_results(arguments.out, jobs)
    base = find_base(jobs) if arguments.collect else try_out(jobs)
    for job in jobs:
        check_same(job, base)
    make_folder(arguments.out, "--out")
    if arguments.archive:
        make_folder(arguments.archive, "--archive")
    failed = [] if arguments.collect else run_grid(jobs, arguments)
    for job in failed:
        print(f"failed: {job.folder}, see {job.folder}.log", file=sys.stderr)
    about = Grid(
        reward=arguments.reward,
        gold=arguments.gold or default_gold(arguments.reward),
        base=str(arguments.base),
        budget={"evaluations": arguments.max_evaluations, "rewards": arguments.max_rewards},
        left_out=left_out,
        # Who only collects need not know how runs were made.
        jobs=arguments.jobs if arguments.collect else arguments.jobs or 1,
    )
    collect(jobs, arguments.out, about)
    print(f"wrote {arguments.out / 'results.md'}")
    return 1 if failed else 0


# ---------------------------------------------------------------------------------- which runs


def choose_methods(
    arguments: argparse.Namespace,
) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """Return methods with their own flags by what they are called, and those left out.

    Raises:
        UserError: a name is unknown or there twice.
    """
    chosen, left_out = arguments.methods, []
    if chosen is None:
        known = [*METHODS, *STEERING]
        climbs = getattr(make_reward(arguments.reward), "differentiable", True)
        climbers = [name for name in known if needs_gradient(name, objective_of(name))]
        left_out = [] if climbs else climbers
        chosen = [name for name in known if name not in left_out]
        if left_out:
            print(f"left out, for {arguments.reward} has no gradient: {', '.join(left_out)}")
    for name in ("methods", "seeds"):
        values = getattr(arguments, name) or []
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names one of {values} twice; once is enough")
    methods: dict[str, tuple[str, list[str]]] = {name: (name, []) for name in chosen}
    for label, words in arguments.variant:
        method, own = split_variant(label, words)
        if check_label(label) in methods:
            raise UserError(f"two methods are called '{label}'; give the variant another name")
        methods[label] = (method, own)
    if not methods:
        raise UserError("nothing to run: give names behind --methods, or a --variant")
    for method, _ in methods.values():
        if method not in METHODS and method not in STEERING:
            raise UserError.unknown("method", method, [*METHODS, *STEERING])
    return methods, left_out


def objective_of(method: str) -> str:
    """Return a method's own objective; steering's says nothing."""
    return METHODS[method].config().objective if method in METHODS else TuningConfig().objective


def grid(
    arguments: argparse.Namespace, methods: Mapping[str, tuple[str, Sequence[str]]]
) -> list[Job]:
    """Return the runs that the command line asks for, all methods of a seed before the next seed.

    Raises:
        UserError: a flag is wrong for one of them, or methods of a seed would not compare.
    """
    jobs: list[Job] = []
    refuse_flags(arguments, arguments.flags, OF_VARIANTS)
    for seed, (label, (method, own)) in product(arguments.seeds, methods.items()):
        common = for_steering(arguments.flags) if method in STEERING else arguments.flags
        words = ["--base", str(arguments.base), "--method", method, "--seed", str(seed)]
        words += ["--reward", arguments.reward, "--preset", arguments.preset]
        words += ["--gold", arguments.gold] if arguments.gold else []
        words += [f"--import={name}" for name in arguments.imports]
        try:
            refuse_flags(arguments, own)
            if method in METHODS:
                words += budget(arguments, [*words, *common, *own])
            words += [*common, *own]
            config = config_of(words)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        name = f"{label}-seed{seed}"
        archive = arguments.archive / name if arguments.archive else None
        job = Job(label, method, seed, arguments.runs / name, archive, tuple(words), config)
        first = next((each for each in jobs if each.seed == seed), job)
        check_comparable(job, first)
        jobs.append(job)
    return jobs


def refuse_flags(
    arguments: argparse.Namespace, words: Sequence[str], more: Sequence[str] = ()
) -> None:
    """Refuse flags of runs that are the grid's.

    Args:
        arguments: of the grid; a budget says how many iterations a run has.
        words: flags of runs.
        more: flags to refuse beside `OF_GRID`.

    Raises:
        UserError: names the first of them.
    """
    has_budget = arguments.max_evaluations or arguments.max_rewards
    for name in (word.split("=")[0] for word in words):
        if name in (*OF_GRID, *more):
            raise UserError(f"{name} is the grid's; give it before `--`")
        if name == "--steps" and has_budget:
            raise UserError("--steps would end runs before the budget does; leave out one of them")


def config_of(words: Sequence[str]) -> dict[str, Any]:
    """Return config.json's content of a run with these flags."""
    method = words[words.index("--method") + 1]
    given = vars(finetune_generator.parser(method).parse_args(words))
    config: dict[str, Any] = new_config(method, given)
    return config


def for_steering(flags: Sequence[str]) -> list[str]:
    """Return flags without those of training, with their values."""
    own = [*names(TuningConfig), *names(TuningSettings)]
    training = {flag(name) for name in own if name not in OF_IMAGES}
    training |= {f"--no-{name[2:]}" for name in training} | {"--compile"}
    kept, keeps = [], True
    for word in flags:
        if word.startswith("--"):
            keeps = word.split("=")[0] not in training
        if keeps:
            kept.append(word)
    return kept


def budget(arguments: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Return flags that let the budget end a training: so many iterations that it cannot have them all.

    Raises:
        UserError: a single iteration is over it.
    """
    limits = {"evaluations": arguments.max_evaluations, "rewards": arguments.max_rewards}
    given = {name: most for name, most in limits.items() if most}
    if not given:
        return []
    tuning = config_of(words)["tuning"]
    # An image takes an evaluation and a reward at least.
    images = tuning["prompts"] * tuning["group"]
    name, least = min(given.items(), key=lambda item: item[1])
    if least < images:
        raise UserError(
            f"an iteration draws {images} images, which is over --max-{name} {least}; give more, or fewer --prompts"
        )
    limit_flags = [word for name, most in given.items() for word in (f"--max-{name}", str(most))]
    steps = least // images
    limit_flags += ["--steps", str(steps)]
    if all(word.split("=")[0] != "--eval-every" for word in words):
        limit_flags += ["--eval-every", str(max(1, steps // EVALUATIONS))]
    return limit_flags


# ----------------------------------------------------------------------------------- run them


def run_grid(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[Job]:
    """Run what is missing of a grid, and return the runs that failed or were stopped."""
    make_folder(arguments.runs, "--runs")
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    imports = [f"--import={name}" for name in arguments.imports]
    first = arguments.seeds[0]

    def run(job: Job) -> int:
        return run_job(job, threads, imports, with_sheets=job.seed == first)

    return run_jobs(jobs, run, arguments.jobs or 1)


def run_job(
    job: Job, threads: Sequence[str], imports: Sequence[str], *, with_sheets: bool = False
) -> int:
    """Make or go on with one run, and archive it; return the exit code of what failed, or 0.

    Args:
        job: the run; nothing is done where the archive has it.
        threads: flag, of every start.
        imports: flags, of a start that goes on; those of a new run are among its own.
        with_sheets: archive images before and after, too.
    """
    if job.is_archived:
        return 0
    name = f"{job.label}, seed {job.seed}"
    if read_report(job.folder) is None:
        command = [sys.executable, "-m", finetune_generator.COMMAND]
        if job.steers and (job.folder / "config.json").exists():
            with lock_run(job.folder):  # what was killed in the middle has nothing to go on from
                abandon_run(job.folder, is_new=True)
        if (job.folder / "config.json").exists():
            command += ["--resume", str(job.folder), *imports, *threads]
        else:
            command += [*job.words, "--run-dir", str(job.folder), *threads]
        if code := run_logged(command, job.folder.with_name(f"{job.folder.name}.log")):
            return code
        if read_report(job.folder) is None:
            return STOPPED
        print(f"{name}: finished", flush=True)
    if job.archive:
        size = archive_run(job.folder, job.archive, with_sheets=with_sheets)
        print(f"{name}: archived, {size / 1e3:,.0f} KB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
