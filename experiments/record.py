"""Record what an agent sees, where it looks, and what it earns, as MP4.

    python -m experiments.record runs/dmc-cartpole-swingup/sgqn-seed1
    python -m experiments.record RUN --distractions clean video_hard --episodes 3 --out films/
    python -m experiments.record --dataset drawer/expert-v0 --episodes 3

Left is the frame as the agent sees it, in the middle its saliency (scaled by itself in every frame), right both
together; below, the reward of the step that led here and the return so far. An agent without saliency gets the frame
alone. Colors and videos come from the test split. Films are the episodes that the environments of
`experiments.evaluate` begin with at the same --seed: as many as its --num-envs are among those that it counts, later
ones are further episodes of the same kind.

Of a data set the pictures that it holds are shown, episode by episode, with a plot of actions, rewards and return
beside each film; one of states alone has plots only. index.html shows all of them on one page.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from tqdm import tqdm

import envs
from agents import Policy
from agents.core.errors import UserError
from agents.core.pictures import panels
from agents.policy import read_config
from experiments.data.datasets import Dataset, Episode, root_folder
from experiments.data.page import PAGE, Shown, first_solved, strip, write_page
from experiments.evaluate import DISTRACTIONS
from experiments.evaluating.captions import Caption
from experiments.evaluating.rollouts import episode_seeds
from experiments.evaluating.traces import draw_trace
from experiments.evaluating.videos import add_videos_flag, videos_of
from experiments.running.arguments import Parser, make_folder, run_command
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.runs import file_stem
from experiments.running.settings import check_device, control_steps
from wrappers.distraction.presets import make_distraction

PANEL = 192
"""Pixels that the side of a panel has at least, where --scale does not say otherwise."""


@dataclass(frozen=True)
class Moment:
    """What is shown of one step.

    Attributes:
        frame: uint8 [H, W, 3], as the agent sees it now.
        saliency: float32 [H, W], where it looks in it; None where it cannot tell.
        step: agent steps so far.
        reward: of the step that led here, 0 at the beginning.
        total: return so far, undiscounted.
        success: whether the task was solved at any moment so far.
    """

    frame: np.ndarray
    saliency: np.ndarray | None
    step: int
    reward: float
    total: float
    success: bool


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.record", description=__doc__)
    p.add_argument("run", type=Path, nargs="?", help="run folder that training wrote")
    p.add_argument("--dataset", metavar="ID", help="show the first episodes of a data set instead")
    p.add_argument("--root", type=Path, help="folder of datasets [Minari's own]")
    add_import_flag(p)
    p.add_argument(
        "--distractions", nargs="+", default=list(DISTRACTIONS), metavar="NAME",
        help=f"what to record under [{' '.join(DISTRACTIONS)}]",
    )  # fmt: skip
    p.add_argument("--episodes", type=int, default=1, help="episodes, per distraction [1]")
    p.add_argument(
        "--out", type=Path, help="folder of the films [RUN/films/<checkpoint>, films/<dataset>]"
    )
    p.add_argument("--overwrite", action="store_true", help="replace films of the same name")
    p.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint's name [latest]"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the episodes [0]")
    p.add_argument("--split", default="test", choices=("train", "validation", "test"),
                   help="which colors and videos [test]")  # fmt: skip
    add_videos_flag(p)
    p.add_argument("--scale", type=int, help=f"film pixels per pixel [to {PANEL} a panel or more]")
    p.add_argument("--fps", type=float, help="frames per second [the task's own speed]")
    p.add_argument("--device", default="cpu", help="where the policy acts [cpu]")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = parser().parse_args(argv)
    if given.episodes < 1 or (given.scale is not None and given.scale < 1):
        raise UserError("--episodes and --scale must be at least 1")
    if given.fps is not None and not 0 < given.fps <= 1000:
        raise UserError(f"--fps is {given.fps}; give a number above 0, at most 1000")
    if (given.run is None) == (given.dataset is None):
        raise UserError("give a run folder, or --dataset and the id of a data set")
    if given.dataset is not None:
        show_dataset(given)
        return 0
    import_for_run(read_config(given.run), given.imports, folder=given.run)
    policy = Policy.load(given.run, checkpoint=given.checkpoint, device=check_device(given.device))
    task = policy.config["env"]
    videos = videos_of(given.videos, task)
    for distraction in given.distractions:  # all of them, before the first takes its time
        make_distraction(distraction, split=given.split, videos=videos)
    out = given.out or given.run / "films" / Path(policy.checkpoint).name
    seeds = episode_seeds(given.seed, given.episodes)
    films = film_files(out, given.distractions, given.episodes, overwrite=given.overwrite)
    for distraction in given.distractions:
        settings = {"distraction": distraction, "split": given.split, "videos": videos, "seed": 0}
        with closing(envs.make(**{**task, **settings})) as env:
            for number, seed in enumerate(seeds):
                file = films[distraction, number]
                moments = episode(policy, env, seed)
                last = write_film(file, moments, distraction, given.fps or speed(env), given.scale)
                print(f"{distraction}: {last.step} agent steps, return {last.total:.1f}, {file}")
    return 0


def show_dataset(given: Namespace) -> None:
    """Write a film and a plot of the first episodes of a data set.

    Raises:
        UserError: no such data set, or files that may not be overwritten.
    """
    dataset = Dataset(root_folder(given.root), given.dataset)
    import_for_run(dataset.about, given.imports, source="the dataset")
    settings = dataset.about["settings"]
    count = min(given.episodes, len(dataset))
    out = given.out or Path("films") / given.dataset.replace("/", "-")
    # Numbers as Minari's, by which messages about data name episodes too.
    films = film_files(out, ["episode"], count, overwrite=given.overwrite, first=0)
    page, shown = out / PAGE, []
    if page.exists() and not given.overwrite:
        raise UserError(f"'{page}' exists; use --overwrite, or another --out")
    with closing(envs.make(**settings)) as env:
        fps = given.fps or speed(env)
    for number in range(count):
        file = films["episode", number]
        episode = dataset.read(number, scenes=False, side_by_side=True)
        title = f"{given.dataset}, episode {number}"
        plot = file.with_suffix(".png")
        draw_trace(
            plot, np.asarray(episode.actions), episode.rewards, success=episode.infos.get("success"), title=title
        )  # fmt: skip
        written = [plot]
        pictures = shown_pictures(episode.observations)
        if pictures is not None:
            write_film(file, dataset_moments(episode), f"episode {number}", fps, given.scale)
            written.insert(0, file)
        total, success = float(np.sum(episode.rewards)), episode.infos.get("success")
        shown.append(
            Shown(
                number, episode.seed, len(episode.rewards), total, first_solved(success), success is not None,
                None if pictures is None else strip(pictures), None if pictures is None else file.name, plot.name,
            )
        )  # fmt: skip
        print(
            f"{title}: {len(episode.rewards)} agent steps, return {total:.1f}, {', '.join(map(str, written))}"
        )
    write_page(page, given.dataset, dataset.about, len(dataset), shown)
    print(f"all on one page: {page.resolve()}")
    if settings["observation"] == "state":
        print(
            f"there are no pictures in it: collect NEW-v0 --rerender {given.dataset} --observation pixels draws them"
        )


def dataset_moments(episode: Episode) -> Iterator[Moment]:
    """Yield what a data set's episode shows, from the reset to the last observation."""
    rewards = [0.0, *map(float, episode.rewards)]
    solved = np.maximum.accumulate(episode.infos.get("success", np.zeros(len(rewards))))
    totals = np.cumsum(rewards)
    pictures = shown_pictures(episode.observations)
    assert pictures is not None
    for step, picture in enumerate(pictures):
        frame = np.ascontiguousarray(picture[-3:].transpose(1, 2, 0))
        yield Moment(frame, None, step, rewards[step], float(totals[step]), bool(solved[step]))


def shown_pictures(observations: Any) -> np.ndarray | None:
    """Return what a data set's episode shows, uint8 [T + 1, C, H, W], the newest picture last; None without any.

    Of several parts that are pictures the newest ones lie side by side, in the order of their names.
    """
    parts = dict(observations) if isinstance(observations, Mapping) else {"": observations}
    arrays = {name: np.asarray(part) for name, part in sorted(parts.items())}
    views = [array for array in arrays.values() if array.dtype == np.uint8 and array.ndim == 4]
    if len(views) < 2:
        return views[0] if views else None
    height = max(view.shape[2] for view in views)
    room = [((0, 0), (0, 0), (0, height - view.shape[2]), (0, 0)) for view in views]
    newest = [np.pad(view[:, -3:], width) for view, width in zip(views, room, strict=True)]
    return np.concatenate(newest, axis=3)


def film_files(
    out: Path, distractions: Sequence[str], episodes: int, *, overwrite: bool, first: int = 1
) -> dict[tuple[str, int], Path]:
    """Return the file of every distraction and episode, numbered from `first` on, in a folder that is there.

    Raises:
        UserError: a file exists that may not be overwritten, or the folder cannot be made.
    """
    files = {
        (distraction, number): out / f"{file_stem(distraction)}-{number + first}.mp4"
        for distraction in distractions
        for number in range(episodes)
    }
    for file in files.values():
        if file.exists() and not overwrite:
            raise UserError(f"'{file}' exists; use --overwrite, or another --out")
    make_folder(out, "--out")
    return files


def speed(env: envs.Environment) -> float:
    """Return how many agent steps the task takes in a second of its own."""
    return env.metadata.get("render_fps", 30) / control_steps(env.settings)


def episode(policy: Policy, env: envs.Environment, seed: int) -> Iterator[Moment]:
    """Yield an episode's moments, from the reset to the last observation, acting greedily."""
    observation, info = env.reset(seed=seed)
    policy.begin()
    step, reward, total, ended, success = 0, 0.0, 0.0, False, False
    while True:
        success = success or bool(info.get("success", 0.0))
        action = policy.act(observation)
        seen = policy.saliency(_batch(observation), action[None])
        heat = None if seen is None else seen[0]
        yield Moment(env.render(), heat, step, float(reward), total, success)
        if ended:
            return
        observation, reward, terminated, truncated, info = env.step(action)
        step, total, ended = step + 1, total + float(reward), terminated or truncated


def _batch(observation: Any) -> Any:
    """Return a batch of one observation."""
    if isinstance(observation, Mapping):
        return {name: part[None] for name, part in observation.items()}
    return observation[None]


def write_film(
    file: Path, moments: Iterator[Moment], title: str, fps: float, scale: int | None
) -> Moment:
    """Write a film and return its last moment; the file appears when it is whole.

    Args:
        file: ends in .mp4; an old one is replaced.
        moments: of one episode, at least one.
        title: what the caption begins with.
        fps: frames per second.
        scale: film pixels per pixel of a frame; None makes a panel's side `PANEL` pixels or more.
    """
    unfinished = file.with_name(f".writing-{file.name}")
    caption: Caption | None = None
    try:
        writer: Any = imageio.get_writer(unfinished, "FFMPEG", "I", fps=fps, macro_block_size=2)
        with closing(writer):
            for moment in tqdm(moments, desc=file.stem, unit="step", disable=None, leave=False):
                picture = enlarge(draw(moment), scale or -(-PANEL // min(moment.frame.shape[:2])))
                caption = caption or Caption(picture.shape[1])
                writer.append_data(caption.below(picture, describe(moment, title)))
        unfinished.replace(file)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    return moment


def draw(moment: Moment) -> np.ndarray:
    """Return the panels of a moment, uint8 [H, 3*W, 3], or the frame alone, uint8 [H, W, 3]."""
    if moment.saliency is None:
        return moment.frame
    return panels(moment.frame[None], moment.saliency[None])[0]


def describe(moment: Moment, title: str) -> str:
    """Return a moment's caption."""
    text = f"{title}  step {moment.step}  reward {moment.reward:.2f}  return {moment.total:.1f}"
    return f"{text}  solved" if moment.success else text


def enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    """Return the picture with every pixel repeated `scale` times in both directions."""
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


if __name__ == "__main__":
    raise SystemExit(main())
