"""Pretrain an image generator on drawings: shapes with captions, and letters.

    python -m experiments.pretrain_generator --seed 0
    python -m experiments.pretrain_generator --network dit --patch 4 --path cosine --kinds single text
    python -m experiments.pretrain_generator --preset gpu-64 --compile auto
    python -m experiments.pretrain_generator --resume runs/generators/unet-flow-seed0 --steps 8000

The drawings are made once and kept ($SIGHTLINE_CACHE, else ~/.cache/sightline). Some combinations of number, color,
shape, size and place are never shown: every evaluation draws pictures for prompts of both sides, from fixed noise, and
ShapesEval says how many are right (strict) and how right they are (graded). The run folder holds metrics, TensorBoard,
samples.png and checkpoints; experiments.finetune_generator takes it as its --base.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.core.errors import UserError
from agents.core.precision import resolve_precision
from agents.core.seeding import spawn_seeds
from agents.core.settings import to_dict
from agents.generative_models.drawings import DrawingSettings
from agents.generative_models.generator import GeneratorConfig
from agents.generative_models.pretraining import LESS_MEMORY, PretrainingConfig, PretrainingSettings
from experiments.generators.pretraining import PretrainingSession
from experiments.generators.runs import (
    SCHEMA,
    add_compile_flag,
    free_run_dir,
    read_generator_config,
    refuse_changes,
    run_session,
)
from experiments.running.arguments import Parser, add_dataclass, fill, run_command
from experiments.running.settings import check_device

COMMAND = "experiments.pretrain_generator"
RESUMABLE = (
    "steps",
    "log_every",
    "eval_every",
    "eval_prompts",
    "eval_steps",
    "guidance",
    "checkpoint_every",
    "keep_checkpoints",
)
"""What --resume may change, beside device, threads and compile."""
HIDDEN = ("eval_episodes", "exact_resume")
"""Settings of loops that act."""

ON_CPUS: dict[str, Any] = {
    "text_features": 64,
    "text_blocks": 1,
    "data_mean": -0.8,
    "data_spread": 0.4,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "decay": 0.4,
    "average_decay": 0.995,
    "log_every": 100,
    "checkpoint_every": 500,
}
"""Of both presets for CPUs. At 24 pixels, in bfloat16 and one minute of a core these came to a graded score of .54 on
held-out prompts, where batches of 32 at 2e-3 with fused attention and without `data_spread` came to .32."""

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {
        "width": 256,
        "depth": 8,
        "heads": 8,
        "text_features": 256,
        "batch_size": 256,
        "learning_rate": 5e-4,
        "pictures": 200_000,
        "average_decay": 0.9995,
        "bf16": True,
    },
    # A DiT-B/4 (Peebles & Xie 2023, arXiv:2212.09748, table 1) of 134 million parameters, 256 tokens at 64 pixels.
    # Their section 4: AdamW at a constant 1e-4 without weight decay, batches of 256, an average of .9999; of their
    # 400,000 steps on ImageNet an eighth, as drawings are few kinds of things, with the falling end of `decay`. The
    # shift of times is SD3's for twice the side of 32 pixels (Esser et al. 2024, arXiv:2403.03206, equation 23).
    "gpu-64": {
        "network": "dit",
        "size": 64,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "patch": 4,
        "text_features": 384,
        "data_mean": -0.8,
        "data_spread": 0.4,
        "times_shift": 2.0,
        "batch_size": 256,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "warmup": 1_000,
        "decay": 0.2,
        "average_decay": 0.9999,
        "pictures": 200_000,
        "steps": 50_000,
        "bf16": True,
    },
    # One core: a step takes about a fifth of a second.
    "cpu": {
        "levels": 3,
        "depth": 2,
        "steps": 3_500,
        "eval_every": 1_000,
        **ON_CPUS,
    },
    # Some ten minutes of a core: groups of like things alone, in fewer pixels (see experiments.generator_demo).
    "demo": {
        "size": 24,
        "kinds": ("single",),
        "width": 96,
        "levels": 3,
        "depth": 2,
        "steps": 4_800,
        "eval_every": 1_600,
        "eval_steps": 10,
        **ON_CPUS,
        "average_decay": 0.998,
        "noisy_steps": 200,
        "noisy_share": 0.2,
    },
    # Seconds, to see that everything works.
    "debug": {
        "size": 16,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "text_features": 16,
        "text_blocks": 1,
        "batch_size": 8,
        "pictures": 200,
        "steps": 40,
        "log_every": 10,
        "eval_every": 20,
        "eval_prompts": 4,
        "eval_steps": 2,
        "checkpoint_every": 20,
    },
}
"""Values that replace the defaults of the fields they name, in whichever config has them."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog=f"python -m {COMMAND}", description=__doc__)
    p.add_argument("--preset", default="auto", metavar="|".join(["auto", *PRESETS]),
                   help="values that fit a machine; auto is gpu on CUDA devices, else cpu [auto]")  # fmt: skip
    p.add_argument("--seed", type=int, help="of everything; none draws one and says which")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads [torch's own number]")
    add_compile_flag(p)
    p.add_argument("--run-dir", type=Path, metavar="DIR",
                   help="where the run is kept [runs/generators/<network>-<path>-seed<seed>]")  # fmt: skip
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run; may raise --steps")
    add_dataclass(p, "drawings", DrawingSettings(), skip=("size", "seed"))
    add_dataclass(p, "generator", GeneratorConfig())
    add_dataclass(p, "learning", PretrainingConfig())
    add_dataclass(p, "loop", PretrainingSettings(), skip=HIDDEN)
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = vars(parser().parse_args(argv))
    if given["threads"] is not None and given["threads"] < 1:
        raise UserError(f"--threads is {given['threads']}; give a positive number")
    resume = given["resume"] is not None
    if resume:
        run = given["resume"]
        config = resumed_config(given, sys.argv[1:] if argv is None else list(argv))
    else:
        config = new_config(given)
        about, seed = config["generator"], config["seed"]
        run = given["run_dir"] or free_run_dir(f"{about['network']}-{about['path']}-seed{seed}")
    told = run_session(
        run,
        config,
        lambda on: PretrainingSession(run, config, on),
        resume=resume,
        less_memory=LESS_MEMORY,
    )
    if told:
        print(f"next: python -m experiments.finetune_generator --base {run}")
    return 0


def new_config(given: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content for parsed flags: everything resolved, nothing left to defaults."""
    device = check_device(given["device"])
    name = given["preset"]
    if name == "auto":
        name = "gpu" if device.startswith("cuda") else "cpu"
    if name not in PRESETS:
        raise UserError.unknown("preset", name, ["auto", *PRESETS])
    seed, seeds = spawn_seeds(given["seed"])
    own = PRESETS[name]
    if name in ("cpu", "demo"):
        own = own | {"bf16": resolve_precision("auto", torch.device(device)) == "bf16"}
    sources = (own, {key: value for key, value in given.items() if key != "seed"})
    generator = fill(GeneratorConfig(), *sources)
    # The pictures are the same for every seed of a run, so that they are drawn once.
    drawings = fill(DrawingSettings(), *sources, {"size": generator.size})
    return {
        "schema": SCHEMA,
        "command": COMMAND,
        "generator": to_dict(generator),
        "drawings": to_dict(drawings),
        "learning": to_dict(fill(PretrainingConfig(), *sources)),
        "loop": to_dict(fill(PretrainingSettings(), *sources)),
        "seed": seed,
        "seeds": seeds,
        "device": device,
        "threads": given["threads"],
        "preset": given["preset"],
        "compile": given.get("compile", "off"),
    }


def resumed_config(given: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return the config of a run with what --resume may change.

    Raises:
        UserError: a flag is given that would make it another run.
    """
    config = read_generator_config(given["resume"], COMMAND)
    refuse_changes(argv, [*RESUMABLE, "device", "threads", "compile"])
    if given["device"] != "auto":
        config["device"] = given["device"]
    config["device"] = check_device(config["device"])
    config["threads"] = given["threads"] or config["threads"]
    config["compile"] = given.get("compile", config.get("compile", "off"))
    config["loop"] |= {name: given[name] for name in RESUMABLE if name in given}
    return config


if __name__ == "__main__":
    raise SystemExit(main())
