"""Data sets to learn from: which of their episodes, and whether they are of one task."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.core.errors import UserError
from experiments.data.datasets import Dataset, Episode, root_folder
from experiments.running.arguments import as_words

SAME_TASK = ("id", "size", "action_repeat", "camera")
"""Settings in which data sets that are learned together must not differ."""


def add_dataset_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flags that name data sets; see `named_datasets`."""
    parser.add_argument("--dataset", nargs="+", metavar="ID", help=what)
    parser.add_argument("--root", type=Path, help="folder of datasets [Minari's own]")
    parser.add_argument(
        "--episodes", type=int, metavar="N", help="first ones of every dataset [all]"
    )
    parser.add_argument(
        "--only-successful", action="store_true", help="leave out episodes that never succeed"
    )


def named_datasets(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Dataset]]:
    """Return what a run's config holds of the data sets that flags name, and these.

    Raises:
        UserError: one is missing or damaged, or none of its episodes is asked for.
    """
    if given["episodes"] is not None and given["episodes"] < 1:
        raise UserError(f"--episodes is {given['episodes']}; give at least 1")
    root = root_folder(given["root"]).expanduser().resolve()
    names = list(dict.fromkeys(given["dataset"]))
    about = {
        "root": str(root),
        "datasets": names,
        "episodes": given["episodes"],
        "only_successful": given["only_successful"],
    }
    return about, {name: Dataset(root, name) for name in names}


def new_demonstrations(given: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json holds of demonstrations that a run on a task learns from, too; nothing without any.

    Args:
        given: the flags.
        task: the settings of the run's task.

    Raises:
        UserError: they are of another task or show something else, or flags say how to learn from none.
    """
    if not given["dataset"]:
        for name in ("demonstration_share", "episodes", "only_successful", "root"):
            if given.get(name) is not None and given[name] is not False:  # 0 is a mistake, too
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is given, but no demonstrations; add --dataset")
        return {}
    about, datasets = named_datasets(given)
    own = common_task(datasets, task["id"])
    check_observation(own["observation"], task["observation"], about["datasets"][0])
    unseen = ("size", "camera") if task["observation"] == "state" else ()
    for field in SAME_TASK:
        # A dataset names its camera always, a run only where it is not the task's usual one.
        if field in unseen or None in (own[field], task[field]) or own[field] == task[field]:
            continue
        raise UserError(
            f"dataset '{about['datasets'][0]}' has {field} {as_words(own[field])}, this task {as_words(task[field])}; "
            f"give --{field.replace('_', '-')} {as_words(own[field])}, or draw it anew with collect --rerender"
        )
    return {"demonstrations": about}


def common_task(datasets: dict[str, Dataset], env: str | None) -> dict[str, Any]:
    """Return the settings of the first data set's task.

    Raises:
        UserError: a data set is of another task than `env`, or than the first; its steps are chunks; or it shows what
            evaluations are made of.
    """
    (first, *_), settings = datasets, next(iter(datasets.values())).about["settings"]
    if env is not None and env != settings["id"]:
        raise UserError(
            f"dataset '{first}' is of {settings['id']}, not of {env}; give demonstrations of {env}"
        )
    for name, dataset in datasets.items():
        own = dataset.about["settings"]
        for field in SAME_TASK:
            if own[field] != settings[field]:
                raise UserError(
                    f"dataset '{name}' has {field} {as_words(own[field])}, '{first}' has {as_words(settings[field])}; "
                    "imitate data sets of one task, or draw one anew with collect --rerender"
                )
        if own.get("action_chunk", 1) != 1:
            raise UserError(
                f"dataset '{name}' was collected in chunks of {own['action_chunk']} actions, between which nothing was "
                "seen; collect it with --action-chunk 1"
            )
        if own["split"] == "test" and own["distraction"]:
            raise UserError(
                f"dataset '{name}' shows {own['distraction']} of the test split, which evaluations are made of; draw "
                f"it anew: python -m experiments.collect NEW-v0 --rerender {name} --split train"
            )
    return settings


def check_observation(shown: str, wanted: str, dataset: str) -> None:
    """Refuse to learn from what a data set does not show.

    Raises:
        UserError: says what to do.
    """
    if shown not in (wanted, "both"):
        raise UserError(
            f"dataset '{dataset}' shows {shown}, not {wanted}; draw it anew: python -m experiments.collect NEW-v0 "
            f"--rerender {dataset} --observation {wanted}"
        )


def chosen_episodes(
    about: Mapping[str, Any],
) -> tuple[dict[str, Dataset], list[tuple[str, int]]]:
    """Return the data sets that a run's config names, and the (data set, number) of every episode to learn from.

    Args:
        about: its `demonstrations`.

    Raises:
        UserError: a data set is missing or damaged, or no episode is left.
    """
    datasets = {name: Dataset(Path(about["root"]), name) for name in about["datasets"]}
    chosen = [
        (name, index)
        for name, data in datasets.items()
        for index in range(min(len(data), about["episodes"] or len(data)))
        if not about["only_successful"] or _succeeded(name, data.read(index, scenes=False))
    ]
    if not chosen:
        which = "successful episodes" if about["only_successful"] else "episodes"
        raise UserError(f"there are no {which} in {', '.join(datasets)}; collect some")
    return datasets, chosen


def _succeeded(dataset: str, episode: Episode) -> bool:
    if "success" not in episode.infos:
        raise UserError(
            f"dataset '{dataset}' does not say which of its episodes succeeded, as its task does not tell; leave out "
            "--only-successful"
        )
    return bool(np.max(episode.infos["success"]) > 0)
