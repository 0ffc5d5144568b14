"""Try a run's task several times from the same starts, and count successes and the ways to succeed.

    python -m experiments.passes runs/toy-goals/polychromic-seed1
    python -m experiments.passes RUN --attempts 64 --starts 20 --k 1 8 64

The policy is sampled as in training: a greedy one would do the same again. Of every start's attempts, pass@k is the
chance that at least one of k succeeds (unbiased; Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1), and ways@k
how many different behaviors k attempts succeed with, where the task's `info["behavior"]` tells them apart. Writes
passes/<name>.json into the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import envs
from agents import Policy
from agents.core.errors import UserError
from agents.core.seeding import spawn_seeds
from agents.policy import read_config
from envs.vector import VectorEnv
from experiments.evaluating.rollouts import ActFunction, episode_seeds, random_policy
from experiments.running.arguments import Parser, run_command
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.runs import write_json
from experiments.running.settings import check_device

FAILED, UNTOLD = -2, -1
"""What stands for an attempt's behavior where it did not succeed, and where the task did not say how."""


def pass_at_k(attempts: int, successes: int, k: int) -> float:
    """Return the chance that k of some attempts, drawn without replacement, hold at least one success.

    Args:
        attempts: how many were made.
        successes: how many of them succeeded.
        k: at most `attempts`.
    """
    return 1.0 - math.comb(attempts - successes, k) / math.comb(attempts, k)


def ways_at_k(attempts: int, successes: Iterable[int], k: int) -> float:
    """Return the mean number of different behaviors that k attempts succeed with.

    Args:
        attempts: how many were made.
        successes: how many of them succeeded with each behavior.
        k: at most `attempts`.
    """
    return sum(pass_at_k(attempts, count, k) for count in successes)


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.passes", description=__doc__)
    p.add_argument("run", type=Path, help="run folder that training wrote")
    add_import_flag(p)
    p.add_argument("--attempts", type=int, default=32, help="from every start [32]")
    p.add_argument("--starts", type=int, default=10, help="states that episodes begin in [10]")
    p.add_argument("--k", type=int, nargs="+", metavar="K",
                   help="attempts that count together [1 2 4 8 ... attempts]")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the starts and the policy's draws [0]")
    p.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint's name [latest]"
    )
    p.add_argument("--num-envs", type=int, default=16, help="attempts at a time [16]")
    p.add_argument("--workers", type=int, default=0, help="worker processes for them [0]")
    p.add_argument("--device", default="cpu", help="where the policy acts [cpu]")
    p.add_argument("--name", help="name of the result [step-..-seed..]")
    p.add_argument("--overwrite", action="store_true", help="replace a result of the same name")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    for name in ("attempts", "starts", "num_envs"):
        if getattr(arguments, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least 1"
            )
    if arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}; give at least 0")
    counted = arguments.k or powers_of_two(arguments.attempts)
    for k in counted:
        if not 1 <= k <= arguments.attempts:
            raise UserError(
                f"--k is {k}; give numbers from 1 to the attempts, {arguments.attempts}"
            )
    run, seed = arguments.run, arguments.seed
    imports = import_for_run(read_config(run), arguments.imports, folder=run)
    device = check_device(arguments.device)
    policy = Policy.load(run, checkpoint=arguments.checkpoint, device=device)
    name = arguments.name or f"step-{policy.progress['agent_steps']:09d}-seed{seed}"
    if Path(name).name != name:
        raise UserError(f"--name is '{name}'; give a name without folders")
    file = run / "passes" / f"{name}.json"
    if file.exists() and not arguments.overwrite:
        raise UserError(f"'{file}' exists; use --overwrite, or another --name")
    exploration = spawn_seeds(seed)[1]["exploration"]
    policy.agent.generator.manual_seed(exploration)
    policy.agent.set_progress(policy.progress["agent_steps"])
    result: dict[str, Any] = {
        **policy.progress,
        "checkpoint": policy.checkpoint,
        "seed": seed,
        "attempts": arguments.attempts,
        "starts": arguments.starts,
    }
    keywords = {**policy.config["env"], "seed": seed}
    count = min(arguments.num_envs, arguments.attempts)
    workers = min(arguments.workers, count)
    with closing(
        envs.make_vec(num_envs=count, workers=workers, imports=imports, **keywords)
    ) as vector:
        seeds = episode_seeds(seed, arguments.starts)
        for who, act in (
            ("random_policy", random_policy(vector, exploration)),
            ("policy", lambda seen: policy.act(seen, explore=True)),
        ):
            behaviors = [
                attempt(act, vector, start, arguments.attempts, policy.begin) for start in seeds
            ]
            result[who] = {"behaviors": behaviors, **scores(behaviors, counted)}
    file.parent.mkdir(exist_ok=True)
    write_json(file, result)
    print(summary(result))
    print(f"wrote {file}")
    return 0


def powers_of_two(limit: int) -> list[int]:
    """Return 1, 2, 4 ... and the limit."""
    return [*(2**i for i in range((limit - 1).bit_length())), limit]


def attempt(
    act: ActFunction,
    vector: VectorEnv,
    start: int,
    attempts: int,
    begin: Callable[[], None] = lambda: None,
) -> list[int]:
    """Return how attempts from one start ended: a behavior's number, `UNTOLD` or `FAILED`.

    Args:
        act: the policy.
        vector: as many attempts as it has environments are made at a time.
        start: seed of the state that all begin in.
        attempts: how many.
        begin: called before the first observation of new episodes.

    Raises:
        UserError: the task does not tell success.
    """
    space, ends = vector.action_space, list[int]()
    while len(ends) < attempts:
        begin()
        seen, _ = vector.reset(seed=[start] * vector.num_envs)
        behavior = np.full(vector.num_envs, FAILED)
        running = np.ones(vector.num_envs, bool)
        while running.any():
            action = act(seen)
            if isinstance(space, gym.spaces.Box):
                action = np.clip(action, space.low, space.high)
            seen, _, terminated, truncated, info = vector.step(action)
            ended = terminated | truncated
            final = info.get("final_info", {})
            if (ended & running).any() and "success" not in final:
                raise UserError('this task does not tell by info["success"] whether it is solved')
            for i in np.flatnonzero(running):  # a success at any moment counts
                told = final if ended[i] else info
                if "success" in told and told["success"][i] > 0 and behavior[i] == FAILED:
                    behavior[i] = int(told["behavior"][i]) if "behavior" in told else UNTOLD
            running &= ~ended
        ends += behavior.tolist()
    return ends[:attempts]


def scores(behaviors: Sequence[Sequence[int]], counted: Sequence[int]) -> dict[str, Any]:
    """Return pass@k and ways@k, means over starts, by k.

    Args:
        behaviors: how the attempts from every start ended, see `attempt`.
        counted: the values of k.
    """
    passes: dict[str, float] = {}
    ways: dict[str, float] = {}
    for k in counted:
        each = [
            (len(ends), [ends.count(way) for way in sorted({*ends} - {FAILED, UNTOLD})], ends)
            for ends in behaviors
        ]
        passes[str(k)] = float(
            np.mean([pass_at_k(n, n - list(ends).count(FAILED), k) for n, _, ends in each])
        )
        ways[str(k)] = float(np.mean([ways_at_k(n, counts, k) for n, counts, _ in each]))
    has_ways = any(end >= 0 for ends in behaviors for end in ends)
    return {"pass_at_k": passes, "ways_at_k": ways if has_ways else None}


def summary(result: dict[str, Any]) -> str:
    """Return the table that a person reads."""
    lines = [
        f"{result['attempts']} attempts from each of {result['starts']} starts, "
        f"after {result['agent_steps']:,} agent steps"
    ]
    for who in ("random_policy", "policy"):
        row = result[who]
        name = who.replace("_", " ")
        lines.append(f"{name:>13}  pass@k  " + _row(row["pass_at_k"], "7.1%"))
        if row["ways_at_k"]:
            lines.append(f"{'':>13}  ways@k  " + _row(row["ways_at_k"], "7.2f"))
    return "\n".join(lines)


def _row(values: dict[str, float], form: str) -> str:
    return "  ".join(f"{k}: {value:{form}}" for k, value in values.items())


if __name__ == "__main__":
    raise SystemExit(main())
