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
from experiments.reporting.statistics import stratified_bootstrap
from experiments.running.runs import write_json

FOLDER = "report"
"""Of a run, for its report."""
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

    @property
    def clears(self) -> bool:
        """Whether the gain's interval is above 0."""
        return self.gain[1] > 0


def compare(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    rewards: Mapping[str, RewardFunction],
    images: int,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Return a row for every reward.

    Args:
        before: the base's images, [P * images, 3, H, W], prompt by prompt.
        after: the same prompts, from the same noise or not.
        prompts: P of them.
        rewards: by name.
        images: of each prompt.
        batch: images that a reward sees at once.
        device: where it sees them.
    """
    asked = [prompt for prompt in prompts for _ in range(images)]
    rows = []
    for name, reward in rewards.items():
        values = [
            rewards_in_batches(reward, some, asked, batch=batch, device=device)
            .view(-1, images)
            .mean(1)
            .double()
            .numpy()
            for some in (before, after)
        ]
        rows.append(Row(name, *(_interval(v) for v in (*values, values[1] - values[0]))))
    return rows


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
    again: Tensor | None = None,
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
        again: the base's images from other noise, which recall and precision are against; without them there are none
            (see `monitor`).
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
    rows = compare(before, after, prompts, rewards, images, batch=batch, device=device)
    vectors = [features(some) for some in (before, after)]
    diversity: dict[str, list[float | None]] = {
        "distance": [float(group_distance(v, images)) if images > 1 else None for v in vectors],
        "recall": [None, None],
        "precision": [None, None],
    }
    if again is not None and len(again) > NEIGHBORS:  # of a few images nobody has a third neighbor
        base = features(again)
        diversity["recall"] = [float(coverage(base, v)) for v in vectors]
        diversity["precision"] = [float(coverage(v, base)) for v in vectors]
    folder.mkdir(parents=True, exist_ok=True)
    asked = [prompt for prompt in prompts[:SHOWN] for _ in range(images)]
    for name, some in (("before", before), ("after", after)):
        sheet = contact_sheet(some[: len(asked)], asked, columns=images)
        save_picture(folder / f"{name}.png", sheet)
    if history:
        monitor_plot(folder / "monitor.png", history, tolerance, proxy=names[0], gold=names[1])
    content: dict[str, Any] = {
        "title": title,
        "prompts": len(prompts),
        "images_per_prompt": images,
        "rewards": [asdict(row) | {"clears": row.clears} for row in rows],
        "diversity": diversity,
        "history": [vars(each) for each in history],
        "notes": list(notes),
        "made_of": dict(made_of or {}),
    }
    write_json(folder / "report.json", content)
    page = folder / "report.md"
    of_what = f"{len(prompts)} held-out prompts, {images} images of each"
    of_what += ", the same noise before and after" if same_noise else ""
    page.write_text(_page(title, of_what, rows, diversity, bool(history), notes))
    return page


def is_current(page: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether a report is there, whole, and of what it would be made of now."""
    folder = page.parent
    if not all((folder / name).is_file() for name in (page.name, "before.png", "after.png")):
        return False
    try:
        said = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("made_of") == made_of


def _page(
    title: str,
    of_what: str,
    rows: Sequence[Row],
    diversity: Mapping[str, Sequence[float | None]],
    has_monitor: bool,
    notes: Sequence[str],
) -> str:
    """Return the page's markdown."""
    lines = [
        f"# {title}",
        "",
        f"{of_what}. Intervals are 95 % percentile bootstrap intervals over prompts; the gain's is of the difference "
        "of each prompt.",
        "",
        "| reward | before | after | gain | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        verdict = "better than the base" if row.clears else "does not clear the base"
        cells = [_shown(values) for values in (row.before, row.after, row.gain)]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {verdict} |")
    lines += ["", "| diversity | before | after |", "| --- | --- | --- |"]
    for name, (base, now) in diversity.items():
        cells = ["-" if value is None else f"{value:.3f}" for value in (base, now)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *notes, ""]
    lines += ["| before | after |", "| --- | --- |", "| ![](before.png) | ![](after.png) |", ""]
    lines += ["", "![](monitor.png)", ""] if has_monitor else [""]
    return "\n".join(lines)


def _shown(values: tuple[float, float, float]) -> str:
    point, low, high = values
    return f"{point:.3f} [{low:.3f}, {high:.3f}]"
