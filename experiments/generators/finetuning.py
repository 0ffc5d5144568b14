"""Sessions that fine-tune image generators: base, rewards, prompts, tuner, monitor, loop and report of one run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from agents.core.errors import UserError
from agents.core.logging import Progress
from agents.core.ranks import Ranks
from agents.core.run_loop import Hooks
from agents.core.settings import from_dict, to_dict
from agents.core.step_rules import StepRule
from agents.generative_models.chains import STILL, largest_excess
from agents.generative_models.contact_sheet import contact_sheet, save_picture
from agents.generative_models.credit import RewardFunction
from agents.generative_models.drawings import DrawingSettings
from agents.generative_models.generator import (
    PART,
    ImageGenerator,
    generator_of,
    load_generator,
)
from agents.generative_models.monitor import Monitor, MonitorSettings
from agents.generative_models.pipeline_generator import (
    PipelineGenerator,
    PipelineSettings,
    load_pipeline,
)
from agents.generative_models.rewards import make_reward
from agents.generative_models.scenes import parse_prompt
from agents.generative_models.text_to_image import TextToImage
from agents.generative_models.tuner import GeneratorTuner
from agents.generative_models.tuners import make_tuner
from agents.generative_models.tuning_config import TuningConfig
from agents.generative_models.tuning_loop import (
    PromptStream,
    TuningLoop,
    TuningSettings,
    named_memory_errors,
)
from experiments.generators.plots import monitor_plot
from experiments.generators.report import FOLDER, is_current, write_report
from experiments.generators.runs import GeneratorSession, compile_learner
from experiments.sessions.teachers import networks_digest

MOST_EXCESS = 1.5
"""Noise of a training step over what the network expects, above which a run warns."""
SHOWN = 8
"""Prompts on the sheet of an evaluation."""
STRICT = "drawings_strict"
"""Reward that says whether a picture is all that its prompt asks for."""
SHEETS = "samples"
"""Folder of the sheets, one for each evaluation."""
LORA = "lora"
"""Folder of what a pipeline has learned, as diffusers reads it."""


class FineTuningSession(GeneratorSession):
    """One open run; arguments: see `GeneratorSession`."""

    loop: TuningLoop

    def __init__(
        self, run: Path, config: dict[str, Any], resume: bool, ranks: Ranks | None = None
    ) -> None:
        self.settings = from_dict(TuningSettings, config["loop"])
        super().__init__(run, config, resume, keep=self.settings.keep_checkpoints, ranks=ranks)
        device = self.ranks.device(config["device"])
        seeds, about = config["seeds"], from_dict(TuningConfig, config["tuning"])
        self.rewards = rewards_of(config)
        # A run has all of its base, but of a pipeline: where that is now, or what has become of it, does not matter.
        base = generator_of(self.parts[PART]) if self.parts else load_base(config)
        set_precision(base, config)
        with named_memory_errors():
            base = base.to(device)
            base.check_prompts([*config["prompts"], *config["monitored"], *config["held_out"]])
        self.monitor = Monitor(
            config["monitored"],
            self.rewards,
            from_dict(MonitorSettings, config["monitor"]),
            guidance=about.guidance,
            seed=seeds["evaluation"],
            batch_size=about.batch_size,
        )
        tuner = make_tuner(
            base, self.rewards["proxy"], about, device=device, seed=seeds["exploration"],
            ranks=self.ranks,
        )  # fmt: skip
        compile_learner(tuner, config)
        config["tuning"] = to_dict(tuner.config)  # with the noise that auto is on this base
        _warn_of_grain(tuner)
        self.loop = TuningLoop(
            tuner,
            PromptStream(config["prompts"], seeds["replay"]),
            self.monitor,
            self.settings,
            logger=self.open_logger(),
            checkpoints=self.checkpoints,
            hooks=Hooks(evaluate=self.evaluate),
        )
        self.begin()

    @property
    def tuner(self) -> GeneratorTuner:
        """What learns."""
        return self.loop.agent

    @property
    def is_over(self) -> bool:
        """Whether the run has all its iterations, or the monitor has ended it."""
        done = self.loop.state.progress.agent_steps
        return done >= self.settings.steps or self.loop.why_over() is not None

    def estimate(self) -> str:
        """Return what is learned, and what an iteration is; time is known after the first of them."""
        parameters = sum(p.numel() for p in self.tuner.parameters)
        about = self.tuner.config
        left = self.settings.steps - self.loop.state.progress.agent_steps
        return (
            f"fine-tuning: {parameters / 1e6:.2f} million parameters by {self.config['method']}, reward "
            f"'{self.config['reward']}', gold '{self.config['gold']}'; {len(self.config['prompts'])} prompts\n"
            f"{left} iterations of {about.prompts * about.group} images in {about.denoising_steps} steps"
        )

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Measure the model, and show the same held-out prompts from the same noise; other processes hear of it."""
        return self.ranks.told(self._measured(progress) if self.ranks.is_first else {})

    def _measured(self, progress: Progress) -> dict[str, float]:
        step = progress.agent_steps
        with self.tuner.averaged() as model:
            said = self.monitor.measure(step, model, self.tuner.reference)
        count = self.monitor.settings.eval_images
        asked = self.monitor.asked[: SHOWN * count]
        sheet = contact_sheet(self.monitor.images[: len(asked)], asked, columns=count)
        (self.run / SHEETS).mkdir(exist_ok=True)
        save_picture(self.run / SHEETS / f"step-{step:06d}.png", sheet)
        monitor_plot(
            self.run / "monitor.png",
            self.monitor.history,
            self.monitor.settings.tolerance,
            proxy=self.config["reward"],
            gold=self.config["gold"],
        )
        self.logger.images({"samples/held_out": sheet}, progress)
        return {f"eval/{name}": value for name, value in said.values.items()}

    def report(self) -> Path:
        """Write the run's report: the base against the checkpoint of the most gold, on held-out prompts.

        One that is up to date stays as it is.
        """
        page = self.run / FOLDER / "report.md"
        done = self.loop.state.progress.agent_steps
        made_of = {
            "iterations": done,
            "evaluations": len(self.monitor.history),
            "over": self.loop.why_over(),
        }
        if is_current(page, made_of):
            return page
        with named_memory_errors():
            return self._report(made_of)

    def _report(self, made_of: Mapping[str, Any]) -> Path:
        spent = {
            "evaluations": self.tuner.evaluations,
            "rewards": self.tuner.scored,
            "wall_seconds": self.loop.state.progress.wall_seconds,
        }
        over, done = self.loop.why_over(), self.loop.state.progress.agent_steps
        count = self.monitor.settings.eval_images
        prompts, reference = self.config["held_out"], self.tuner.reference
        before = draw(reference, prompts, count, self.config)
        kept = []
        with self.at_best() as (model, best_step):
            after = draw(model, prompts, count, self.config)
            if isinstance(model, PipelineGenerator):
                model.save_lora(self.run / LORA)
                kept.append(
                    f"Its LoRA: `pipe.load_lora_weights('{self.run / LORA}')` in diffusers."
                )
        last = None
        if best_step != done:
            with self.tuner.averaged() as model:
                last = done, draw(model, prompts, count, self.config)
        return write_report(
            self.run,
            title=f"{self.config['method']} on {self.config['reward']}",
            before=before,
            after=after,
            again=draw(reference, prompts, count, self.config, noise=2),
            prompts=prompts,
            images=count,
            rewards=named_rewards(self.config, self.rewards),
            spent=spent,
            step=best_step,
            last=last,
            base=base_digest(reference),
            history=self.monitor.history,
            tolerance=self.monitor.settings.tolerance,
            names=(self.config["reward"], self.config["gold"]),
            notes=[
                f"After is the checkpoint of the most gold, iteration {best_step} of {done}.",
                f"Budget: {spent['evaluations']:,} denoiser evaluations, {spent['rewards']:,} rewards, "
                f"{spent['wall_seconds'] / 60:.1f} min.",
                *([f"What ended the run: {over}."] if over else []),
                *kept,
            ],
            made_of=made_of,
            batch=self.tuner.config.batch_size,
            device=self.tuner.device,
        )

    @contextmanager
    def at_best(self) -> Iterator[tuple[TextToImage, int]]:
        """Lend the model with its weights at the evaluation of the most gold, and that evaluation's iteration."""
        model, parts = self.tuner.model, self.checkpoints.load("best")
        now = {name: value.clone() for name, value in model.state_dict().items()}
        self.tuner.lend_weights(parts["agent"]["networks"])
        try:
            yield model, parts["progress"]["agent_steps"]
        finally:
            model.load_state_dict(now)


def _warn_of_grain(tuner: GeneratorTuner) -> None:
    """Say so where chains of training have much more noise than the network expects."""
    if "noise" not in tuner.config.fields_read():
        return
    excess = largest_excess(tuner.sampler())
    if excess > MOST_EXCESS:
        warnings.warn(
            f"a step of training leaves {excess:.1f} times the noise that the network expects after it: images may "
            "come out grainy; give more --denoising-steps, a lower --noise-level, or --noise posterior",
            stacklevel=2,
        )


def rewards_of(config: Mapping[str, Any]) -> dict[str, RewardFunction]:
    """Return proxy and gold of a run, and the strict judge of drawings where all held-out prompts ask for these."""
    rewards: dict[str, RewardFunction] = {
        "proxy": make_reward(config["reward"]),
        "gold": make_reward(config["gold"]),
    }
    with suppress(UserError):
        for prompt in [*config["monitored"], *config["held_out"]]:
            parse_prompt(prompt)
        rewards["strict"] = make_reward(STRICT)
    return rewards


def named_rewards(
    config: Mapping[str, Any], rewards: Mapping[str, RewardFunction]
) -> dict[str, RewardFunction]:
    """Return the rewards of a report by what a reader calls them."""
    named = {
        f"{config['reward']} (optimized)": rewards["proxy"],
        f"{config['gold']} (not optimized)": rewards["gold"],
    }
    return named | {STRICT: rewards["strict"]} if "strict" in rewards else named


def set_precision(base: TextToImage, config: Mapping[str, Any]) -> None:
    """Let a generator of ours compute as a run's config says; a pipeline does from its loading on."""
    if isinstance(base, ImageGenerator):
        base.compute_in(config.get("precision", "fp32"))  # older runs say nothing


def load_base(config: Mapping[str, Any]) -> TextToImage:
    """Return the generator that a run begins with, on the CPU."""
    if "pipeline" not in config:
        base = load_generator(config["base"])
        set_precision(base, config)
        return base
    settings = from_dict(PipelineSettings, config["pipeline"])
    return load_pipeline(config["base"], settings, seed=config["seeds"]["agent"])


def base_digest(base: TextToImage) -> str | None:
    """Return SHA-256 over a base's weights; None for a pipeline's, which are gigabytes."""
    return None if isinstance(base, PipelineGenerator) else networks_digest({"base": base})


def draw(
    model: TextToImage,
    prompts: list[str],
    count: int,
    config: Mapping[str, Any],
    *,
    noise: int = 1,
    rule: StepRule = STILL,
) -> Tensor:
    """Return `count` images of each of the report's prompts, from noise that neither training nor monitor has seen.

    Args:
        model: draws.
        prompts: what.
        count: images of each.
        config: of the run.
        noise: its number; images of different numbers are independent.
        rule: of the steps.
    """
    seeds = np.random.SeedSequence((config["seeds"]["evaluation"], noise))
    seed = int(seeds.generate_state(1)[0])
    return model.generate(
        [prompt for prompt in prompts for _ in range(count)],
        seed=seed,
        steps=config["monitor"]["eval_steps"],
        rule=rule,
        scale=config["tuning"]["guidance"],
        batch=config["tuning"]["batch_size"],
        label="report",
    )


def split_held_out(
    prompts: list[str], monitored: int, reported: int | None = None
) -> tuple[list[str], list[str]]:
    """Return prompts of the monitor and of the report, apart: the monitor chooses the checkpoint that is reported.

    Args:
        prompts: held out from training; fewer than four serve both.
        monitored: prompts of the monitor; where there are too few for both, at most half of all.
        reported: prompts of the report; None for all others.
    """
    if reported is not None and len(prompts) >= monitored + reported:
        return prompts[:monitored], prompts[monitored : monitored + reported]
    if len(prompts) < 4:
        return prompts, prompts
    count = min(monitored, len(prompts) // 2)
    return prompts[:count], prompts[count:]


def choose_prompts(
    about: dict[str, Any] | None, file: Path | None, count: int, *, held_out: bool, seed: int
) -> list[str]:
    """Return prompts of a file, one in each line, or drawn from those that the base was pretrained on.

    Args:
        about: settings of the base's drawings, None where it has none.
        file: of prompts; None draws.
        count: how many to draw; of a file all are taken.
        held_out: which side of the split.
        seed: of the choice.

    Raises:
        UserError: the file is missing or empty, or there is neither file nor drawings.
    """
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompts from '{file}': {error}") from error
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not prompts:
            raise UserError(f"'{file}' holds no prompts; write one in each line")
        return prompts
    if about is None:
        flag = "--held-out" if held_out else "--prompt-file"
        raise UserError(f"the base says nothing of prompts; give {flag} FILE, one in each line")
    settings, random = from_dict(DrawingSettings, about), np.random.default_rng(seed)
    scenes = settings.scenes(8 * count, random, held_out=held_out)
    return list(dict.fromkeys(scene.prompt for scene in scenes))[:count]
