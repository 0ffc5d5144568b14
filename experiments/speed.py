"""Tables of every hot path, against the simulators as shipped, the naive way, and Stable-Baselines3.

    python -m experiments.speed
    python -m experiments.speed rendering replay --seconds 10 --out speed.md
    python -m experiments.speed generators --device cuda
    python -m experiments.speed acting --peer-python lerobot/bin/python

Markdown, in one run of about seven minutes on two idle cores. What a row compares takes turns, one at a time, and the
medians count, so that ratios hold on a busy machine too; a time alone says as much about the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from agents.core.errors import UserError
from envs.rendering import resolve_quality
from experiments.measuring.timing import Table
from experiments.running.arguments import Parser, add_out_flags, check_out, run_command
from experiments.running.runs import command_line, describe_system
from experiments.running.settings import check_device

PARTS = (
    "rendering", "environments", "replay", "updates", "training", "sb3", "on-policy", "acting", "generators",
)  # fmt: skip


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.speed", description=__doc__)
    p.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="what to measure [all of it]")
    p.add_argument("--seconds", type=float, default=4.0, help="time for each comparison, about [4]")
    p.add_argument(
        "--device", default="cpu", help="of updates, acting and generators: cpu, cuda or auto [cpu]"
    )
    p.add_argument("--peer-python", type=Path, metavar="PATH",
                   help="a Python that has LeRobot, to act beside ours [LeRobot is left out]")  # fmt: skip
    add_out_flags(p, "the tables")
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            raise UserError.unknown("part", part, PARTS)
    if not 0 < arguments.seconds < float("inf"):
        raise UserError(f"--seconds is {arguments.seconds}; give a positive number")
    device = check_device(arguments.device)
    check_out(arguments.out, overwrite=arguments.overwrite)
    sections = [_header()]
    print(sections[0])
    for name, measure in _measures(arguments.parts or PARTS, device, arguments.peer_python):
        start = time.perf_counter()
        tables = measure(arguments.seconds)
        print(
            f"measured {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
        )
        for table in tables:
            sections.append(table.markdown())
            print(sections[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(sections))
    return 0


def _measures(
    parts: Sequence[str], device: str, peer_python: Path | None
) -> list[tuple[str, Callable[[float], list[Table]]]]:
    """Return what measures each part, in order."""
    if {"rendering", "environments", "training", "sb3", "on-policy"} & set(parts):
        resolve_quality("fast")  # before any of them imports a simulator
    from experiments.measuring import (
        acting,
        agents,
        compiled,
        environments,
        generators,
        large_generators,
        on_policy,
        training,
    )

    measures: dict[str, list[tuple[str, Callable[[float], list[Table]]]]] = {
        "rendering": [
            ("rendering", environments.rendering),
            ("distractions", environments.distractions),
        ],
        "environments": [("environments", environments.environments)],
        "replay": [("replay", agents.replay)],
        "updates": [
            ("updates", partial(agents.updates, device=device)),
            ("compiled updates", partial(compiled.compiled, device=device)),
        ],
        "training": [("training", partial(training.training, device=device))],
        "sb3": [("Stable-Baselines3", agents.peer)],
        "on-policy": [("on-policy training", on_policy.on_policy)],
        "acting": [("acting", partial(acting.acting, device=device, peer_python=peer_python))],
        "generators": [
            ("generators", partial(generators.generators, device=device)),
            ("large generators", partial(large_generators.large_generators, device=device)),
        ],
    }
    return [measure for part in PARTS if part in parts for measure in measures[part]]


def _header() -> str:
    system = describe_system()
    hardware = ", ".join(f"{key} {value}" for key, value in system["hardware"].items() if value)
    return (
        f"# Speed\n\n`{command_line()}` at commit {system['commit']}: {hardware}, "
        f"{system['threads']} threads, torch {system['versions']['torch']}, "
        f"mujoco {system['versions']['mujoco']}\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
