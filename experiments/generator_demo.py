"""An image generator from nothing to a report: pretrain on drawn shapes, fine-tune with Flow-GRPO on ShapesEval.

    python -m experiments.generator_demo

The task is small, so that two cores do in minutes: pictures of 24 x 24 pixels with one to four like things, whose
number, color, shape, size and place a sentence says ("two small red circles on the left"). The report compares base and
fine-tuned generator on sentences whose combinations neither has seen: strict score with intervals, sample sheets, and
what the monitor measured. Stopped in between, the same command goes on where it was. With `--preset cpu` things differ
within a picture and stand in relations, in 32 x 32 pixels; that takes far longer to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from experiments import finetune_generator, pretrain_generator
from experiments.generators.report import FOLDER
from experiments.generators.runs import read_generator_config
from experiments.running.arguments import Parser, run_command

BASE, TUNED = "base", "tuned"
"""Run folders in the demo's own."""
STOPPED = 130
"""Exit code where a signal ended a run: the same command goes on."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.generator_demo", description=__doc__)
    p.add_argument("--run-dir", type=Path, default=Path("runs/generator-demo"), metavar="DIR",
                   help="folder of both runs [runs/generator-demo]")  # fmt: skip
    p.add_argument("--method", default="flow-grpo", metavar="NAME",
                   help="of fine-tuning; see finetune_generator [flow-grpo]")  # fmt: skip
    p.add_argument("--reward", default="shapes", metavar="NAME", help="what is optimized [shapes]")
    p.add_argument("--gold", metavar="NAME", help="what is measured and not optimized")
    p.add_argument("--preset", default="demo", metavar="NAME", help="of both commands [demo]")
    p.add_argument("--seed", type=int, default=1, help="seed of everything [1]")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = parser().parse_args(argv)
    base, tuned = given.run_dir / BASE, given.run_dir / TUNED
    page = tuned / FOLDER / "report.md"
    common = {"preset": given.preset, "seed": given.seed}
    method = {"method": given.method, "reward": given.reward}
    if given.gold:
        method["gold"] = given.gold
    check_same(base, pretrain_generator.COMMAND, common)
    check_same(tuned, finetune_generator.COMMAND, common | method)
    if not is_trained(base):
        code = begin_or_go_on(pretrain_generator.main, base, common)
        if code or not is_trained(base):
            return code or STOPPED
    if not page.is_file():
        flags = {"base": base, **common, **method}
        code = begin_or_go_on(finetune_generator.main, tuned, flags)
        if code or not page.is_file():
            return code or STOPPED
    print(f"\nreport: {page.resolve()}\ncurves: tensorboard --logdir {given.run_dir}")
    return 0


def check_same(run: Path, command: str, flags: Mapping[str, object]) -> None:
    """Refuse flags that would make the run in a folder another one.

    Raises:
        UserError: names the first flag that differs.
    """
    if not (run / "config.json").exists():
        return
    config = read_generator_config(run, command)
    for name, value in flags.items():
        if config[name] != value:
            raise UserError(
                f"--{name} is {value}, but the run in '{run}' has {config[name]}; give another --run-dir, or remove "
                "that one"
            )


def is_trained(base: Path) -> bool:
    """Whether a pretraining run has all its steps."""
    if not (base / "config.json").exists():
        return False
    newest = CheckpointStore(base).latest()
    done = int(newest.name.rpartition("-")[2]) if newest else 0
    return done >= read_generator_config(base, pretrain_generator.COMMAND)["loop"]["steps"]


def begin_or_go_on(
    command: Callable[[list[str]], int], run: Path, flags: Mapping[str, object]
) -> int:
    """Begin a run with some flags, or go on with the one that is there; return the exit code."""
    if (run / "config.json").exists():
        print(f"going on with {run}")
        return command(["--resume", str(run)])
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return command([*words, "--run-dir", str(run)])


if __name__ == "__main__":
    raise SystemExit(main())
