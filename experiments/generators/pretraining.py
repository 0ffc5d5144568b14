"""Sessions that pretrain image generators: pictures, learner, loop, evaluations, logger and checkpoints of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.core.logging import Progress
from agents.core.run_loop import Hooks
from agents.core.settings import from_dict
from agents.core.step_rules import Posterior
from agents.generative_models.contact_sheet import contact_sheet, save_picture
from agents.generative_models.drawing_eval import evaluate_drawings
from agents.generative_models.drawings import DrawingSettings, load_drawings
from agents.generative_models.generator import GeneratorConfig, ImageGenerator
from agents.generative_models.pretraining import (
    PictureStream,
    Pretrainer,
    PretrainingConfig,
    PretrainingLoop,
    PretrainingSettings,
)
from agents.generative_models.scenes import KINDS, scenes
from agents.generative_models.text import Vocabulary
from experiments.generators.runs import GeneratorSession, compile_learner
from experiments.running.estimates import seconds_per_call

SHOWN = 32
"""Pictures on the sheet of an evaluation."""


class PretrainingSession(GeneratorSession):
    """One open run; arguments: see `GeneratorSession`."""

    loop: PretrainingLoop

    def __init__(self, run: Path, config: dict[str, Any], resume: bool) -> None:
        self.settings = from_dict(PretrainingSettings, config["loop"])
        super().__init__(run, config, resume, keep=self.settings.keep_checkpoints)
        seeds, device = config["seeds"], config["device"]
        self.about = from_dict(DrawingSettings, config["drawings"])
        vocabulary = vocabulary_of(self.about)
        drawings = load_drawings(self.about)
        learner = self._make_learner(vocabulary)
        self.stream = PictureStream(
            drawings, vocabulary.tokens(drawings.prompts), seed=seeds["replay"], device=device
        )
        rng = np.random.default_rng(seeds["evaluation"])
        count = self.settings.eval_prompts
        self.prompts = {
            side: [s.prompt for s in self.about.scenes(count, rng, held_out=side == "held_out")]
            for side in ("seen", "held_out")
        }
        self.loop = PretrainingLoop(
            learner,
            self.stream,
            self.settings,
            logger=self.open_logger(),
            checkpoints=self.checkpoints,
            hooks=Hooks(evaluate=self.evaluate),
        )
        self.begin()

    def _make_learner(self, vocabulary: Vocabulary) -> Pretrainer:
        generator = ImageGenerator(from_dict(GeneratorConfig, self.config["generator"]), vocabulary)
        learning = from_dict(PretrainingConfig, self.config["learning"])
        learner = Pretrainer(
            generator.to(self.config["device"]),
            learning,
            seed=self.config["seeds"]["exploration"],
            steps=self.settings.steps,
        )
        compile_learner(learner, self.config)
        return learner

    def estimate(self) -> str:
        """Return a line on generator and pictures, and one on the time that is left."""
        learner = self.loop.agent
        # A twin is built and trained: nothing of the run is touched.
        with torch.random.fork_rng(devices=[]):
            twin = self._make_learner(learner.image_generator.vocabulary)
        batch = self.stream.first(learner.config.batch_size)
        update = seconds_per_call(lambda: twin.update(batch), calls=4, warmup=2)
        left = self.settings.steps - self.loop.state.progress.agent_steps
        parameters = sum(p.numel() for p in learner.image_generator.parameters())
        return (
            f"generator: {parameters / 1e6:.2f} million parameters; data: {len(self.stream):,} drawings\n"
            f"estimate: {left * update / 60:.0f} min for {left:,} gradient steps ({1000 * update:.0f} ms each), "
            "and evaluations"
        )

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Draw pictures for fixed prompts from fixed noise, judge them, and show some of the held-out ones."""
        generator = self.loop.agent.average.module
        values = {}
        for side, prompts in self.prompts.items():
            images = generator.generate(
                prompts,
                seed=self.config["seeds"]["evaluation"],
                steps=self.settings.eval_steps,
                rule=Posterior(0.0),
                scale=self.settings.guidance,
            )
            verdicts = evaluate_drawings(images, prompts)
            values[f"eval/{side}_strict"] = float(np.mean([v.strict for v in verdicts]))
            values[f"eval/{side}_graded"] = float(np.mean([v.graded for v in verdicts]))
        sheet = contact_sheet(images[:SHOWN], prompts[:SHOWN])
        save_picture(self.run / "samples.png", sheet)
        self.logger.images({"samples/held_out": sheet}, progress)
        return values


def vocabulary_of(settings: DrawingSettings) -> Vocabulary:
    """Return the words of all prompts that drawings of some settings can have, held-out ones included."""
    return Vocabulary.of(
        scene.prompt
        for kind in KINDS
        if kind in settings.kinds
        for scene in scenes(kind, longest_text=settings.longest_text)
    )
