"""A generator of random weights, as a base to fine-tune."""

import itertools
import json
from pathlib import Path

import torch

from agents.core.settings import to_dict
from agents.generative_models.drawings import DrawingSettings
from agents.generative_models.generator import GeneratorConfig, ImageGenerator, save_generator
from experiments.generators.pretraining import vocabulary_of

DRAWINGS = DrawingSettings(size=16, kinds=("single",), pictures=8)


def write_base(folder: Path, seed: int = 0) -> Path:
    """Write a tiny generator, its last layer random too, and what its prompts are; return its folder."""
    config = GeneratorConfig(
        size=16, width=16, depth=1, heads=2, text_features=16, text_blocks=1, levels=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = ImageGenerator(config, vocabulary_of(DRAWINGS))
        for parameter in generator.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    save_generator(folder, generator)
    (folder / "config.json").write_text(json.dumps({"drawings": to_dict(DRAWINGS)}))
    return folder


_calls = itertools.count()


def fading(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return a reward that is less whenever it is asked: of a run, the base has the most of it."""
    return torch.full((len(images),), -float(next(_calls)))
