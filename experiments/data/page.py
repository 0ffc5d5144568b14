"""A page that shows episodes of a data set side by side: pictures along the way, film, plot, return and success."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from experiments.running.arguments import as_words

PAGE = "index.html"
PICTURES = 8
"""Of an episode, evenly spaced from its first observation to its last."""
HEIGHT = 96
"""Pixels that a picture on the page has at least."""
TASK = (
    "id",
    "observation",
    "size",
    "action_repeat",
    "episode_length",
    "camera",
    "distraction",
    "split",
    "quality",
)
"""Settings of the task that say what the pictures show."""
STYLE = (
    "body{font-family:sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem}"
    "section{border-top:1px solid #999;padding:.6rem 0}video,section img{vertical-align:top;max-width:100%}"
    "td,th{padding:.15rem .8rem .15rem 0;text-align:left}.strip{image-rendering:pixelated}"
)


@dataclass(frozen=True)
class Shown:
    """An episode on the page."""

    number: int
    """As Minari counts them."""
    seed: int | None
    steps: int
    total: float
    """Its return."""
    solved: int | None
    """Agent steps until it was solved first; None where it was not, or where the task does not tell."""
    tells: bool
    """Whether the task tells success."""
    strip: np.ndarray | None
    """uint8 [H, W, 3], pictures beside each other; None of states alone."""
    film: str | None
    """File beside the page."""
    plot: str


def first_solved(success: Sequence[float] | None) -> int | None:
    """Return the agent steps until an episode was solved first, of success before the first action and after each."""
    found = np.flatnonzero(np.asarray(success if success is not None else []) > 0)
    return int(found[0]) if len(found) else None


def strip(pictures: np.ndarray) -> np.ndarray:
    """Return some pictures of an episode beside each other, enlarged by whole numbers.

    Args:
        pictures: uint8 [T, 3 * k, H, W]; the newest frame of each stack is shown.
    """
    places = np.linspace(0, len(pictures) - 1, PICTURES).round().astype(int)
    frames = np.asarray(pictures)[places, -3:].transpose(2, 0, 3, 1)  # [H, PICTURES, W, 3]
    side = frames.reshape(frames.shape[0], -1, 3)
    factor = -(-HEIGHT // frames.shape[0])
    return side.repeat(factor, axis=0).repeat(factor, axis=1)


def write_page(
    file: Path, dataset: str, about: Mapping[str, Any], episodes: int, shown: Sequence[Shown]
) -> None:
    """Write the page; films and plots lie beside it.

    Args:
        file: an old one is replaced.
        dataset: its id.
        about: its entry in metadata.json.
        episodes: how many it has.
        shown: some of them.
    """
    settings = about["settings"]
    facts = {
        "source": about.get("source", "not recorded"),
        "episodes": f"{len(shown)} of {episodes} shown",
    }
    if "rerendered_from" in about:
        facts["drawn anew from"] = about["rerendered_from"]
    facts |= {name.replace("_", " "): settings.get(name) for name in TASK}
    facts["distraction"] = settings.get("distraction") or "clean"
    if any(one.tells for one in shown):
        facts["solved"] = f"{sum(one.solved is not None for one in shown)} of {len(shown)}"
    totals = [one.total for one in shown]
    facts["return"] = f"{np.mean(totals):.1f} ± {np.std(totals):.1f}"
    table = "".join(
        f"<tr><th>{escape(k)}</th><td>{escape(as_words(v))}</td></tr>" for k, v in facts.items()
    )
    body = "\n".join(_section(one) for one in shown)
    file.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{escape(dataset)}</title><style>{STYLE}</style>\n'
        f"<h1>{escape(dataset)}</h1>\n<table>{table}</table>\n{body}\n"
    )


def _section(one: Shown) -> str:
    """Return an episode's part of the page."""
    told = ""
    if one.tells:
        told = ", not solved" if one.solved is None else f", solved after {one.solved}"
    head = f"episode {one.number}: {one.steps} agent steps, return {one.total:.1f}{told}"
    if one.seed is not None:
        head += f" (seed {one.seed})"
    parts = [f"<h2>{escape(head)}</h2>"]
    if one.strip is not None:
        buffer = BytesIO()
        iio.imwrite(buffer, one.strip, extension=".png")
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = f"{PICTURES} pictures of episode {one.number}"
        parts.append(f'<p><img class="strip" alt="{alt}" src="data:image/png;base64,{data}"></p>')
    if one.film is not None:
        parts.append(f'<video controls loop muted src="{escape(one.film)}"></video>')
    parts.append(f'<img alt="actions, rewards and return" width="480" src="{escape(one.plot)}">')
    return f"<section>{''.join(parts)}</section>"
