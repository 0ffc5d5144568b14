"""The whole way, in one command: train SGQN on cartpole-swingup from pixels, then meet unseen colors and videos.

    python -m experiments.demo

Trains with the CPU preset (about a quarter of an hour on two cores), evaluates clean, color_hard, video_easy and
video_hard, and writes a report. Stopped in between, the same command goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.loops import LoopSettings
from agents.core.settings import from_dict
from agents.policy import read_config
from experiments import train
from experiments.arguments import Parser, run_command
from experiments.evaluate import evaluate_run
from experiments.report import build_report


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.demo", description=__doc__)
    p.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="run folder [runs/demo]")
    p.add_argument("--agent", default="sgqn", help="agent [sgqn]")
    p.add_argument("--env", default="dmc/cartpole-swingup", help="task [dmc/cartpole-swingup]")
    p.add_argument("--preset", default="cpu", help="preset of the training command [cpu]")
    p.add_argument("--seed", type=int, default=1, help="seed of everything [1]")
    p.add_argument("--episodes", type=int, default=10, help="episodes per distraction [10]")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.episodes < 1:
        raise UserError(f"--episodes is {arguments.episodes}; give at least 1")
    run = arguments.run_dir
    flags = ["--agent", arguments.agent, "--env", arguments.env, "--preset", arguments.preset]
    if not (run / "config.json").exists():
        code = train.main([*flags, "--seed", str(arguments.seed), "--run-dir", str(run)])
    elif steps_left(run):
        print(f"going on with {run}")
        code = train.main(["--resume", str(run)])
    else:
        print(f"{run} is trained already; remove it to train anew")
        code = 0
    if code:
        return code
    if steps_left(run):
        print("stopped; the same command goes on")
        return 130
    print("\nevaluation under distractions that training never showed")
    evaluate_run(run, episodes=arguments.episodes, overwrite=True)
    page = build_report([run], run / "report", overwrite=True)
    print(f"\nreport: {page.resolve()}\ncurves: tensorboard --logdir {run}")
    return 0


def steps_left(run: Path) -> int:
    """Return how many agent steps a run still lacks."""
    train_settings = read_config(run)["train"]
    settings = from_dict(
        LoopSettings, {k: v for k, v in train_settings.items() if k not in ("num_envs", "seed")}
    )
    newest = CheckpointStore(run).latest()
    done = int(newest.name.rpartition("-")[2]) if newest else 0
    return max(settings.steps - done, 0)


if __name__ == "__main__":
    raise SystemExit(main())
