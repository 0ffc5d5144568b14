"""Rewards of images by name: `make_reward("shapes")`, `make_reward("compressibility:0.5+shapes:1")`.

A reward takes images float [B, 3, H, W] in [0, 1] and their prompts, and returns float32 [B], more is better. It says
whether it is differentiable, that is, whether a gradient reaches the images. Sums are written with `+`, weights behind
`:`, arguments in brackets: `color(blue):2`. Any callable of this signature is a reward too, as `module:function`; it is
differentiable when it has an attribute `differentiable` that says so.

| name | value | from |
| --- | --- | --- |
| `compressibility` | - kilobytes as a JPEG of quality 95 | DDPO (Black et al. 2023, arXiv:2305.13301, section 5.1) |
| `incompressibility` | + kilobytes | the same |
| `brightness` | mean luma, in [0, 1] | ITU-R BT.601 |
| `color(NAME)` | 1 - mean distance to the color, scaled to [0, 1] | |
| `symmetry` | 1 - mean difference to the mirror image, in [0, 1] | |
| `shapes`, `shapes_strict` | ShapesEval's graded and strict answer | `shapes_eval` |
| `glyphs`, `glyphs_strict` | share of characters that are right; all of them | `glyphs` |
| `drawings`, `drawings_strict` | one of the former two, as each prompt asks | `drawing_eval` |
| `classifier` or `classifier(FOLDER)` | log-probability of the things asked for, by a small CNN | `classifier` |
| `clip(FOLDER)`, `pickscore(FOLDER)`, `aesthetic(FOLDER)` | of local weights | `transformers_rewards` |
"""

from __future__ import annotations

import importlib
import io
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from agents.core.errors import UserError
from agents.generative_models.classifier import classifier_reward
from agents.generative_models.credit import checked_values
from agents.generative_models.drawing_eval import evaluate_drawings
from agents.generative_models.scenes import COLORS, parse_prompt
from agents.generative_models.transformers_rewards import (
    aesthetic_reward,
    clip_reward,
    pickscore_reward,
)

JPEG_QUALITY = 95
"""DDPO's."""
THREADED_PIXELS = 128 * 128
"""Pictures of at least so many pixels are compressed on threads; a smaller one takes less time than handing it over."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue."""


class Reward(Protocol):
    """What a generator can be trained for."""

    @property
    def differentiable(self) -> bool:
        """Whether a gradient reaches the images."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards, float32 [B], of images [B, 3, H, W] in [0, 1]."""


@dataclass(frozen=True)
class NamedReward:
    """A function of images and prompts, with what is known of it."""

    name: str
    function: Callable[[Tensor, Sequence[str]], Tensor]
    differentiable: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards, float32 [B].

        Raises:
            UserError: prompts are not as many as images, or the function's values are no finite numbers [B].
        """
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} images and {len(prompts)} prompts; give one each")
        return checked_values(self.function(images, prompts), prompts, self.name).to(images.device)


@dataclass(frozen=True)
class WeightedSum:
    """A sum of rewards.

    Attributes:
        parts: each with its weight.
    """

    parts: tuple[tuple[Reward, float], ...]

    @property
    def differentiable(self) -> bool:
        """Whether all parts are."""
        return all(reward.differentiable for reward, _ in self.parts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards, float32 [B]."""
        values = [weight * reward(images, prompts) for reward, weight in self.parts]
        return torch.stack(values).sum(0)


# -------------------------------------------------------------------------------------- pixels


def kilobytes(images: Tensor) -> Tensor:
    """Return the size of every image as a JPEG, in 1000 bytes, float32 [B]."""
    pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    if pixels.shape[1] * pixels.shape[2] >= THREADED_PIXELS and len(pixels) > 1:
        sizes = list(_pool().map(_jpeg_bytes, pixels))
    else:
        sizes = [_jpeg_bytes(picture) for picture in pixels]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


def _jpeg_bytes(picture: object) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)  # type: ignore[arg-type]
    return buffer.tell()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="reward")


def brightness(images: Tensor) -> Tensor:
    """Return the mean luma of images, [B]."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    return (images.mean((2, 3)) * weights).sum(1)


def color_likeness(images: Tensor, color: Sequence[float]) -> Tensor:
    """Return 1 - the mean distance of pixels to a color over the greatest distance there is, [B]."""
    target = torch.tensor(tuple(color), dtype=images.dtype, device=images.device)[:, None, None]
    # The root's slope is infinite where a pixel has the color exactly.
    distance = ((images - target).square().sum(1) + 1e-8).sqrt()
    return 1 - distance.mean((1, 2)) / 3**0.5


def symmetry(images: Tensor) -> Tensor:
    """Return 1 - the mean absolute difference between images and their mirror images, [B]."""
    return 1 - (images - images.flip(-1)).abs().mean((1, 2, 3))


# -------------------------------------------------------------------------------------- prompts


def _judged(kind: str, attribute: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Return a reward that judges drawings of a kind: `text`, `shapes` or both."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            is_text = parse_prompt(prompt).text is not None
            if (kind == "text" and not is_text) or (kind == "shapes" and is_text):
                fit = "glyphs" if is_text else "shapes"
                raise UserError(
                    f"this reward judges {kind} and cannot judge '{prompt}'; use the reward {fit}, or drawings for both"
                )
        values = [getattr(verdict, attribute) for verdict in evaluate_drawings(images, prompts)]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    return reward


# -------------------------------------------------------------------------------------- by name


@dataclass(frozen=True)
class RewardSpec:
    """An entry of the registry.

    Attributes:
        summary: one line for people.
        make: builds it, given the argument in brackets ("" without one).
        argument: what stands in brackets, for people; "" where nothing may.
    """

    summary: str
    make: Callable[[str], Reward]
    argument: str = ""


def _plain(
    name: str,
    summary: str,
    function: Callable[[Tensor], Tensor],
    *,
    differentiable: bool = False,
) -> tuple[str, RewardSpec]:
    reward = NamedReward(name, lambda images, prompts: function(images), differentiable)
    return name, RewardSpec(summary, lambda argument: reward)


def _of_prompts(name: str, summary: str, kind: str, attribute: str) -> tuple[str, RewardSpec]:
    reward = NamedReward(name, _judged(kind, attribute))
    return name, RewardSpec(summary, lambda argument: reward)


def _make_color(argument: str) -> Reward:
    name = argument or "red"
    if name not in COLORS:
        raise UserError.unknown("color", name, COLORS)
    color = COLORS[name]
    return NamedReward(
        f"color({name})", lambda images, prompts: color_likeness(images, color), True
    )


def _from_folder(
    name: str, make: Callable[[str], Callable[[Tensor, Sequence[str]], Tensor]]
) -> Callable[[str], Reward]:
    return lambda argument: NamedReward(f"{name}({argument})", make(argument), True)


REWARDS: dict[str, RewardSpec] = dict(
    [
        _plain("compressibility", "minus the kilobytes of a JPEG", lambda x: -kilobytes(x)),
        _plain("incompressibility", "the kilobytes of a JPEG", kilobytes),
        _plain("brightness", "mean luma", brightness, differentiable=True),
        _plain("symmetry", "likeness to the mirror image", symmetry, differentiable=True),
        ("color", RewardSpec("likeness to a color", _make_color, "NAME")),
        _of_prompts("shapes", "ShapesEval, graded", "shapes", "graded"),
        _of_prompts("shapes_strict", "ShapesEval, strict", "shapes", "strict"),
        _of_prompts("glyphs", "share of right characters", "text", "graded"),
        _of_prompts("glyphs_strict", "the text, read exactly", "text", "strict"),
        _of_prompts("drawings", "shapes or glyphs, as each prompt asks", "both", "graded"),
        _of_prompts("drawings_strict", "the same, strict", "both", "strict"),
        (
            "classifier",
            RewardSpec(
                "log-probability of the things asked for, by a small CNN that saw drawings",
                _from_folder("classifier", classifier_reward),
                "FOLDER",
            ),
        ),
        (
            "clip",
            RewardSpec(
                "CLIP's cosine of image and prompt", _from_folder("clip", clip_reward), "FOLDER"
            ),
        ),
        (
            "pickscore",
            RewardSpec(
                "what people would pick (PickScore)",
                _from_folder("pickscore", pickscore_reward),
                "FOLDER",
            ),
        ),
        (
            "aesthetic",
            RewardSpec(
                "how beautiful people would find it (LAION)",
                _from_folder("aesthetic", aesthetic_reward),
                "FOLDER",
            ),
        ),
    ]
)
"""By name."""


def reward_help() -> str:
    """Return every reward with what it is, for people."""
    return "; ".join(
        f"{name}({spec.argument}): {spec.summary}" if spec.argument else f"{name}: {spec.summary}"
        for name, spec in REWARDS.items()
    )


_TERM = re.compile(
    r"(?P<name>[\w.]+(?::[A-Za-z_]\w*)?)(?:\((?P<argument>[^()]*)\))?(?::(?P<weight>[^:]+))?"
)


def make_reward(text: str) -> Reward:
    """Return the reward that a text names; see the module.

    Raises:
        UserError: a name is unknown (it tells the nearest ones), a weight is no number, or an argument does not fit.

    Example:
        >>> reward = make_reward("brightness+symmetry:0.5")
        >>> [round(value, 6) for value in reward(torch.ones(2, 3, 8, 8), ["", ""]).tolist()]
        [1.5, 1.5]
        >>> reward.differentiable
        True
    """
    parts = tuple((_make(term), term.weight) for term in parse_reward(text))
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return WeightedSum(parts)


def _split(text: str) -> list[str]:
    """Split at the `+` outside brackets and outside numbers such as 1e+3."""
    return re.split(r"(?<![0-9]e)\+(?![^(]*\))", text)


class Term(NamedTuple):
    """One reward of a sum, as it is written."""

    name: str
    argument: str | None
    """What stands in brackets; None without any."""
    weight: float

    def is_same(self, other: Term) -> bool:
        """Whether both are one reward; what stands in no brackets may be what stands in the other's."""
        return self.name == other.name and (
            self.argument == other.argument or not self.argument or not other.argument
        )


def parse_reward(text: str) -> list[Term]:
    """Return the terms of a reward, before any of them is made.

    Raises:
        UserError: a name is unknown, a weight is no number, or something stands in brackets that nothing takes.
    """
    return [_parse_term(term.strip()) for term in _split(text)]


def _parse_term(text: str) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise UserError(
            f"'{text}' is no reward; write NAME, NAME:WEIGHT, NAME(ARGUMENT):WEIGHT or module:function, joined by +"
        )
    name, argument = match["name"], match["argument"]
    known, _, behind = name.partition(":")
    try:
        weight = float(behind if behind and known in REWARDS else match["weight"] or 1)
    except ValueError:
        raise UserError(f"the weight of '{text}' is no number; write NAME:0.5, say") from None
    if behind:
        if argument is not None:
            raise UserError(f"reward '{name}' is a function of yours and takes nothing in brackets")
    elif name not in REWARDS:
        raise UserError.unknown("reward", name, REWARDS)
    elif argument is not None and not REWARDS[name].argument:
        raise UserError(f"reward '{name}' takes nothing in brackets, '{argument}' was given")
    return Term(name, argument, weight)


def _make(term: Term) -> Reward:
    if ":" in term.name:
        return _of_function(term.name)
    return REWARDS[term.name].make(term.argument or "")


def _of_function(name: str) -> Reward:
    """Return a person's own callable as a reward."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"cannot import '{module_name}' for the reward '{name}': there is no module '{error.name}' here; put the "
            "folder that holds it on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError.unknown(f"function of {module_name}", function_name, dir(module))
    return NamedReward(name, function, bool(getattr(function, "differentiable", False)))
