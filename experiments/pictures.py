"""Draw the pictures in the docs: every distraction, and reference beside fast rendering.

python -m experiments.pictures --out docs/images
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import numpy as np

import envs
from experiments.arguments import Parser, run_command
from wrappers.distraction.presets import DISTRACTIONS

Quality = Literal["reference", "fast"]

TASKS = ("dmc/walker-walk", "dmc/cartpole-swingup", "dmc/quadruped-walk", "metaworld/drawer-open")
SCENES = (*TASKS, "dmc/cheetah-run", "dmc/humanoid-walk")


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.pictures", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("docs/images"), help="folder [docs/images]")
    p.add_argument("--size", type=int, default=168, help="pixels of one picture [168]")
    return p


def look(
    task: str, size: int, distraction: str | None, quality: Quality, steps: int = 5
) -> np.ndarray:
    """Return a frame after some random steps, uint8 [size, size, 3]."""
    env = envs.make(task, seed=5, size=size, distraction=distraction, quality=quality, split="test")
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


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    size = arguments.size
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = (None, *DISTRACTIONS)
    distractions = sheet([[look(task, size, name, "fast") for name in names] for task in TASKS])
    reference = [look(task, size, None, "reference") for task in SCENES]
    qualities = sheet([reference, [look(task, size, None, "fast") for task in SCENES]])
    for name, picture in (("distractions", distractions), ("qualities", qualities)):
        iio.imwrite(arguments.out / f"{name}.png", picture)
        print(f"wrote {arguments.out / name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
