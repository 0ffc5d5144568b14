"""Steering an image generator at inference instead of training it, and the report on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from agents.core.chain_steps import standard_normal
from agents.core.errors import UserError
from agents.core.settings import from_dict
from agents.core.step_rules import Posterior
from agents.generative_models.chains import STILL
from agents.generative_models.credit import RewardFunction, checked_reward
from agents.generative_models.steering import (
    BestOfNSettings,
    NoiseSearchSettings,
    SteeringSettings,
    best_of_n,
    fk_steer,
    optimize_noise,
)
from agents.generative_models.text_to_image import TextToImage
from agents.generative_models.tuning_loop import named_memory_errors
from experiments.generators.finetuning import draw, load_base, named_rewards, rewards_of
from experiments.generators.report import write_report
from experiments.running.runs import abandon_run, begin_run, lock_run, make_run_dir

STEERING: dict[str, tuple[str, Any]] = {
    "fk-steering": ("particles that are resampled by their rewards", SteeringSettings()),
    "reno": ("gradient ascent of the reward in the first noise", NoiseSearchSettings()),
    "best-of-n": ("the best of several images", BestOfNSettings()),
}
"""Summary and default settings by name; none of them trains."""


def steer(run: Path, config: dict[str, Any]) -> Path:
    """Draw held-out prompts with and without steering, and write the report into a new run folder.

    Args:
        run: the folder; it is made.
        config: config.json's content.

    Returns:
        The report's page.
    """
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    rewards = rewards_of(config)
    base = load_base(config).requires_grad_(False).eval()
    with named_memory_errors():
        base = base.to(config["device"])
        base.check_prompts(config["held_out"])
    if config["method"] == "reno" and not getattr(rewards["proxy"], "differentiable", True):
        raise UserError(
            f"reward '{config['reward']}' has no gradient, which reno climbs; use fk-steering or best-of-n"
        )
    is_new = make_run_dir(run)
    with lock_run(run):
        begin_run(run, config)
        try:
            count = config["monitor"]["eval_images"]
            before = draw(base, config["held_out"], count, config)
            after = steered_images(base, rewards["proxy"], config)
            return write_report(
                run,
                title=f"{config['method']} on {config['reward']}, nothing trained",
                before=before,
                after=after,
                again=draw(base, config["held_out"], count, config, noise=2),
                prompts=config["held_out"],
                images=count,
                rewards=named_rewards(config, rewards),
                same_noise=False,
            )
        except BaseException:
            abandon_run(run, is_new=is_new)
            raise


def steered_images(model: TextToImage, reward: RewardFunction, config: Mapping[str, Any]) -> Tensor:
    """Return steered images of each held-out prompt, [P * eval_images, 3, H, W] on the CPU, a few prompts at a time."""
    settings = from_dict(type(STEERING[config["method"]][1]), config["steering"])
    copies = getattr(settings, "particles", getattr(settings, "candidates", 1))
    images, size = config["monitor"]["eval_images"], config["tuning"]["batch_size"]
    asked = [prompt for prompt in config["held_out"] for _ in range(images)]
    steps, guidance = config["monitor"]["eval_steps"], config["tuning"]["guidance"]
    noise = torch.Generator(model.device).manual_seed(config["seeds"]["evaluation"])
    results, some = [], max(1, size // copies)
    noisy = model.sampler(steps, Posterior(1.0))
    still, denoiser = model.sampler(steps, STILL), model.guided(guidance)
    for first in tqdm(range(0, len(asked), some), desc="steering", disable=None, leave=False):
        prompts = [p for p in asked[first : first + some] for _ in range(copies)]
        with torch.no_grad():
            condition = model.encode(prompts)
        start = standard_normal((len(prompts), *model.shape), noise, device=model.device)

        def of_samples(x: Tensor, prompts: list[str] = prompts) -> Tensor:
            return checked_reward(reward, model.decode(x), prompts)

        if isinstance(settings, SteeringSettings):
            x = fk_steer(noisy, denoiser, of_samples, start, condition, noise, settings).best()
        elif isinstance(settings, NoiseSearchSettings):
            x = optimize_noise(still, denoiser, of_samples, start, condition, settings)
        else:
            x = best_of_n(still, denoiser, of_samples, start, condition, copies)
        results.append(model.decode(x).cpu())
    return torch.cat(results)
