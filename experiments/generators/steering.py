"""Steering an image generator at inference instead of training it, and the report on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from agents.core.chain_steps import standard_normal
from agents.core.errors import UserError
from agents.core.memory import memory_errors_named
from agents.core.settings import from_dict
from agents.core.step_rules import Posterior
from agents.generative_models.chains import STILL
from agents.generative_models.credit import RewardFunction, checked_reward
from agents.generative_models.reward_gradients import is_recomputing
from agents.generative_models.steering import (
    BestOfNSettings,
    NoiseSearchSettings,
    SteeringSettings,
    best_of_n,
    fk_steer,
    optimize_noise,
)
from agents.generative_models.text_to_image import TextToImage
from experiments.generators.finetuning import (
    base_digest,
    draw,
    load_base,
    named_rewards,
    rewards_of,
)
from experiments.generators.report import write_report
from experiments.running.runs import abandon_run, begin_run, lock_run, make_run_dir

STEERING: dict[str, tuple[str, Any]] = {
    "fk-steering": ("particles that are resampled by their rewards", SteeringSettings()),
    "reno": ("gradient ascent of the reward in the first noise", NoiseSearchSettings()),
    "best-of-n": ("the best of several images", BestOfNSettings()),
}
"""Summary and default settings by name; none of them trains."""
NOISY = Posterior(1.0)
"""Step of particles, which must part again: DDPM's."""

LESS_MEMORY = {"fk-steering": ", --particles", "reno": "", "best-of-n": ", --candidates"}
"""What to lower beside --batch-size and --eval-images where memory does not suffice."""


@dataclass
class Spent:
    """What images have cost.

    Attributes:
        evaluations: samples that went through the denoiser, both halves of guidance included.
        rewards: images that the reward has seen.
    """

    evaluations: int = 0
    rewards: int = 0

    def count(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Count samples, as a hook before a denoiser; what is only computed again for a gradient does not count."""
        if not is_recomputing():
            self.evaluations += len(arguments[0])


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
    method = config["method"]
    rewards = rewards_of(config)
    base = load_base(config).requires_grad_(False).eval()
    with memory_errors_named(f"lower --batch-size{LESS_MEMORY[method]} or --eval-images"):
        base = base.to(config["device"])
        base.check_prompts(config["held_out"])
        if method == "reno" and not getattr(rewards["proxy"], "differentiable", True):
            raise UserError(
                f"reward '{config['reward']}' has no gradient, which reno climbs; use fk-steering or best-of-n"
            )
        is_new = make_run_dir(run)
        with lock_run(run):
            begin_run(run, config)
            try:
                return _write(run, config, base, rewards)
            except BaseException:
                abandon_run(run, is_new=is_new)
                raise


def _write(
    run: Path,
    config: Mapping[str, Any],
    base: TextToImage,
    rewards: Mapping[str, RewardFunction],
) -> Path:
    """Write the report on a base; its own images come from the rule that is steered, without steering."""
    count, prompts = config["monitor"]["eval_images"], config["held_out"]
    rule = NOISY if config["method"] == "fk-steering" else STILL
    plain, spent = Spent(), Spent()
    with _counted(base, plain):
        before = draw(base, prompts, count, config, rule=rule)
    begun = time.perf_counter()
    with _counted(base, spent):
        after = steered_images(base, rewards["proxy"], config, spent)
    seconds = time.perf_counter() - begun
    return write_report(
        run,
        title=f"{config['method']} on {config['reward']}, nothing trained",
        before=before,
        after=after,
        again=draw(base, prompts, count, config, noise=2, rule=rule),
        prompts=prompts,
        images=count,
        rewards=named_rewards(config, rewards),
        spent=vars(spent) | {"wall_seconds": seconds},
        base=base_digest(base),
        same_noise=False,
        notes=[
            f"Budget: {spent.evaluations:,} denoiser evaluations and {spent.rewards:,} rewards for {len(after):,} "
            f"images; without steering, {plain.evaluations:,} and none."
        ],
        batch=config["tuning"]["batch_size"],
        device=base.device,
    )


@contextmanager
def _counted(model: TextToImage, spent: Spent) -> Iterator[None]:
    hook = model.denoiser.register_forward_pre_hook(spent.count)
    try:
        yield
    finally:
        hook.remove()


def steered_images(
    model: TextToImage, reward: RewardFunction, config: Mapping[str, Any], spent: Spent
) -> Tensor:
    """Return steered images of each held-out prompt, [P * eval_images, 3, H, W] on the CPU, a few prompts at a time.

    Args:
        model: draws.
        reward: steers.
        config: of the run.
        spent: rewards are counted there.
    """
    settings = from_dict(type(STEERING[config["method"]][1]), config["steering"])
    copies = getattr(settings, "particles", getattr(settings, "candidates", 1))
    images, size = config["monitor"]["eval_images"], config["tuning"]["batch_size"]
    asked = [prompt for prompt in config["held_out"] for _ in range(images)]
    steps, guidance = config["monitor"]["eval_steps"], config["tuning"]["guidance"]
    noise = torch.Generator(model.device).manual_seed(config["seeds"]["evaluation"])
    results, some = [], max(1, size // copies)
    noisy = model.sampler(steps, NOISY)
    still, denoiser = model.sampler(steps, STILL), model.guided(guidance)
    for first in tqdm(range(0, len(asked), some), desc="steering", disable=None, leave=False):
        prompts = [p for p in asked[first : first + some] for _ in range(copies)]
        with torch.no_grad():
            condition = model.encode(prompts)
        start = standard_normal((len(prompts), *model.shape), noise, device=model.device)

        def of_samples(x: Tensor, prompts: list[str] = prompts) -> Tensor:
            spent.rewards += len(prompts)
            return checked_reward(reward, model.decode(x), prompts)

        if isinstance(settings, SteeringSettings):
            x = fk_steer(noisy, denoiser, of_samples, start, condition, noise, settings).best()
        elif isinstance(settings, NoiseSearchSettings):
            x = optimize_noise(still, denoiser, of_samples, start, condition, settings)
        else:
            x = best_of_n(still, denoiser, of_samples, start, condition, copies)
        results.append(model.decode(x).cpu())
    return torch.cat(results)
