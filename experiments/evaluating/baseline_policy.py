"""A zip of Stable-Baselines3 as a policy for the commands: a zip knows no task, so flags name it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import envs
from agents import Policy
from agents.baseline_networks import ACTIVATIONS
from agents.baselines import load_sb3
from agents.core.errors import UserError
from agents.core.settings import argument_docs
from envs.settings import Settings
from experiments.running.arguments import add_dataclass, fill

_NOT_ASKED = (
    "id", "seed", "distraction", "split", "videos", "foreground_mask", "protocol", "side_by_side",
)  # fmt: skip
"""Settings of a task that an evaluation has its own flags for, or that are a run's."""

_OWN = ("env", "sb3_activation", "sb3_normalization", "trust_pickle")


def is_zip(path: Path) -> bool:
    """Whether a path names a zip, there or not, rather than a run folder."""
    return path.suffix == ".zip" and not path.is_dir()


def add_baseline_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on which task a zip acts, and how; absent from the namespace unless given."""
    group = parser.add_argument_group("a zip of Stable-Baselines3 instead of a run folder")
    missing: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument("--env", metavar="ID", help="task that it acts on", **missing)
    group.add_argument(
        "--sb3-activation", metavar="|".join(ACTIVATIONS), **missing,
        help="between its layers [what the zip says, else tanh for PPO and A2C, relu for SAC and TD3]",
    )  # fmt: skip
    group.add_argument(
        "--sb3-normalization", type=Path, metavar="FILE", **missing,
        help="what VecNormalize.save wrote: a pickle, which needs --trust-pickle",
    )  # fmt: skip
    group.add_argument(
        "--trust-pickle", action="store_true", **missing,
        help="run the code that pickles bring: for policies of your own classes, and statistics",
    )  # fmt: skip
    docs = argument_docs(envs.make)
    add_dataclass(parser, "task of that zip", Settings(""), skip=_NOT_ASKED, docs=docs)


def refuse_baseline_flags(given: Mapping[str, Any]) -> None:
    """Raise UserError where a flag for zips is given with a run folder, which knows its own task."""
    for name in (*_OWN, *vars(Settings(""))):
        if name in given and name not in _NOT_ASKED:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is for a zip of Stable-Baselines3, a run folder knows its own; leave it out"
            )


def load_zip(path: Path, given: Mapping[str, Any], *, device: str) -> Policy:
    """Return the policy of a zip on the task that flags name.

    Args:
        path: the zip.
        given: parsed flags, those of `add_baseline_flags` among them.
        device: where it acts.

    Raises:
        UserError: no task is named, or the zip does not fit it.
    """
    if "env" not in given:
        raise UserError(
            f"'{path}' does not say on which task it acts; give --env, and --observation state if it saw states"
        )
    settings = {k: v for k, v in given.items() if k not in _NOT_ASKED}
    # The same pictures every time: what is random is seeded by the evaluation.
    task = fill(Settings(given["env"], seed=0, side_by_side=True), settings).resolved().as_dict()
    with closing(envs.make_vec(num_envs=1, **task)) as vector:
        agent = load_sb3(
            path,
            vector.single_observation_space,
            vector.single_action_space,
            activation=given.get("sb3_activation"),
            normalization=given.get("sb3_normalization"),
            trust_pickle=given.get("trust_pickle", False),
            device=device,
        )
    return Policy.of_sb3(path, agent, task)
