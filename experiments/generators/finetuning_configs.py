"""What a run of fine-tuning is to be: presets, prompts, rewards, settings, from flags; refused where they are bad."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from agents.core.errors import UserError
from agents.core.precision import resolve_precision
from agents.core.seeding import spawn_seeds
from agents.core.settings import to_dict
from agents.generative_models.methods import METHODS
from agents.generative_models.monitor import MonitorSettings
from agents.generative_models.pipeline_generator import PipelineSettings, Precision
from agents.generative_models.pipeline_loading import is_pipeline, pipeline_kind
from agents.generative_models.rewards import parse_reward
from agents.generative_models.tuning_config import TuningConfig
from agents.generative_models.tuning_loop import TuningSettings
from experiments.generators.finetuning import choose_prompts, split_held_out
from experiments.generators.runs import SCHEMA
from experiments.generators.steering import STEERING
from experiments.running.arguments import fill
from experiments.running.settings import check_device

COMMAND = "experiments.finetune_generator"
DEFAULT_REWARD = "shapes"
PROMPT_COUNT, REPORT_PROMPTS = 512, 64
OF_IMAGES = ("guidance", "batch_size")
"""Settings of the trainer that steering has, too."""

PRESETS: dict[str, dict[str, Any]] = {
    # Settings of the method, more images.
    "gpu": {"prompts": 48, "group": 24, "batch_size": 128, "eval_prompts": 64, "learning_rate": 3e-5},
    # For a base of pretrain_generator's gpu-64: Flow-GRPO's groups, passes meant for 24 GB (not tried) beside 134
    # million parameters, and the step size with which DanceGRPO's recipes move a whole network (arXiv:2505.07818).
    "gpu-64": {"prompts": 48, "group": 24, "batch_size": 64, "eval_prompts": 64, "learning_rate": 1e-5},
    # One core: an iteration takes some seconds.
    "cpu": {"steps": 60},
    # Two cores, a base of 24 pixels (see experiments.generator_demo). Few images must say much: noise in the first
    # steps alone, which decide numbers and places, none later, where it only blurs; more images of a prompt; one
    # gradient step of them all; no guidance, of which the small base gains nothing (strict .18 with and without). The
    # method's own KL term stays: without it a checkerboard of two pixels creeps in, which ShapesEval does not see.
    "demo": {
        "denoising_steps": 6, "window": 3, "window_every": 1_000_000, "step_weight": "noise", "guidance": 1.0,
        "prompts": 12, "group": 16, "batch_size": 64, "updates": 1, "learning_rate": 1e-4, "average_decay": 0.9,
        "steps": 240, "eval_every": 40, "checkpoint_every": 40,
    },
    # Seconds, to see that everything works.
    "debug": {
        "denoising_steps": 3, "window": 0, "prompts": 2, "group": 3, "batch_size": 4, "steps": 2, "eval_every": 1,
        "eval_prompts": 2, "eval_images": 2, "eval_steps": 2, "kl_images": 2, "checkpoint_every": 1,
        "report_prompts": 2, "prompt_count": 4, "iterations": 2,
    },
}  # fmt: skip
"""Values that replace the defaults of the fields they name; flags replace both."""
OF_LORA = {"learning_rate": 3e-4, "batch_size": 8}
"""Those of pipelines, but in debug: the step size of DDPO and Flow-GRPO, and what fits beside a large network."""


def new_config(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content for parsed flags: everything resolved, nothing left to defaults."""
    if given["base"] is None:
        raise UserError(
            "give --base, the generator; python -m experiments.pretrain_generator trains one"
        )
    device = check_device(given["device"])
    preset = given["preset"]
    if preset == "auto":
        preset = "gpu" if device.startswith("cuda") else "cpu"
    if preset not in PRESETS:
        raise UserError.unknown("preset", preset, ["auto", *PRESETS])
    seed, seeds = spawn_seeds(given["seed"])
    values = preset_values(preset, method)
    pipeline = pipeline_settings(given, device)
    if pipeline is not None and preset != "debug":
        values |= OF_LORA
    tuning = fill(METHODS[method].config() if method in METHODS else TuningConfig(), values, given)
    if method in METHODS:
        refuse_unread(method, tuning, given)
    about = None if pipeline else drawings_of(given["base"])
    counts = {"prompt_count": PROMPT_COUNT, "report_prompts": REPORT_PROMPTS} | values | given
    for name in ("prompt_count", "report_prompts"):
        if counts[name] < 1:
            raise UserError(f"{name} is {counts[name]}; give a positive number")
    monitor = fill(MonitorSettings(), values, given)
    prompts, apart = (
        choose_prompts(about, file, count, held_out=is_held_out, seed=seeds["environment"])
        for file, count, is_held_out in (
            (given["prompt_file"], counts["prompt_count"], False),
            (given["held_out"], counts["report_prompts"] + monitor.eval_prompts, True),
        )
    )
    apart = without_trained(apart, prompts, given["held_out"])
    reported = counts["report_prompts"] if given["held_out"] is None else None
    monitored, held_out = split_held_out(apart, monitor.eval_prompts, reported)
    if pipeline is not None and given["gold"] is None:
        raise UserError(
            "give --gold, a reward that is measured and not optimized: nobody knows what a pipeline is to draw"
        )
    gold = given["gold"] or default_gold(given["reward"])
    refuse_same(given["reward"], gold)
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "command": COMMAND,
        "base": str(given["base"].resolve() if given["base"].exists() else given["base"]),
        "drawings": about,
        "method": method,
        "reward": given["reward"],
        "gold": gold,
        "tuning": to_dict(tuning),
        "monitor": to_dict(monitor),
        "loop": to_dict(fill(TuningSettings(), values, given)),
        "prompts": prompts,
        "monitored": monitored,
        "held_out": held_out,
        "imports": given["imports"],
        "seed": seed,
        "seeds": seeds,
        "device": device,
        "threads": given["threads"],
        "preset": given["preset"],
    }
    if pipeline is None:
        config["precision"] = own_precision(given, device)
    else:
        config["pipeline"] = to_dict(pipeline)
    if method in STEERING:
        # A preset's step size is that of training a network, not of moving a noise.
        own = {name: value for name, value in values.items() if name not in names(TuningConfig)}
        config["steering"] = to_dict(fill(STEERING[method][1], own, given))
    else:
        config["compile"] = given.get("compile", "off")
    return config


def preset_values(preset: str, method: str) -> dict[str, Any]:
    """Return the values of a preset that a method takes.

    A preset fits a machine and leaves what a method says of itself (`METHODS`), such as MixGRPO's moving window; what
    it leaves to the defaults is the preset's. Only debug replaces all, but for a group of one image, which compares
    nothing.
    """
    own = METHODS[method].settings if method in METHODS else {}
    kept = own if preset != "debug" else {n: v for n, v in own.items() if (n, v) == ("group", 1)}
    return {name: value for name, value in PRESETS[preset].items() if name not in kept}


def refuse_unread(method: str, tuning: TuningConfig, given: Mapping[str, Any]) -> None:
    """Refuse flags that the method's objective would silently leave out.

    Raises:
        UserError: names the first of them, and those that the method has.
    """
    read = tuning.fields_read()
    for name in names(TuningConfig):
        if name in given and name not in read:
            raise UserError(
                f"{flag(name)} says nothing to {method} with these settings; it has {', '.join(map(flag, read))}"
            )


def without_trained(held_out: list[str], trained: list[str], file: Path | None) -> list[str]:
    """Return held-out prompts that are not trained on.

    Args:
        held_out: as they were drawn, or read from a file.
        trained: prompts of training.
        file: that they were read from.

    Raises:
        UserError: a file holds some that are trained on, or nothing is left.
    """
    known = set(trained)
    apart = [prompt for prompt in held_out if prompt not in known]
    if file is not None and len(apart) < len(held_out):
        first = next(prompt for prompt in held_out if prompt in known)
        raise UserError(
            f"'{file}' is to hold prompts that are not trained on; remove '{first}' and others from it, or from "
            "the training prompts"
        )
    if not apart:
        raise UserError(
            "all held-out combinations are among the training prompts; give --held-out FILE"
        )
    return apart


def pipeline_settings(given: dict[str, Any], device: str) -> PipelineSettings | None:
    """Return how to take the base where it is a diffusers pipeline, else None.

    Raises:
        UserError: it is none, and settings of one are given; or it cannot be read.
    """
    if not is_pipeline(str(given["base"])):
        for name in names(PipelineSettings):
            if name in given and name != "precision":
                raise UserError(
                    f"{flag(name)} is of diffusers pipelines, and '{given['base']}' is none; leave it out"
                )
        return None
    pipeline_kind(str(given["base"]))
    settings = fill(PipelineSettings(), given)
    if settings.precision == "auto":
        chosen: Precision = "bf16" if device.startswith("cuda") else "fp32"
        settings = dataclasses.replace(settings, precision=chosen)
    return settings


def own_precision(given: Mapping[str, Any], device: str) -> Literal["fp32", "bf16"]:
    """Return what the denoiser of a generator of ours computes in.

    auto is bf16 on CUDA devices that have it; what was measured on CPUs was in fp32.

    Raises:
        UserError: there is no such precision for it.
    """
    precision = given.get("precision", "auto")
    if precision == "auto":
        return resolve_precision("auto", torch.device(device)) if device != "cpu" else "fp32"
    if precision not in ("fp32", "bf16"):
        raise UserError(
            f"--precision {precision} is of diffusers pipelines; a generator of pretrain_generator takes auto, fp32 or "
            "bf16"
        )
    return precision


def drawings_of(base: Path) -> dict[str, Any] | None:
    """Return the settings of the drawings that a base was pretrained on; None where its folder says nothing.

    A fine-tuned run says what its own base said.
    """
    if not base.exists():
        raise UserError(
            f"there is no generator in '{base}'; give --base a run of python -m experiments.pretrain_generator, a "
            "diffusers pipeline's folder, or its name on the hub"
        )
    file = base / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({error}); restore it or train anew") from error
    if not isinstance(config, dict):
        return None
    if "pipeline" in config:
        raise UserError(
            f"'{base}' is a run that fine-tuned a pipeline: go on with it by --resume, or give its --base"
        )
    return config.get("drawings")


def default_gold(reward: str) -> str:
    """Return what is measured beside a reward: a learned judge beside ShapesEval, and that beside all others.

    Raises:
        UserError: the reward reads text, of which there is one judge here (its strict form would measure the same), or
            has both judges of shapes.
    """
    optimized = {term.name for term in parse_reward(reward)}
    if optimized & {"glyphs", "glyphs_strict"}:
        raise UserError(
            f"nothing here judges text but the reward '{reward}' itself; give --gold what is measured instead (a "
            "function of yours, module:function, or glyphs_strict, which a hacked reward may deceive as well)"
        )
    if not optimized & {"shapes", "shapes_strict", "drawings", "drawings_strict"}:
        return "drawings_strict"
    if "classifier" in optimized:
        raise UserError(
            f"'{reward}' has both judges of drawings that there are here; give --gold what is measured instead, such "
            "as a function of yours, module:function"
        )
    return "classifier"


def refuse_same(reward: str, gold: str) -> None:
    """Refuse to measure what is optimized.

    Raises:
        UserError: a part of the gold reward is one of the reward's.
    """
    for measured in parse_reward(gold):
        if any(measured.is_same(term) for term in parse_reward(reward)):
            raise UserError(
                f"--gold is {gold}, and {measured.name} is optimized; give a reward that is not a part of '{reward}'"
            )


def flag(name: str) -> str:
    """Return a field's flag."""
    return f"--{name.replace('_', '-')}"


def names(cls: type) -> list[str]:
    """Return the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(cls)]
