"""Export a run's greedy policy to a file that needs nothing of Sightline.

    python -m experiments.export runs/dmc-cartpole-swingup/sgqn-seed1                  # ONNX
    python -m experiments.export RUN --format pt2 --checkpoint best --out policy.pt2   # torch.export

Observations go in as the task gives them (`pixels` uint8 [B, 3*k, H, W], `state` float32 [B, D]), actions come out in
[-1, 1] (or int64 [B]): cropping and normalization are part of the file, and what the numbers mean stands in it as JSON.
It computes in float32. Before it appears under its name it is loaded again and acts on random observations and on
some of the task, alone and in batches; a policy that acts differently is not written. docs/exporting.md shows how to
load it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import envs
from agents import Policy
from agents.core.errors import UserError, full_disk_named
from agents.core.fields import observation_boxes
from agents.core.greedy import freeze
from agents.policy import read_config, space_from_json
from experiments.export_formats import FORMATS, Act, trace
from experiments.running.arguments import Parser, check_out, run_command
from experiments.running.imports import add_import_flag, import_for_run

SCHEMA = 1
"""Version of the metadata."""

LIMIT = 1e-4
"""Largest difference of an action that sums in another order explain; 1e-6 is the most that was seen."""

BATCHES = (1, 7, 64)
"""Sizes of the batches of random observations."""

Observations = Mapping[str, np.ndarray]


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.export", description=__doc__)
    p.add_argument("run", type=Path, help="run folder that training wrote")
    add_import_flag(p)
    p.add_argument("--format", choices=tuple(FORMATS), help="kind of file [as --out ends, or onnx]")
    p.add_argument("--out", type=Path, metavar="FILE", help="[RUN/exports/<checkpoint>.<format>]")
    p.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    p.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint's name [latest]"
    )
    p.add_argument(
        "--task-observations", type=int, default=16, metavar="N",
        help="observations of the task to check on; 0 does not need the task [16]",
    )  # fmt: skip
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = parser().parse_args(argv)
    if given.task_observations < 0:
        raise UserError(f"--task-observations is {given.task_observations}; give 0 or more")
    kind = find_format(given.format, given.out)
    FORMATS[kind].check()
    check_out(given.out, overwrite=given.overwrite)
    import_for_run(read_config(given.run), given.imports, folder=given.run)
    policy = Policy.load(given.run, checkpoint=given.checkpoint)
    file = given.out or given.run / "exports" / f"{Path(policy.checkpoint).name}.{kind}"
    if file.exists() and not given.overwrite:
        raise UserError(f"'{file}' exists; use --overwrite, or another --out")
    seen = task_observations(policy, given.task_observations)
    difference = export(policy, file, kind, seen)
    task = policy.config["env"]["id"]
    print(
        f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)\n"
        f"largest difference of an action from the run's own in float32: {difference:.1e}, over {sum(BATCHES)} random "
        f"observations and {given.task_observations} of {task}"
    )
    return 0


def find_format(name: str | None, out: Path | None) -> str:
    """Return the format that the flags ask for.

    Raises:
        UserError: the file ends in something else.
    """
    if out is None:
        return name or "onnx"
    ending = out.suffix.removeprefix(".")
    if ending not in FORMATS or name not in (None, ending):
        wanted = " or ".join(f".{kind}" for kind in ([name] if name else FORMATS))
        raise UserError(f"--out is '{out}'; give a file that ends in {wanted}")
    return ending


def export(
    policy: Policy, file: Path, kind: str, observations: Observations | None = None
) -> float:
    """Write a policy's greedy action into a file, and return by how much its actions differ at most.

    Args:
        policy: on the CPU; it computes in float32 from now on.
        file: appears when it is whole and acts as the policy does; an old one is replaced.
        kind: a key of `FORMATS`.
        observations: a batch of the task's, to check on beside random ones.

    Raises:
        UserError: the agent cannot be exported, the folder cannot be written, or the actions differ.
    """
    freeze(policy.agent.networks())
    boxes = observation_boxes(space_from_json(policy.config["spaces"]["observation"]))
    rng = np.random.default_rng(0)
    batches: list[Observations] = [random_observations(boxes, size, rng) for size in BATCHES]
    example = {name: torch.as_tensor(part) for name, part in batches[1].items()}
    program = trace(policy.agent.greedy(), example)
    if observations is not None:
        batches += [observations, {name: part[:1] for name, part in observations.items()}]
    unfinished = file.with_name(f".writing-{file.name}")
    try:
        with _refusal_named(file), full_disk_named(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            FORMATS[kind].write(program, unfinished, json.dumps(describe(policy, boxes)))
        difference = largest_difference(policy.act, FORMATS[kind].load(unfinished), batches)
        if not difference <= LIMIT:
            raise UserError(
                f"the exported actions differ from the run's own by {difference:.1e}, more than {LIMIT:.0e}; "
                "nothing was written: the agent's `greedy` must do what its `act` does without exploring"
            )
        with _refusal_named(file):
            unfinished.replace(file)
    finally:
        # Where nothing can be written, deleting nothing is an error of many names.
        with suppress(OSError):
            unfinished.unlink()
    return difference


@contextmanager
def _refusal_named(file: Path) -> Iterator[None]:
    """Turn the error of a folder that takes no file into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write '{file.name}' into folder '{file.parent}' ({error.strerror or error}); give another --out"
        ) from error


def largest_difference(
    wanted: Callable[[Observations], np.ndarray], act: Act, batches: Sequence[Observations]
) -> float:
    """Return the largest difference between two policies' actions; of actions of other shapes or types, infinity."""
    largest = 0.0
    for batch in batches:
        own, other = wanted(batch), act(batch)
        if own.shape != other.shape or own.dtype != other.dtype:
            return float("inf")
        # NumPy's maximum keeps a NaN, Python's may not.
        difference = np.abs(own.astype(np.float64) - other.astype(np.float64))
        largest = float(np.maximum(largest, difference.max()))
    return largest


def random_observations(
    boxes: Mapping[str, gym.spaces.Box], size: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw a batch: pixels uniform, states normal."""
    drawn = {}
    for name, box in boxes.items():
        shape = (size, *box.shape)
        if box.dtype == np.uint8:
            drawn[name] = rng.integers(0, 256, shape, np.uint8)
        else:
            drawn[name] = rng.standard_normal(shape).astype(box.dtype)
    return drawn


def task_observations(policy: Policy, count: int) -> dict[str, np.ndarray] | None:
    """Return a batch of what the policy sees in its own task from the start on; None where `count` is 0.

    Raises:
        UserError: the task cannot be made here.
    """
    if not count:
        return None
    try:
        env = envs.make(**{**policy.config["env"], "seed": 0})
    except ValueError as error:
        if getattr(error, "exit_code", None) is None:
            raise
        raise UserError(
            f"{error} (or check on random observations alone: --task-observations 0)"
        ) from error
    with closing(env):
        seen = [part for part, _ in zip(_walk(policy, env), range(count), strict=False)]
    names = observation_boxes(env.observation_space)
    return {
        name: np.stack([part[name] if isinstance(part, Mapping) else part for part in seen])
        for name in names
    }


def _walk(policy: Policy, env: envs.Environment) -> Iterator[Any]:
    """Yield observations forever, acting greedily."""
    while True:
        observation, _ = env.reset(seed=0)
        ended = False
        while not ended:
            yield observation
            observation, _, terminated, truncated, _ = env.step(policy.act(observation))
            ended = terminated or truncated


def describe(policy: Policy, boxes: Mapping[str, gym.spaces.Box]) -> dict[str, Any]:
    """Return the file's metadata: what goes in, what comes out, and where it is from."""
    config, action = policy.config, space_from_json(policy.config["spaces"]["action"])
    acts: dict[str, Any] = {"shape": list(action.shape or ()), "dtype": str(action.dtype)}
    if isinstance(action, gym.spaces.Discrete):
        acts |= {"dtype": "int64", "count": int(action.n)}
    else:
        acts["bounds"] = [-1.0, 1.0]
    return {
        "schema": SCHEMA,
        "agent": config["agent"],
        "task": config["env"]["id"],
        "checkpoint": Path(policy.checkpoint).name,
        "progress": policy.progress,
        "observation": [
            {"name": name, "shape": list(box.shape), "dtype": str(box.dtype)}
            for name, box in boxes.items()
        ],
        "action": acts,
        "frame_stack": config["env"]["frame_stack"] if "pixels" in boxes else 1,
        "action_repeat": config["env"]["action_repeat"],
        "action_chunk": config["env"].get("action_chunk", 1),
        "config": config,
    }


if __name__ == "__main__":
    raise SystemExit(main())
