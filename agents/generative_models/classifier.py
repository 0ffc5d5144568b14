"""A small CNN that counts the things of each color and shape in a picture: a learned, differentiable ShapesEval.

It can be fooled where ShapesEval cannot, which is what it is for: optimized against, it shows reward hacking, with
ShapesEval as the gold reward beside it. Its reward is the mean log-probability, over all 18 pairs of color and shape,
that the picture holds exactly the number that the prompt asks for. It knows nothing of sizes, places and relations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.settings import to_dict
from agents.generative_models.drawings import DrawingSettings, cache_folder, load_drawings
from agents.generative_models.scenes import COLORS, SHAPES, Scene, parse_prompt

MOST = 4
"""The greatest number that a prompt asks for."""
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
"""What is counted, in the order of the answers."""
PART = "classifier"
"""Name of the files that hold one, and of the checkpoint's part."""
PICTURES, STEPS, BATCH_SIZE = 20_000, 3000, 64
"""Of the training of the classifier that is used when no folder is given: about a minute on one core."""


class ThingCounter(nn.Module):
    """Images [B, 3, S, S] in [0, 1] -> logits of numbers 0 to 4, [B, 18, 5].

    Numbers are additive, so features are summed over the picture, not averaged.

    Args:
        width: channels of the last convolution.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        sizes = [3, width // 2, width, width]
        self.features = nn.Sequential(
            *[
                layer
                for a, b in pairwise(sizes)
                for layer in (
                    nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                )
            ]
        )
        self.mix = nn.Conv2d(width, 2 * width, 1)
        self.answer = nn.Sequential(
            nn.Linear(2 * width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, len(PAIRS) * (MOST + 1)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        pooled = F.relu(self.mix(self.features(2 * images - 1))).sum((2, 3)) / 8
        return self.answer(pooled).unflatten(1, (len(PAIRS), MOST + 1))


def numbers(scene: Scene) -> list[int]:
    """Return how many things of every pair of color and shape a scene asks for.

    Raises:
        UserError: it asks for text.
    """
    if scene.text is not None:
        raise UserError(
            f"the classifier counts shapes and cannot judge '{scene.prompt}'; use the reward glyphs"
        )
    counts = dict.fromkeys(PAIRS, 0)
    for group in scene.groups:
        counts[group.color, group.shape] += group.count
    return list(counts.values())


@torch.enable_grad()  # rewards are asked where gradients are off
def train_counter(
    drawings: DrawingSettings, *, steps: int, batch_size: int, seed: int, folder: Path | None = None
) -> ThingCounter:
    """Train a classifier on drawings.

    Args:
        drawings: what it sees, of shapes.
        steps: gradient steps.
        batch_size: pictures in each.
        seed: of weights and batches.
        folder: cache of the drawings.
    """
    data = load_drawings(drawings, folder)
    labels = torch.tensor([numbers(parse_prompt(prompt)) for prompt in data.prompts])
    images, prompt = torch.from_numpy(data.images), torch.from_numpy(data.prompt)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        counter = ThingCounter()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(counter.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.from_numpy(rng.integers(len(images), size=batch_size))
        logits = counter(images[rows].float() / 255)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[prompt[rows]].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return counter.eval()


def save_counter(folder: Path, counter: ThingCounter, step: int = 0) -> None:
    """Write a classifier into a folder; it appears whole or not at all."""
    tree = {"width": counter.width, "weights": dict(counter.state_dict())}
    CheckpointStore(folder, identity={"model": PART}).save(step, {PART: tree})


def load_counter(folder: Path) -> ThingCounter:
    """Return the classifier that `save_counter` wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (folder / "checkpoints").is_dir():
        raise UserError(
            f"'{folder}' holds no classifier; leave the folder out to train one on drawings, or give one that "
            "classifier.save_counter wrote"
        )
    tree = CheckpointStore(folder, identity={"model": PART}).load()[PART]
    counter = ThingCounter(tree["width"])
    counter.load_state_dict(tree["weights"])
    return counter.eval()


def default_counter(size: int) -> ThingCounter:
    """Return the classifier for drawings of some size: from the cache, or trained and kept there."""
    drawings = DrawingSettings(size=size, pictures=PICTURES, seed=1)
    training = {"steps": STEPS, "batch_size": BATCH_SIZE}
    about = json.dumps({"drawings": to_dict(drawings), **training}, sort_keys=True)
    folder = cache_folder().parent / f"classifier-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    if not CheckpointStore(folder).latest():
        print(f"training the classifier on drawings of {size} pixels, once", flush=True)
        save_counter(folder, train_counter(drawings, steps=STEPS, batch_size=BATCH_SIZE, seed=0))
    return load_counter(folder)


def log_likelihood(counter: ThingCounter, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the reward, float32 [B], not positive; differentiable in the images."""
    asked = torch.tensor([numbers(parse_prompt(prompt)) for prompt in prompts])
    log_prob = counter(images.float()).log_softmax(-1)
    return log_prob.gather(-1, asked.to(images.device)[..., None])[..., 0].mean(1)


def classifier_reward(argument: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Return the reward of the classifier in a folder, or without one of that for the images' size."""
    counters: dict[tuple[int, torch.device], ThingCounter] = {}
    if argument:
        load_counter(Path(argument))  # a mistake is told at once

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        key = images.shape[-1], images.device
        if key not in counters:
            counter = load_counter(Path(argument)) if argument else default_counter(key[0])
            counters[key] = counter.to(images.device).requires_grad_(False)
        return log_likelihood(counters[key], images, prompts)

    return reward
