"""Imitate demonstrations: Diffusion Policy, flow policy, behavior cloning.

    python -m experiments.collect drawer/expert-v0 --expert --env metaworld/drawer-open --observation both
    python -m experiments.imitate --agent flow-policy --dataset drawer/expert-v0 --action-chunk 8
    python -m experiments.imitate --agent bc --dataset drawer/expert-v0 drawer/video-v0 --observation pixels
    python -m experiments.imitate --resume runs/metaworld-drawer-open/flow-policy-seed1 --steps 40000

The task is the data set's own, taken in chunks of --action-chunk actions, and its first one says how it looks when the
policy is evaluated on the way; `collect --rerender` shows the same episodes under other distractions, and several data
sets are learned together. The run folder is like any other: evaluate, record and report take it. Every field of the
agent's config is a flag; `--help` shows those of the agent that `--agent` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import envs
from agents import AGENTS
from agents.core.errors import UserError
from agents.core.seeding import spawn_seeds
from agents.core.settings import argument_docs, to_dict
from agents.policy import SCHEMA
from agents.registry import find
from envs.settings import Settings
from experiments.collect import changed
from experiments.running.arguments import Parser, add_dataclass, fill, run_command
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.settings import VectorSettings, check_device, loop_settings
from experiments.sessions.bases import refuse_idle
from experiments.sessions.demonstrations import (
    add_dataset_flags,
    check_observation,
    common_task,
    named_datasets,
)
from experiments.train import launch

DEFAULT_AGENT = "flow-policy"
DEFAULT_CHUNK = 8
"""Actions that are executed between two looks (Diffusion Policy)."""
OF_THE_TASK = (
    "observation", "frame_stack", "action_chunk", "distraction", "split", "videos", "quality", "episode_length",
    "end_at_success",
)  # fmt: skip
"""Settings of a data set's task that may differ when it is imitated."""

PRESETS: dict[str, dict[str, Any]] = {
    # Published sizes.
    "gpu": {},
    # Two cores: a gradient step takes ten to a hundred milliseconds.
    "cpu": {
        "denoiser": "mlp",
        "width": 256,
        "time_features": 32,
        "encoder": "small",
        "batch_size": 128,
        "learning_rate": 5e-4,
    },
    # Seconds, to see that everything works.
    "debug": {
        "denoiser": "mlp",
        "width": 32,
        "blocks": 1,
        "time_features": 16,
        "encoder": "small",
        "feature_dim": 8,
        "batch_size": 8,
        "denoising_steps": 2,
        "warmup": 10,
        "steps": 100,
        "log_every": 20,
        "eval_every": 50,
        "eval_episodes": 1,
        "checkpoint_every": 50,
    },
}
"""Values that replace the defaults of the fields they name, in whichever config has them."""


def parser(agent: str) -> Parser:
    """Return the command's parser, with the flags of one agent."""
    spec = find(agent)
    p = Parser(prog="python -m experiments.imitate", description=__doc__)
    known = {name: s.summary for name, s in AGENTS.items() if s.offline}
    p.add_argument("--agent", default=DEFAULT_AGENT, metavar="NAME",
                   help="; ".join(f"{name}: {text}" for name, text in known.items()))  # fmt: skip
    add_dataset_flags(p, "what to learn from, see collect")
    p.add_argument("--env", metavar="ID", help="refuse datasets of another task than this")
    add_import_flag(p)
    p.add_argument("--preset", default="auto", metavar="|".join(["auto", *PRESETS]),
                   help="values that fit a machine; auto is gpu on CUDA devices, else cpu [auto]")  # fmt: skip
    p.add_argument("--seed", type=int, help="of everything; none draws one and says which")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    p.add_argument(
        "--threads", type=int, metavar="N",
        help="CPU threads of the learner [torch's own or 1, whichever is faster when the run starts]",
    )  # fmt: skip
    p.add_argument("--workers", type=int, default=0, metavar="N",
                   help="worker processes of evaluations; results do not depend on them [0]")  # fmt: skip
    p.add_argument("--run-dir", type=Path, metavar="DIR",
                   help="where the run is kept [runs/<task>/<agent>-seed<seed>]")  # fmt: skip
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run; may raise --steps")
    p.add_argument("--replay-storage", default="auto", choices=("auto", "device", "ram", "mmap"),
                   help="where the demonstrations lie; auto: device, else RAM, else a file [auto]")  # fmt: skip
    skip = [name for name in vars(Settings("")) if name not in OF_THE_TASK]
    docs = argument_docs(envs.make)
    task = Settings("", action_chunk=DEFAULT_CHUNK)
    add_dataclass(p, "task (what is not given is the dataset's)", task, skip=skip, docs=docs)
    add_dataclass(p, "loop", loop_settings(agent), skip=("exact_resume",))
    for config in spec.configs:
        add_dataclass(p, f"{type(config).__name__} ({agent})", config)
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return launch(argv, DEFAULT_AGENT, parser, new_config, check_agent)


def check_agent(agent: str) -> None:
    """Refuse an agent that does not learn from demonstrations alone.

    Raises:
        UserError: names those that do.
    """
    if not find(agent).offline:
        offline = ", ".join(name for name, spec in AGENTS.items() if spec.offline)
        raise UserError(
            f"agent '{agent}' does not learn from demonstrations alone; give one of {offline}, or use "
            "python -m experiments.train"
        )


def new_config(given: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content for parsed flags: everything resolved, nothing left to defaults."""
    if not given["dataset"]:
        raise UserError(
            "give --dataset, what to learn from; python -m experiments.collect makes one"
        )
    device = check_device(given["device"])
    about, datasets = named_datasets(given)
    imports = [
        module
        for dataset in datasets.values()
        for module in import_for_run(dataset.about, given["imports"], source="the dataset")
    ]
    settings = common_task(datasets, given["env"])
    seed, seeds = spawn_seeds(given["seed"])
    chosen = {"action_chunk": DEFAULT_CHUNK, **given}
    flags = {name: chosen[name] for name in OF_THE_TASK if name in chosen}
    own = {**settings, "protocol": None, "side_by_side": True}
    task = changed(own, flags, OF_THE_TASK, "--dataset")
    if task["split"] == "test":
        raise UserError(
            "--split test is what evaluations are made of; choose on train or validation"
        )
    check_observation(settings["observation"], task["observation"], about["datasets"][0])
    sources = (find_preset(given["preset"], device), given)
    loop = fill(loop_settings(given["agent"]), *sources)
    configs = [fill(config, *sources) for config in find(given["agent"]).configs]
    refuse_idle(configs[0], given)
    return {
        "schema": SCHEMA,
        "agent": given["agent"],
        "imports": list(dict.fromkeys(imports)),
        "env": {**task, "seed": seeds["environment"]},
        "vector": to_dict(VectorSettings(num_envs=1, workers=given["workers"])),
        "demonstrations": about,
        "train": {**to_dict(loop), "num_envs": 1, "seed": seed},
        "configs": {type(config).__name__: to_dict(config) for config in configs},
        "device": device,
        "threads": given["threads"],
        "replay_storage": given["replay_storage"],
        "preset": given["preset"],
    }


def find_preset(name: str, device: str) -> dict[str, Any]:
    """Return a preset's values; `auto` is `gpu` on CUDA devices and `cpu` elsewhere."""
    if name == "auto":
        name = "gpu" if device.startswith("cuda") else "cpu"
    if name not in PRESETS:
        raise UserError.unknown("preset", name, ["auto", *PRESETS])
    return PRESETS[name]


if __name__ == "__main__":
    raise SystemExit(main())
