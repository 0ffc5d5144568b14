"""A generator of 4 x 4 pictures whose best denoiser is known, and rewards of them: methods learn on it in seconds.

For the prompt c its pictures are N(mean_c, SPREAD^2) in every number, where mean_c is a linear function of the encoded
prompt; at first it is 0 for all. That mean is all that can be learned, and the rest is the closed form.
"""

import torch
from torch import nn

from agents.generative_models.generator import GeneratorConfig, ImageGenerator
from agents.generative_models.text import Vocabulary

SPREAD = 0.4
PROMPTS = ("a red square", "a blue square", "a green circle", "a red circle")


class GaussianDenoiser(nn.Module):
    """The closed form of E[x0 | x_t] and E[noise | x_t] for data N(mean_c, SPREAD^2)."""

    def __init__(self, path, kind, shape, features):
        super().__init__()
        self.path, self.kind, self.shape = path, kind, shape
        self.mean = nn.Linear(features, shape[0] * shape[1] * shape[2])
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)

    def forward(self, x, t, condition):
        mean = self.mean(condition.mean(1)).unflatten(1, self.shape)
        c = self.path.coefficients(t.double()).beside(x)
        scaled = (x - c.alpha * mean) / (c.alpha**2 * SPREAD**2 + c.sigma**2)
        x0, noise = mean + c.alpha * SPREAD**2 * scaled, c.sigma * scaled
        return self.path.target(self.kind, x0, noise, t)


def toy_generator(path="flow", seed=0):
    config = GeneratorConfig(
        network="dit", path=path, size=4, width=8, depth=0, heads=1, patch=2, levels=1,
        text_features=8, text_blocks=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = ImageGenerator(config, Vocabulary.of(PROMPTS))
    generator.denoiser = GaussianDenoiser(generator.path, generator.kind, generator.shape, 8)
    return generator


def tiny_network(network="unet", path="flow", seed=0):
    """A real network of random weights, its last layer included (which begins with zeros)."""
    config = GeneratorConfig(
        network=network, path=path, size=8, width=16, depth=1, heads=2, patch=2, levels=1, text_features=16,
        text_blocks=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = ImageGenerator(config, Vocabulary.of(PROMPTS))
        for parameter in generator.parameters():
            nn.init.normal_(parameter, std=0.1)
    return generator


def redness(images, prompts):
    """Red minus the mean of green and blue; differentiable."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
