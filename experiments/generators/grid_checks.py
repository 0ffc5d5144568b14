"""What is checked of a grid of fine-tuning methods before the first run starts, so that none of them does in vain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agents.core.errors import UserError
from agents.core.noise_paths import RectifiedFlow
from agents.core.settings import from_dict, to_dict
from agents.generative_models.credit import checked_reward
from agents.generative_models.generator import load_generator
from agents.generative_models.monitor import MonitorSettings
from agents.generative_models.pipeline_generator import PipelineSettings
from agents.generative_models.text_to_image import TextToImage
from agents.generative_models.tuning_config import TuningConfig
from agents.generative_models.tuning_loop import TuningSettings
from experiments.compare import difference
from experiments.generators.finetuning import base_digest, rewards_of
from experiments.generators.grid_archive import read_archive, without_folders
from experiments.generators.grid_results import Job
from experiments.generators.runs import read_generator_config
from experiments.generators.steering import STEERING

SAME_OF_A_SEED = ("drawings", "prompts", "monitored", "held_out")
"""Parts of a config that all methods of a seed have in common."""
COMPARED = (
    "method", "reward", "gold", "drawings", "tuning", "monitor", "loop", "steering", "pipeline", "prompts",
    "monitored", "held_out", "imports", "seed", "seeds", "precision",
)  # fmt: skip
"""Parts of a config that make a run what it is: not the device, nor the preset's name, whose values stand in others."""
OF_PICTURES = ("precision", "image_size", "text_length")
"""Settings of a pipeline that all methods of a seed have in common: they change the base's images."""
OBJECTIVES_OF_GRADIENTS = ("truncated_chain", "one_step")


@dataclass(frozen=True)
class Base:
    """What runs that are there are held against.

    Attributes:
        digest: of its weights; None for a pipeline's.
        is_flow: what noise is where it is auto; None for a pipeline, which is not loaded for that.
    """

    digest: str | None = None
    is_flow: bool | None = None


def needs_gradient(method: str, objective: str) -> bool:
    """Whether a run climbs the gradient of its reward.

    Args:
        method: of steering, or of training, which has an objective.
        objective: of `TuningConfig`.
    """
    if method in STEERING:
        return method == "reno"
    return objective in OBJECTIVES_OF_GRADIENTS


def check_comparable(job: Job, first: Job) -> None:
    """Refuse methods of a seed that are trained or judged on different prompts, or from different noise.

    Raises:
        UserError: names what differs.
    """
    ours, theirs = (
        {name: each.config[name] for name in SAME_OF_A_SEED}
        | {name: each.config["monitor"][name] for name in ("eval_images", "eval_steps")}
        | {"seed of evaluations": each.config["seeds"]["evaluation"]}
        | _of_pictures(each.config)
        for each in (job, first)
    )
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"{job.label} would not compare with {first.label}: '{name}' differs; give both the same flags"
            )


def _of_pictures(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the denoiser computes in, and what else changes a pipeline's images."""
    if "pipeline" in config:
        return {name: config["pipeline"][name] for name in OF_PICTURES}
    return {"precision": config.get("precision", "fp32")}


def find_base(jobs: Sequence[Job]) -> Base:
    """Load the base for what runs that are there are held against.

    Raises:
        UserError: it cannot be loaded.
    """
    config = jobs[0].config
    return _described(None if "pipeline" in config else load_generator(config["base"]))


def _described(model: TextToImage | None) -> Base:
    if model is None:
        return Base()
    return Base(base_digest(model), isinstance(model.path, RectifiedFlow))


def try_out(jobs: Sequence[Job]) -> Base:
    """Load the base, and ask every reward for a value, before any run does.

    It also makes the classifier once that processes would make at the same time.

    Returns:
        What runs that are there are held against.

    Raises:
        UserError: something is missing or does not fit.
    """
    config, model = jobs[0].config, None
    if "pipeline" not in config:
        model = load_generator(config["base"])
        model.check_prompts(
            [prompt for job in jobs for part in SAME_OF_A_SEED[1:] for prompt in job.config[part]]
        )
    tried: dict[tuple[str, str], bool] = {}
    for job in jobs:
        key = job.config["reward"], job.config["gold"]
        if key not in tried:
            tried[key] = try_rewards(job.config, model)
        if needs_gradient(job.method, job.config["tuning"]["objective"]) and not tried[key]:
            raise UserError(
                f"{job.label}: reward '{job.config['reward']}' has no gradient, which {job.method} climbs; leave it "
                f'out, or give --variant NAME "{job.method} --reward ..."'
            )
    return _described(model)


def try_rewards(config: Mapping[str, Any], model: TextToImage | None) -> bool:
    """Make the rewards of a run, show them a gray image, and return whether the optimized one has a gradient."""
    rewards = rewards_of(config)
    if model is not None:
        image = torch.full((1, 3, *model.shape[1:]), 0.5)
        for reward in rewards.values():
            checked_reward(reward, image, config["held_out"][:1])
    return bool(getattr(rewards["proxy"], "differentiable", True))


def check_same(job: Job, base: Base) -> None:
    """Refuse to take a run that is there for another one than is asked for.

    Raises:
        UserError: it was made with other settings, or of another base; or its archive cannot be read.
    """
    if job.is_archived:
        read_archive(job.results)
    elif not (job.results / "config.json").is_file():
        return
    found = read_generator_config(job.results, job.config["command"])
    wanted = json.loads(json.dumps(job.config))
    defaults = {"tuning": TuningConfig(), "monitor": MonitorSettings(), "loop": TuningSettings()}
    if "pipeline" in wanted:
        defaults["pipeline"] = PipelineSettings()
    else:
        found.setdefault("precision", "fp32")  # as runs computed that do not say it
    if "steering" in wanted:
        defaults["steering"] = STEERING[job.method][1]
    for part, values in defaults.items():  # what later versions have added
        found[part] = to_dict(values) | found.get(part, {})
    tuning = wanted["tuning"]
    if base.is_flow is not None:
        tuning = to_dict(from_dict(TuningConfig, tuning).on_path(is_flow=base.is_flow))
    for name in ("noise", "noise_level"):  # a run that has begun says which it is
        if tuning[name] in ("auto", None) or found["tuning"][name] in ("auto", None):
            tuning[name] = found["tuning"][name]
    wanted["tuning"] = tuning
    told = (job.report or {}).get("base")
    compared = COMPARED if told and base.digest else ("base", *COMPARED)
    where = "weights of the base" if told and base.digest and told != base.digest else None
    for part in compared:
        ours, theirs = found.get(part), wanted.get(part)
        if job.is_archived:
            theirs = without_folders(theirs)
        where = where or difference(ours, theirs, part)
    if where:
        raise UserError(
            f"'{job.results}' was made with other settings than these ({where}); give other --runs and --archive, or "
            "the flags of that grid"
        )
