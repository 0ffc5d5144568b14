"""Fine-tune an image generator by rewards: policy gradients, preferences, gradients of the reward, or steering.

    python -m experiments.finetune_generator --base runs/generators/unet-flow-seed0 --method flow-grpo --reward shapes
    python -m experiments.finetune_generator --base RUN --method alignprop --reward brightness --gold shapes_strict
    python -m experiments.finetune_generator --base RUN --method fk-steering --reward shapes
    python -m experiments.finetune_generator --base stable-diffusion-v1-5/stable-diffusion-v1-5 --method ddpo \
        --reward "aesthetic(DIR)" --gold "pickscore(DIR)" --prompt-file train.txt --held-out test.txt
    python -m experiments.finetune_generator --base RUN --method ddpo --reward shapes --preset gpu-64 --compile auto
    python -m experiments.finetune_generator --resume runs/generators/flow-grpo-shapes-seed0 --steps 200
    torchrun --nproc-per-node 8 -m experiments.finetune_generator --base RUN --method flow-grpo --reward shapes

Methods are settings of one trainer; --help shows them for the method that --method names, and each can be given.
Every evaluation draws the same held-out prompts from the same noise and measures the reward that is optimized, a gold
one that is not, diversity and the KL to the base; the run ends when it only pays (see --patience). At the end a
report compares base and the checkpoint of the most gold on held-out prompts: RUN/report/report.md. fk-steering, reno
and best-of-n train nothing: their report compares images of the base with steered ones.

Processes that torchrun starts share the prompts of each iteration out (on CUDA devices each has its own GPU): a step is
the one that a single process would take of all their images, so settings mean the same. --prompts must be a multiple of
their number, and --resume needs as many.

The base is a run of pretrain_generator, or a pipeline of diffusers (Stable Diffusion 1 to 3 and XL, FLUX.1): a folder,
or a name on the hub. Of a pipeline a LoRA learns; the best one is kept in RUN/lora for load_lora_weights of diffusers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.core.processes import joined_ranks
from agents.core.ranks import Ranks
from agents.generative_models.methods import METHODS, find_method
from agents.generative_models.monitor import MonitorSettings
from agents.generative_models.pipeline_generator import PipelineSettings
from agents.generative_models.rewards import reward_help
from agents.generative_models.tuning_config import TuningConfig
from agents.generative_models.tuning_loop import LESS_MEMORY, TuningSettings
from experiments.generators.finetuning import FineTuningSession
from experiments.generators.finetuning_configs import (
    COMMAND,
    DEFAULT_REWARD,
    OF_IMAGES,
    PRESETS,
    PROMPT_COUNT,
    REPORT_PROMPTS,
    names,
    new_config,
)
from experiments.generators.runs import (
    add_compile_flag,
    free_run_dir,
    read_generator_config,
    refuse_changes,
    run_session,
)
from experiments.generators.steering import STEERING, steer
from experiments.running.arguments import Parser, add_dataclass, run_command
from experiments.running.imports import add_import_flag
from experiments.running.settings import check_device

DEFAULT_METHOD = "flow-grpo"
RESUMABLE = (
    "steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_evaluations", "max_rewards",
    "patience", "tolerance", "most_kl", "least_recall",
)  # fmt: skip
"""What --resume may change, beside device, threads and compile."""
HIDDEN = ("eval_episodes", "exact_resume")
"""Settings of loops that act."""


def parser(method: str) -> Parser:
    """Return the command's parser, with the flags and defaults of one method."""
    p = Parser(prog=f"python -m {COMMAND}", description=__doc__)
    known = {name: m.summary for name, m in METHODS.items()} | {
        n: s for n, (s, _) in STEERING.items()
    }
    p.add_argument("--method", default=DEFAULT_METHOD, metavar="NAME",
                   help="; ".join(f"{name}: {text}" for name, text in known.items()))  # fmt: skip
    p.add_argument(
        "--base",
        type=Path,
        metavar="RUN|FOLDER|NAME",
        help="the generator, as pretrain_generator wrote it, or a diffusers pipeline's folder or name on the hub",
    )
    p.add_argument("--reward", default=DEFAULT_REWARD, metavar="NAME",
                   help="what is optimized: names, sums such as compressibility:0.5+shapes, or a function of yours, "
                   f"module:function [{DEFAULT_REWARD}]. {reward_help()}")  # fmt: skip
    p.add_argument("--gold", metavar="NAME", help="what is measured and not optimized [classifier for shapes and "
                   "drawings, none for glyphs, else drawings_strict]")  # fmt: skip
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="training prompts, one in each line "
                   "[combinations that the base was pretrained on]")  # fmt: skip
    p.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="prompts of evaluations [held-out combinations]",
    )
    p.add_argument("--prompt-count", type=int, default=argparse.SUPPRESS, metavar="N",
                   help=f"training prompts that are drawn where no file is given [{PROMPT_COUNT}]")  # fmt: skip
    p.add_argument("--report-prompts", type=int, default=argparse.SUPPRESS, metavar="N",
                   help=f"held-out prompts of the report, where no file is given [{REPORT_PROMPTS}]")  # fmt: skip
    add_import_flag(p)
    p.add_argument("--preset", default="auto", metavar="|".join(["auto", *PRESETS]),
                   help="values that fit a machine; auto is gpu on CUDA devices, else cpu [auto]")  # fmt: skip
    p.add_argument("--seed", type=int, help="of everything; none draws one and says which")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads [torch's own number]")
    p.add_argument("--run-dir", type=Path, metavar="DIR",
                   help="where the run is kept [runs/generators/<method>-<reward>-seed<seed>]")  # fmt: skip
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run; may raise --steps")
    if method not in STEERING:
        add_compile_flag(p)
    if method in STEERING:
        add_dataclass(p, f"steering ({method})", STEERING[method][1])
        add_dataclass(
            p, "images", TuningConfig(), skip=[f for f in names(TuningConfig) if f not in OF_IMAGES]
        )
    else:
        add_dataclass(p, f"method ({method})", find_method(method).config())
        add_dataclass(p, "loop", TuningSettings(), skip=HIDDEN)
    add_dataclass(p, "evaluations", MonitorSettings())
    add_dataclass(p, "a diffusers pipeline as the base", PipelineSettings())
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    with joined_ranks() as ranks:
        return fine_tune(argv, ranks)


def fine_tune(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """Train what the flags say, with the other processes if there are some, and write the report."""
    sessions: list[FineTuningSession] = []
    with ranks.one_fate():
        run, config, resume = choose_run(argv, ranks)
        if config["method"] in STEERING:
            print(f"report: {steer(run, config).resolve()}")
            return 0

        def open_session(resume: bool) -> FineTuningSession:
            sessions.append(FineTuningSession(run, config, resume, ranks))
            return sessions[-1]

        run_session(run, config, open_session, resume=resume, less_memory=LESS_MEMORY, ranks=ranks)
    if sessions[-1].is_over and ranks.is_first:
        print(f"report: {sessions[-1].report().resolve()}")
    return 0


def choose_run(argv: Sequence[str] | None, ranks: Ranks) -> tuple[Path, dict[str, Any], bool]:
    """Return the run's folder, its config, and whether it goes on: those of the first process in all of them.

    Raises:
        UserError: a flag is wrong, or the run cannot go on.
    """
    first = Parser(add_help=False)
    first.add_argument("--method", default=DEFAULT_METHOD)
    first.add_argument("--resume", type=Path)
    known, _ = first.parse_known_args(argv)
    resumed = None if known.resume is None else read_generator_config(known.resume, COMMAND)
    method = known.method if resumed is None else resumed["method"]
    if method not in STEERING and method not in METHODS:
        raise UserError.unknown("method", method, [*METHODS, *STEERING])
    given = vars(parser(method).parse_args(argv))
    if given["threads"] is not None and given["threads"] < 1:
        raise UserError(f"--threads is {given['threads']}; give a positive number")
    import_modules(given["imports"])
    if method in STEERING and ranks.size > 1:
        raise UserError(
            f"{method} trains nothing that processes could share; start it without torchrun"
        )
    run, config = Path(), {}
    if ranks.is_first:  # a seed that is drawn, and the number of a folder, are for all
        if resumed is None:
            config = new_config(method, given)
            run = given["run_dir"] or free_run_dir(run_name(config))
        else:
            run, config = given["resume"], resumed
            resume_config(config, given, sys.argv[1:] if argv is None else list(argv))
        config["processes"] = ranks.size
    run, config = Path(ranks.told(str(run))), ranks.told(config)
    return run, config, resumed is not None


def resume_config(config: dict[str, Any], given: dict[str, Any], argv: Sequence[str]) -> None:
    """Put into a run's config what --resume may change.

    Raises:
        UserError: a flag is given that would make it another run, or there is nothing to resume.
    """
    if config["method"] in STEERING:
        raise UserError(f"{config['method']} trains nothing that could go on; start it anew")
    refuse_changes(argv, [*RESUMABLE, "device", "threads", "compile", "import"])
    if given["device"] != "auto":
        config["device"] = given["device"]
    config["device"] = check_device(config["device"])
    config["threads"] = given["threads"] or config["threads"]
    config["compile"] = given.get("compile", config.get("compile", "off"))
    for part, cls in (("loop", TuningSettings), ("monitor", MonitorSettings)):
        own = names(cls)
        config[part] |= {name: given[name] for name in RESUMABLE if name in given and name in own}


def run_name(config: dict[str, Any]) -> str:
    """Return a folder's name for a run."""
    reward = re.sub(r"[^\w.-]+", "-", config["reward"]).strip("-")
    return f"{config['method']}-{reward}-seed{config['seed']}"


if __name__ == "__main__":
    raise SystemExit(main())
