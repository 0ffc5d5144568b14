"""Sessions that pretrain image generators: pictures, learner, loop, evaluations, logger and checkpoints of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.logging import Logger, Progress
from agents.core.run_loop import Hooks
from agents.core.seeding import seed_libraries
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
from experiments.running.estimates import seconds_per_call

SHOWN = 32
"""Pictures on the sheet of an evaluation."""


class PretrainingSession:
    """One open run.

    Args:
        run: its folder.
        config: config.json's content.
        resume: go on from the newest checkpoint.
    """

    def __init__(self, run: Path, config: dict[str, Any], resume: bool) -> None:
        self.run, self.config = run, config
        seeds, device = config["seeds"], config["device"]
        self.settings = from_dict(PretrainingSettings, config["loop"])
        self.about = from_dict(DrawingSettings, config["drawings"])
        vocabulary = vocabulary_of(self.about)
        drawings = load_drawings(self.about)
        seed_libraries(seeds["agent"])
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
        self.checkpoints = CheckpointStore(
            run, keep=self.settings.keep_checkpoints, identity={"generator": config["command"]}
        )
        goes_on = resume and self.checkpoints.latest() is not None
        parts = self.checkpoints.load() if goes_on else None
        done = parts["progress"]["agent_steps"] if parts else 0
        self.logger = Logger(run, resume_from=done if resume else None)
        self.loop = PretrainingLoop(
            learner,
            self.stream,
            self.settings,
            logger=self.logger,
            checkpoints=self.checkpoints,
            hooks=Hooks(evaluate=self.evaluate),
        )
        if parts:
            self.loop.resume(parts)
        else:
            self.loop.begin()

    def _make_learner(self, vocabulary: Vocabulary) -> Pretrainer:
        generator = ImageGenerator(from_dict(GeneratorConfig, self.config["generator"]), vocabulary)
        learning = from_dict(PretrainingConfig, self.config["learning"])
        return Pretrainer(
            generator.to(self.config["device"]),
            learning,
            seed=self.config["seeds"]["exploration"],
            steps=self.settings.steps,
        )

    def settle(self) -> None:
        """Set the number of CPU threads, once for the whole run."""
        self.config["threads"] = self.config["threads"] or torch.get_num_threads()
        torch.set_num_threads(self.config["threads"])

    def estimate(self) -> str:
        """Return a line on generator and pictures, and one on the time that is left."""
        learner = self.loop.agent
        with torch.random.fork_rng(
            devices=[]
        ):  # a twin is built and trained: nothing of the run is touched
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

    def close(self) -> None:
        """Close the logger."""
        self.logger.close()


def vocabulary_of(settings: DrawingSettings) -> Vocabulary:
    """Return the words of all prompts that drawings of some settings can have, held-out ones included."""
    return Vocabulary.of(
        scene.prompt
        for kind in KINDS
        if kind in settings.kinds
        for scene in scenes(kind, longest_text=settings.longest_text)
    )
