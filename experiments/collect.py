"""Collect episodes as a Minari dataset, or show the episodes of one under another distraction.

    python -m experiments.collect cartpole/random-v0 --random --env dmc/cartpole-swingup
    python -m experiments.collect drawer/expert-v0 --expert --env metaworld/drawer-open --action-repeat 1
    python -m experiments.collect cartpole/sgqn-v0 --run runs/dmc-cartpole-swingup/sgqn-seed1 --episodes 50
    python -m experiments.collect cartpole/sgqn-video-v0 --rerender cartpole/sgqn-v0 --distraction video_hard

`minari.load_dataset("cartpole/random-v0")` reads what is written. The simulator's scenes are kept beside the
observations, so that the same episodes can be drawn again: in other colors, before videos, at another size or quality,
from other cameras, or as pixels where only states were collected. Several cameras are parts of an observation, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import envs
from agents import Policy
from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.core.settings import argument_docs
from agents.policy import read_config
from envs.experts import scripted_expert
from envs.settings import Settings
from experiments.data.datasets import (
    Dataset,
    DatasetWriter,
    new_path,
    play,
    redraw,
    root_folder,
)
from experiments.evaluating.rollouts import episode_seeds
from experiments.running.arguments import Parser, add_dataclass, fill, run_command
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.runs import git_commit
from experiments.running.settings import check_device

Act = Callable[[Any, dict[str, Any]], Any]
"""From an observation and a scene to an action."""

OF_A_RUN = ("distraction", "split", "videos", "quality", "episode_length", "end_at_success")
"""Settings of a run's task that may differ when its policy collects."""
OF_A_PICTURE = (
    "observation", "distraction", "size", "frame_stack", "quality", "supersample", "camera", "split", "videos",
)  # fmt: skip
"""Settings that `--rerender` may change."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.collect", description=__doc__)
    p.add_argument("dataset", help="id of the new dataset: name-v0 or namespace/name-v0")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="act as this run's policy does, greedily")
    source.add_argument("--random", action="store_true", help="take uniform actions")
    source.add_argument(
        "--expert", action="store_true", help="act as the task's script does: metaworld/ and toy/"
    )
    source.add_argument("--rerender", metavar="ID", help="draw the episodes of this dataset anew")
    add_import_flag(p)
    p.add_argument("--env", metavar="ID", help="task, with --random or --expert")
    p.add_argument("--episodes", type=int, help="how many [10; with --rerender all]")
    p.add_argument("--seed", type=int, default=0, help="seed of episodes and random actions [0]")
    p.add_argument("--root", type=Path, help="folder of datasets [Minari's own]")
    p.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint's name [latest]"
    )
    p.add_argument("--device", default="cpu", help="where a run's policy acts [cpu]")
    add_dataclass(
        p,
        "task",
        Settings(""),
        skip=("id", "seed", "foreground_mask", "side_by_side"),
        docs=argument_docs(envs.make),
    )
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = vars(parser().parse_args(argv))
    if given["episodes"] is not None and given["episodes"] < 1:
        raise UserError(f"--episodes is {given['episodes']}; give at least 1")
    if (given["env"] is None) == (given["random"] or given["expert"]):
        raise UserError("give --env with --random and --expert, and with these alone")
    root = root_folder(given["root"])
    new_path(root, given["dataset"])  # refuse now what cannot be written later
    outcomes = rerender(root, given) if given["rerender"] else collect(root, given)
    returns = [one.total for one in outcomes]
    told = [one.success for one in outcomes if one.success is not None]
    solved = f"{sum(told)} of {len(told)} succeeded, " if told else ""
    path = root / given["dataset"]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(
        f"{len(returns)} episodes, {solved}return {np.mean(returns):.1f} ± {np.std(returns):.1f}, "
        f"{size / 1e6:.1f} MB in {path}\nread it with minari.load_dataset('{given['dataset']}')"
    )
    return 0


class Outcome(NamedTuple):
    """What an episode came to."""

    total: float
    """Its return."""
    success: bool | None
    """Whether it was ever solved; None where the task does not tell."""


def collect(root: Path, given: dict[str, Any]) -> list[Outcome]:
    """Write a dataset of new episodes and return what they came to."""
    seeds = episode_seeds(given["seed"], given["episodes"] or 10)
    settings, about, make_act = source(given)
    with closing(envs.make(**settings)) as env:
        env.action_space.seed(given["seed"])
        episodes = (play(env, make_act(env), seed) for seed in seeds)
        return write(root, given["dataset"], env, about, episodes, len(seeds))


def source(
    given: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], Callable[[envs.Environment], Act]]:
    """Return the environment's settings, what is remembered of the source, and what acts in one episode."""
    about: dict[str, Any] = {"seed": given["seed"], "commit": git_commit()}
    if given["run"]:
        imports = import_for_run(read_config(given["run"]), given["imports"], folder=given["run"])
        policy = Policy.load(
            given["run"], checkpoint=given["checkpoint"], device=check_device(given["device"])
        )
        about |= {"source": "run", "run": str(given["run"]), "checkpoint": policy.checkpoint}
        apart = {**policy.config["env"], "side_by_side": False}  # the policy joins them itself
        settings = changed(apart, given, OF_A_RUN, "--run")

        def of_the_run(env: envs.Environment) -> Act:
            policy.begin()
            return lambda seen, _: policy.act(seen)

        return settings, about | {"imports": imports}, of_the_run
    import_modules(given["imports"])
    settings = fill(Settings(given["env"]), _task_flags(given)).resolved().as_dict()
    about["imports"] = given["imports"]
    if given["random"]:
        about["source"] = "random"
        return settings, about, lambda env: lambda seen, scene: env.action_space.sample()
    if given["env"].partition("/")[0] not in ("metaworld", "toy"):
        raise UserError(
            f"--expert is for metaworld/ and toy/ tasks, not for {given['env']}; use --random"
        )
    expert = scripted_expert(given["env"])
    about["source"] = "expert"
    return settings, about, lambda env: lambda seen, scene: expert(scene["state"])


def rerender(root: Path, given: dict[str, Any]) -> list[Outcome]:
    """Write a dataset with the episodes of another, drawn anew, and return what they came to."""
    dataset = Dataset(root, given["rerender"])
    imports = import_for_run(dataset.about, given["imports"], source="the dataset")
    # What a protocol fixes stands in the settings; its name would forbid another size or camera.
    own = {**dataset.about["settings"], "protocol": None}
    settings = changed(own, given, OF_A_PICTURE, "--rerender")
    origin = {k: v for k, v in dataset.about.items() if k not in ("schema", "settings")}
    about = {**origin, "imports": imports, "rerendered_from": given["rerender"]}
    count = min(given["episodes"] or len(dataset), len(dataset))
    with closing(envs.make(**settings)) as env:
        episodes = (redraw(env, dataset[i]) for i in range(count))
        return write(root, given["dataset"], env, about, episodes, count)


def write(
    root: Path,
    dataset: str,
    env: envs.Environment,
    about: dict[str, Any],
    episodes: Any,
    count: int,
) -> list[Outcome]:
    """Write episodes as they come and return what they came to."""
    outcomes = []
    with DatasetWriter(root, dataset, env, about) as writer:
        for episode in tqdm(episodes, total=count, unit="episode", disable=None, leave=False):
            writer.add(episode)
            success = episode.infos.get("success")
            solved = None if success is None else bool(np.max(success) > 0)
            outcomes.append(Outcome(float(np.sum(episode.rewards)), solved))
    return outcomes


def changed(
    settings: dict[str, Any], given: dict[str, Any], allowed: Sequence[str], flag: str
) -> dict[str, Any]:
    """Return settings with the flags that were given.

    Raises:
        UserError: a flag is given that is not `allowed` beside `flag`.
    """
    changes = _task_flags(given)
    for name in changes:
        if name not in allowed:
            names = ", ".join(f"--{other.replace('_', '-')}" for other in allowed)
            raise UserError(f"--{name.replace('_', '-')} cannot change with {flag}; {names} can")
    return fill(Settings(**settings), changes).resolved().as_dict()


def _task_flags(given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Settings)} - {"id", "seed"}
    return {name: value for name, value in given.items() if name in names}


if __name__ == "__main__":
    raise SystemExit(main())
