"""The run on top of whose policy a residual agent acts (`train --agent resfit --base RUN`), kept in its own folder.

Whatever has learned to act continuously can be one: by imitation, by reinforcement, or by Stable-Baselines3 in
`experiments.baseline`. What it needs to act is copied to `base/` of the new run, a run folder itself: the new run does
not miss the old one, and `python -m experiments.evaluate RUN/base` evaluates the base alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents import Policy
from agents.baselines import BASELINE, MODEL, NORMALIZATION
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.policy import BASE, read_config, run_identity
from experiments.running.imports import import_for_run
from experiments.running.runs import write_json
from experiments.sessions.bases import FLAGS, OF_THE_TASK, shapes
from experiments.sessions.teachers import weights_digest


@dataclass(frozen=True)
class FrozenBase:
    """What a new run takes from its base.

    Attributes:
        task: settings of its task, taken a single action at a time.
        about: where it is from, for config.json: folder, checkpoint and digest of its weights.
        imports: modules of third parties that it was trained with.
    """

    task: dict[str, Any]
    about: dict[str, str]
    imports: list[str]


def find_frozen_base(run: Path | None, agent: str, imports: Sequence[str]) -> FrozenBase:
    """Return what a run takes from the base that flags name.

    Args:
        run: a run folder.
        agent: that wants it.
        imports: modules that are imported anyway.

    Raises:
        UserError: none is given, or it is no run that can be loaded.
    """
    if run is None:
        raise UserError(
            f"agent '{agent}' acts on top of a policy that was trained before; give its run folder with --base"
        )
    own = import_for_run(read_config(run), imports, folder=run, source="the base's config")
    policy = Policy.load(run)
    task = {
        name: policy.config["env"][name] for name in OF_THE_TASK if name in policy.config["env"]
    }
    return FrozenBase(
        task=task | {"action_chunk": 1},
        about={
            "run": str(run.expanduser().resolve()),
            "checkpoint": _which(policy),
            "digest": weights_digest(policy.agent),
        },
        imports=own,
    )


def keep_base(about: Mapping[str, str], run: Path) -> None:
    """Copy a base into the folder of the run that acts on top of it; once it is there, nothing is done.

    Args:
        about: the base of the run's config.
        run: the folder.

    Raises:
        UserError: the base has changed since the config was made, or is gone.
    """
    folder, source = run / BASE, Path(about["run"])
    if folder.is_dir():
        return
    policy = Policy.load(source, checkpoint=about["checkpoint"])
    if weights_digest(policy.agent) != about["digest"]:
        raise UserError(
            f"the base {source} has changed since this run was made from it; begin a new run, or restore it"
        )
    unfinished = folder.with_name(f".writing-{BASE}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_json(unfinished / "config.json", policy.config)
    if policy.config["agent"].startswith(BASELINE):
        for name in (MODEL, NORMALIZATION):
            if (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
    else:
        store = CheckpointStore(unfinished, keep=1, identity=run_identity(policy.config))
        progress = {**policy.progress, "wall_seconds": 0.0}
        parts = {"agent": policy.agent.state_dict(weights_only=True), "progress": progress}
        store.save(policy.progress["agent_steps"], parts)
    if (source / BASE).is_dir():  # it acts on top of another one itself
        shutil.copytree(source / BASE, unfinished / BASE)
    unfinished.rename(folder)


def check_spaces(run: Path, spaces: Mapping[str, Any]) -> None:
    """Refuse a base that cannot see this task, or acts otherwise.

    Args:
        run: the run that keeps it.
        spaces: of its task, as config.json describes them.

    Raises:
        UserError: says what differs.
    """
    config, base = read_config(run)["base"], read_config(run / BASE)
    ours, theirs = spaces["action"], base["spaces"]["action"]
    acts = {**theirs, "box": theirs["box"][-1:]} if "box" in theirs else theirs
    if ours != acts:
        raise UserError(
            f"the base {config['run']} acts in {shapes(acts)}, this task in {shapes(ours)}; give a base of this task"
        )
    given = {name: _one_picture(part) for name, part in _parts(spaces["observation"]).items()}
    for name, part in _parts(base["spaces"]["observation"]).items():
        if _one_picture(part) != given.get(name):
            here = shapes(spaces["observation"])
            flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in FLAGS["observation"][:-1])
            raise UserError(
                f"the base {config['run']} observes {name} {shapes(part)}, this task shows {here}; give a base of this "
                f"task, or its settings ({flags})"
            )


def _parts(space: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parts of a space by name, as `fields.observation_boxes` names them."""
    if "dict" in space:
        return space["dict"]
    return {
        "pixels" if space.get("dtype") == "uint8" and len(space["box"]) == 3 else "state": space
    }


def _one_picture(part: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what must be the same in two tasks: of pictures the size, for every policy stacks its own."""
    shape = part["box"]
    if part["dtype"] == "uint8" and len(shape) == 3:
        return ("pixels", *shape[1:])
    return (part["dtype"], *shape)


def _which(policy: Policy) -> str:
    """Return the checkpoint that was loaded, by the name with which it is loaded again."""
    is_baseline = policy.config["agent"].startswith(BASELINE)
    return "latest" if is_baseline else policy.checkpoint
