"""The whole way, in one command: train SGQN on cartpole-swingup from pixels, then meet unseen colors and videos.

    python -m experiments.demo

Trains with the CPU preset (about a quarter of an hour on two cores), evaluates clean, color_hard, video_easy and
video_hard, and writes a report. Stopped in between, the same command goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.baselines import BASELINE, MODEL
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.policy import read_config
from experiments import train
from experiments.evaluate import evaluate_run
from experiments.report import build_report
from experiments.running.arguments import Parser, run_command, terminate_as_interrupt
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.settings import read_loop

RESULT = "demo"
"""Name of the evaluation."""

DEFAULTS = {
    "agent": ("sgqn", "agent"),
    "env": ("dmc/cartpole-swingup", "task"),
    "preset": ("cpu", "preset of the training command"),
    "seed": (1, "seed of everything"),
}
"""What a new run is trained with: value and meaning by flag."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.demo", description=__doc__)
    p.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="run folder [runs/demo]")
    for name, (value, meaning) in DEFAULTS.items():
        p.add_argument(f"--{name}", type=type(value), help=f"{meaning} [{value}]")
    add_import_flag(p)
    p.add_argument("--episodes", type=int, default=10, help="episodes per distraction [10]")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.episodes < 1:
        raise UserError(f"--episodes is {arguments.episodes}; give at least 1")
    imports = [f"--import={name}" for name in arguments.imports]
    run = arguments.run_dir
    given = {name: getattr(arguments, name) for name in DEFAULTS}
    is_new = not (run / "config.json").exists()
    if not is_new:
        check_same(run, given)
        import_for_run(read_config(run), arguments.imports, folder=run)
    if is_new:
        flags = [
            word
            for name, (value, _) in DEFAULTS.items()
            for word in (f"--{name}", str(value if given[name] is None else given[name]))
        ]
        code = train.main([*flags, *imports, "--run-dir", str(run)])
    elif steps_left(run):
        print(f"going on with {run}")
        code = train.main(["--resume", str(run), *imports])
    else:
        print(f"{run} is trained already; remove it to train anew")
        code = 0
    if code:
        return code
    if steps_left(run):
        print("stopped; the same command goes on")
        return 130
    terminate_as_interrupt()
    print("\nevaluation under distractions that training never showed")
    # A name of its own, so that nobody's evaluation is replaced.
    evaluate_run(
        run, episodes=arguments.episodes, name=RESULT, overwrite=True, imports=arguments.imports
    )
    page = build_report([run], run / "report", overwrite=True)
    print(f"\nreport: {page.resolve()}\ncurves: tensorboard --logdir {run}")
    return 0


def check_same(run: Path, given: dict[str, Any]) -> None:
    """Refuse flags that would make the run in the folder another one.

    Raises:
        UserError: names the first flag that differs.
    """
    config = read_config(run)
    own = {
        "agent": config["agent"],
        "env": config["env"]["id"],
        "preset": config["preset"],
        "seed": config["train"]["seed"],
    }
    for name, value in given.items():
        if value is not None and value != own[name]:
            raise UserError(
                f"--{name} is {value}, but the run in '{run}' has {own[name]}; "
                "give another --run-dir, or remove that one"
            )


def steps_left(run: Path) -> int:
    """Return how many agent steps a run still lacks."""
    config = read_config(run)
    settings = read_loop(config)
    if config["agent"].startswith(BASELINE):  # whose only checkpoint is the last
        return 0 if (run / MODEL).is_file() else settings.steps
    newest = CheckpointStore(run).latest()
    done = int(newest.name.rpartition("-")[2]) if newest else 0
    return max(settings.steps - done, 0)


if __name__ == "__main__":
    raise SystemExit(main())
