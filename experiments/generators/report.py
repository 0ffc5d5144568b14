"""The report of a fine-tuned generator: held-out rewards before and after with intervals, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.generative_models.contact_sheet import contact_sheet, save_picture
from agents.generative_models.credit import RewardFunction, rewards_in_batches
from agents.generative_models.monitor import (
    NEIGHBORS,
    Measurement,
    coverage,
    features,
    group_distance,
)
from experiments.generators.plots import monitor_plot
from experiments.reporting.fine_tuning import UNCLEAR
from experiments.reporting.statistics import stratified_bootstrap
from experiments.running.runs import write_json

FOLDER = "report"
"""Of a run, for its report."""
LAYOUT = 2
"""Version of report.json."""
SHOWN = 8
"""Prompts in a grid."""


@dataclass(frozen=True)
class Row:
    """A number before and after, with 95 % bootstrap intervals over prompts."""

    name: str
    before: tuple[float, float, float]
    """Mean, lower and upper end."""
    after: tuple[float, float, float]
    gain: tuple[float, float, float]
    """Of the difference, prompt by prompt."""
    by_prompt: dict[str, list[float]]
    """Means of each prompt's images, `before` and `after`: what grids draw anew."""

    @property
    def clears(self) -> bool:
        """Whether the gain's interval is above 0."""
        return self.gain[1] > 0


@dataclass(frozen=True)
class Images:
    """Images of the report's prompts, with what rewards said of them.

    Attributes:
        pixels: [P * images, 3, H, W], prompt by prompt.
        vectors: their features, [P * images, D].
        scores: means of each prompt's images, float64 [P], by reward.
    """

    pixels: Tensor
    vectors: Tensor
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Images of a generator against the base's.

    Attributes:
        rows: one for each reward.
        diversity: before and after, by name; None where there are too few images.
        step: iteration of the generator; None where nothing was trained.
        kl: nats of its chains to the base's, where a monitor has measured it.
    """

    rows: list[Row]
    diversity: dict[str, list[float | None]]
    step: int | None = None
    kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as report.json has it."""
        return {
            "rewards": [asdict(row) | {"clears": row.clears} for row in self.rows],
            "diversity": self.diversity,
            "step": self.step,
            "kl": self.kl,
        }


def score(
    pixels: Tensor,
    prompts: Sequence[str],
    rewards: Mapping[str, RewardFunction],
    images: int,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Images:
    """Return images with what rewards say of them.

    Args:
        pixels: [P * images, 3, H, W], prompt by prompt.
        prompts: P of them.
        rewards: by name.
        images: of each prompt.
        batch: images that a reward sees at once.
        device: where it sees them.
    """
    asked = [prompt for prompt in prompts for _ in range(images)]
    scores = {
        name: rewards_in_batches(reward, pixels, asked, batch=batch, device=device)
        .view(-1, images)
        .mean(1)
        .double()
        .numpy()
        for name, reward in rewards.items()
    }
    return Images(pixels, features(pixels), scores)


def compare(
    before: Images,
    after: Images,
    images: int,
    again: Tensor | None = None,
    *,
    step: int | None = None,
    history: Sequence[Measurement] = (),
) -> Comparison:
    """Return what became of the base's images.

    Args:
        before: the base's.
        after: of the same prompts, from the same noise or not.
        images: of each prompt.
        again: features of the base's images from other noise, which recall and precision are against.
        step: iteration of the generator that drew `after`.
        history: of the monitor, which has its KL.
    """
    rows = []
    for name, old in before.scores.items():
        new = after.scores[name]
        means = {"before": old.tolist(), "after": new.tolist()}
        rows.append(Row(name, _interval(old), _interval(new), _interval(new - old), means))
    vectors = before.vectors, after.vectors
    diversity: dict[str, list[float | None]] = {
        "distance": [float(group_distance(v, images)) if images > 1 else None for v in vectors],
        "recall": [None, None],
        "precision": [None, None],
    }
    if again is not None and len(again) > NEIGHBORS:  # of a few images nobody has a third neighbor
        diversity["recall"] = [float(coverage(again, v)) for v in vectors]
        diversity["precision"] = [float(coverage(v, again)) for v in vectors]
    kl = next((each.values["kl"] for each in history if each.step == step), None)
    return Comparison(rows, diversity, step, kl)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    said = stratified_bootstrap([values])
    return float(said.point), float(said.low), float(said.high)


@torch.no_grad()
def write_report(
    run: Path,
    *,
    title: str,
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    images: int,
    rewards: Mapping[str, RewardFunction],
    spent: Mapping[str, float],
    again: Tensor | None = None,
    step: int | None = None,
    last: tuple[int, Tensor] | None = None,
    base: str | None = None,
    history: Sequence[Measurement] = (),
    tolerance: float = 2.0,
    names: tuple[str, str] = ("", ""),
    notes: Sequence[str] = (),
    same_noise: bool = True,
    made_of: Mapping[str, Any] | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Path:
    """Write report.md, report.json, the grids and the monitor's plot into a run's folder, and return the page.

    Args:
        run: its folder.
        title: of the page.
        before: the base's images on held-out prompts, [P * images, 3, H, W].
        after: the tuned generator's.
        prompts: P of them.
        images: of each.
        rewards: by name.
        spent: evaluations, rewards and wall_seconds, of training or of steered images.
        again: the base's images from other noise, which recall and precision are against; without them there are none
            (see `monitor`).
        step: iteration of `after`; None where nothing was trained.
        last: the last iteration with its images, where `after` is an earlier one's.
        base: digest of the base's weights.
        history: the monitor's, if there was one.
        tolerance: the monitor's.
        names: of proxy and gold.
        notes: further lines.
        same_noise: whether both began with it.
        made_of: what of the run it depends on; see `is_current`.
        batch: images that a reward sees at once.
        device: where it sees them.
    """
    folder = run / FOLDER

    def scored(pixels: Tensor) -> Images:
        return score(pixels, prompts, rewards, images, batch=batch, device=device)

    first, noise = scored(before), None if again is None else features(again)
    best = compare(first, scored(after), images, noise, step=step, history=history)
    end = None
    if last is not None:
        end = compare(first, scored(last[1]), images, noise, step=last[0], history=history)
    folder.mkdir(parents=True, exist_ok=True)
    asked = [prompt for prompt in prompts[:SHOWN] for _ in range(images)]
    for name, some in (("before", before), ("after", after)):
        sheet = contact_sheet(some[: len(asked)], asked, columns=images)
        save_picture(folder / f"{name}.png", sheet)
    if history:
        monitor_plot(folder / "monitor.png", history, tolerance, proxy=names[0], gold=names[1])
    content: dict[str, Any] = {
        "layout": LAYOUT,
        "title": title,
        "prompts": len(prompts),
        "images_per_prompt": images,
        **best.to_json(),
        "last": None if end is None else end.to_json(),
        "spent": dict(spent),
        "base": base,
        "history": [vars(each) for each in history],
        "notes": list(notes),
        "made_of": dict(made_of or {}),
    }
    write_json(folder / "report.json", content)
    page = folder / "report.md"
    of_what = f"{len(prompts)} held-out prompts, {images} images of each"
    of_what += ", the same noise before and after" if same_noise else ""
    page.write_text(_page(title, of_what, best, end, bool(history), notes))
    return page


def is_current(page: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether a report is there, whole, and of what it would be made of now."""
    said = read_report(page.parent.parent)
    return said is not None and said["made_of"] == made_of


def read_report(run: Path) -> dict[str, Any] | None:
    """Return the report.json of a run; None where the report is not there, not whole, or of an older version."""
    folder = run / FOLDER
    if not all((folder / name).is_file() for name in ("report.md", "before.png", "after.png")):
        return None
    try:
        said = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.get("layout") == LAYOUT else None


def _page(
    title: str,
    of_what: str,
    best: Comparison,
    end: Comparison | None,
    has_monitor: bool,
    notes: Sequence[str],
) -> str:
    """Return the page's markdown."""
    lines = [
        f"# {title}",
        "",
        f"{of_what}. Intervals are 95 % percentile bootstrap intervals over prompts; the gain's is of the difference "
        "of each prompt.",
        *_tables(best),
    ]
    if end is not None:
        lines += ["", f"## The last checkpoint, iteration {end.step}", *_tables(end)]
    lines += ["", *notes, ""]
    lines += ["| before | after |", "| --- | --- |", "| ![](before.png) | ![](after.png) |", ""]
    lines += ["", "![](monitor.png)", ""] if has_monitor else [""]
    return "\n".join(lines)


def _tables(found: Comparison) -> list[str]:
    lines = ["", "| reward | before | after | gain | |", "| --- | --- | --- | --- | --- |"]
    for row in found.rows:
        verdict = "better than the base" if row.clears else UNCLEAR
        cells = [_shown(values) for values in (row.before, row.after, row.gain)]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {verdict} |")
    lines += ["", "| diversity | before | after |", "| --- | --- | --- |"]
    for name, (base, now) in found.diversity.items():
        cells = ["-" if value is None else f"{value:.3f}" for value in (base, now)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if found.kl is not None:
        lines += ["", f"KL to the base: {found.kl:.3g} nats of a chain."]
    return lines


def _shown(values: tuple[float, float, float]) -> str:
    point, low, high = values
    return f"{point:.3f} [{low:.3f}, {high:.3f}]"
