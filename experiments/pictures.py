"""Draw the pictures in the docs: every distraction, and reference beside fast rendering.

python -m experiments.pictures --out docs/images
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import envs
from experiments.running.arguments import Parser, make_folder, run_command
from wrappers.distraction.presets import CLEAN, DISTRACTIONS

Quality = Literal["reference", "fast"]

TASKS = ("dmc/walker-walk", "dmc/cartpole-swingup", "dmc/finger-spin", "metaworld/drawer-open")
SCENES = (
    "dmc/walker-walk",
    "dmc/cartpole-swingup",
    "dmc/quadruped-walk",
    "metaworld/drawer-open",
    "dmc/cheetah-run",
    "dmc/humanoid-walk",
)

QUALITY_SIZE = 168
COLUMNS = 8
COMBINED = "color_hard+camera_easy"
PARTS = tuple(name for name in DISTRACTIONS if not name.startswith(("dcs", "randomized")))
SAME = ("dcs_0.1", "dcs_0.2", "dcs_0.3")
"""They are dcs_easy, dcs_medium and dcs_hard."""
SUITE = ("dcs_0.025", "dcs_0.05", "dcs_easy", "dcs_0.15", "dcs_medium", "dcs_hard", "dcs_0.5")
NAMES = (CLEAN, *PARTS, "objects_hard+light_easy", COMBINED, "randomized", *SUITE)
MOMENTS = (5, 60)
"""Agent steps after which a last band shows what moves and what stands still."""
STRONG, MOVING, STILL = "dcs_0.4", "dcs_medium", "dcs_medium_static"
"""What that band shows; every `_static` stands as still as this one."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.pictures", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("docs/images"), help="folder [docs/images]")
    p.add_argument("--size", type=int, default=96, help="pixels of one distraction [96]")
    return p


def look(
    task: str, size: int, distraction: str | None, quality: Quality, steps: int = 5
) -> np.ndarray:
    """Return a frame after some random steps, uint8 [size, size, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not every task has everything: the sheet shows it
        env = envs.make(
            task, seed=5, size=size, distraction=distraction, quality=quality, split="test"
        )
    env.reset()
    env.action_space.seed(3)
    for _ in range(steps):
        env.step(env.action_space.sample())
    frame = env.render()
    env.close()
    return frame


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Put pictures of one size side by side and rows below each other."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def labeled(rows: Sequence[Sequence[np.ndarray]], over: Sequence[str]) -> np.ndarray:
    """Put a sheet below a line with the names of its columns; one that is too long is broken."""
    size = rows[0][0].shape[1]
    height = 34
    band = Image.new("RGB", (size * len(over), height), "white")
    draw, font = ImageDraw.Draw(band), ImageFont.load_default(size=12)
    for column, name in enumerate(over):
        text = name.replace("+", " +\n")
        place = ((column + 0.5) * size, height / 2)
        draw.multiline_text(place, text, "black", font, anchor="mm", align="center", spacing=1)
    return np.concatenate([np.asarray(band), sheet(rows)])


def distraction_sheet(size: int) -> np.ndarray:
    """Draw every distraction on every task: a column each, in bands of eight, a row per task."""
    columns = [(name, MOMENTS[0], name) for name in (*NAMES, STRONG)]
    columns += [(MOVING, step, f"{MOVING}\nstep {step}") for step in MOMENTS]
    broken = STILL.replace("_static", "_\nstatic")
    columns += [(STILL, step, f"{broken}, step {step}") for step in MOMENTS]
    bands = []
    for first in range(0, len(columns), COLUMNS):
        band = columns[first : first + COLUMNS]
        rows = [[look(task, size, name, "fast", step) for name, step, _ in band] for task in TASKS]
        picture = labeled(rows, [title for *_, title in band])
        blank = ((0, 0), (0, size * (COLUMNS - len(band))), (0, 0))
        bands.append(np.pad(picture, blank, constant_values=255))
    return np.concatenate(bands)


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    size = arguments.size
    make_folder(arguments.out, "--out")
    qualities = sheet([
        [look(task, QUALITY_SIZE, None, quality) for task in SCENES]
        for quality in ("reference", "fast")
    ])  # fmt: skip
    sheets = {"distractions": distraction_sheet(size), "qualities": qualities}
    for name, picture in sheets.items():
        iio.imwrite(arguments.out / f"{name}.png", picture)
        print(f"wrote {arguments.out / name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
