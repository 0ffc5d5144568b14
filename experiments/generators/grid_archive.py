"""One archive folder for each finished run of a grid: what tables need of it, a picture of its course, no weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from agents.core.errors import UserError
from experiments.generators.report import FOLDER, LAYOUT
from experiments.generators.runs import SCHEMA
from experiments.running.runs import write_json

JSONS = ("config.json", "system.json", f"{FOLDER}/report.json")
"""What tables are made of; folders of this machine are taken out of what they say."""
CURVES, MOST_CURVES = "metrics.csv", 200_000
"""Kept where it has no more bytes than these."""
PLOT, SHEETS = "monitor.png", ("before.png", "after.png")
"""Pictures of a report, kept in few colors."""
COLORS = 256
"""Chosen by largest coverage: measured on 24 pixels, a plot is then 1 of 255 off at most and a sheet 15, in a third of
the bytes; median cut took red for purple, and a JPEG of these flat pixels is larger than the PNG."""

_FOLDERS = re.compile(r"(?<![\w.])/(?:[^/\s'\"()]+/)+(?=[^/\s'\"()])")


def without_folders(content: Any) -> Any:
    """Return a tree whose texts name files and runs without the folders that these are in.

    Example:
        >>> without_folders({"base": "/home/a/runs/base", "reward": "clip(/models/b)", "prompts": ["1/2"]})
        {'base': 'base', 'reward': 'clip(b)', 'prompts': ['1/2']}
    """
    if isinstance(content, str):
        return _FOLDERS.sub("", content)
    if isinstance(content, list):
        return [without_folders(each) for each in content]
    if isinstance(content, dict):
        return {name: without_folders(each) for name, each in content.items()}
    return content


def archive_run(run: Path, archive: Path, *, with_sheets: bool) -> int:
    """Keep what tables need of a finished run, and return its bytes; the archive appears whole or not at all.

    Args:
        run: it has its report.
        archive: folder that does not exist.
        with_sheets: keep images before and after, too.
    """
    unfinished = archive.with_name(archive.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / FOLDER).mkdir(parents=True)
    for name in JSONS:
        write_json(unfinished / name, without_folders(json.loads((run / name).read_text())))
    curves = run / CURVES
    if curves.is_file() and curves.stat().st_size <= MOST_CURVES:
        shutil.copyfile(curves, unfinished / CURVES)
    for name in (PLOT, *(SHEETS if with_sheets else ())):
        if (run / FOLDER / name).is_file():
            with Image.open(run / FOLDER / name) as picture:
                small = in_few_colors(picture)
            small.save(unfinished / FOLDER / name, optimize=True)
    size = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    unfinished.rename(archive)
    return size


def read_archive(archive: Path) -> dict[str, dict[str, Any]]:
    """Return the content of each of an archive's `JSONS`.

    Raises:
        UserError: one of them is not there, damaged, or of another version.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in JSONS:
        try:
            content = json.loads((archive / name).read_text())
        except (OSError, ValueError) as error:
            raise _unusable(archive, f"{name} is missing or damaged") from error
        if not isinstance(content, dict):
            raise _unusable(archive, f"{name} is damaged")
        found[name] = content
    config, _, report = found.values()
    if config.get("schema") != SCHEMA or report.get("layout") != LAYOUT:
        raise _unusable(archive, "it is of another version")
    try:
        rows = [row for part in (report, report["last"] or report) for row in part["rewards"]]
        counts = {len(row["by_prompt"][side]) for row in rows for side in ("before", "after")}
        is_whole = counts == {len(config["held_out"])}
    except (KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise _unusable(archive, "its report has not a value of each of its prompts")
    return found


def _unusable(archive: Path, why: str) -> UserError:
    return UserError(
        f"cannot take the archived run '{archive}' ({why}); restore it, or remove it to run it again"
    )


def in_few_colors(picture: Image.Image) -> Image.Image:
    """Return a picture of `COLORS` colors at most, without dithering."""
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    return picture.convert("RGB").quantize(COLORS, method=method, dither=dither)
