"""Python orders sets by hashes that differ from process to process: no result and no message may follow that order."""

from __future__ import annotations

import ast
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.helpers import arguments

HOME = Path(__file__).parents[2]
PACKAGES = ("agents", "envs", "wrappers", "experiments")
ORDER_MATTERS = {"list", "tuple", "enumerate", "iter", "map", "zip", "dict", "join", "fromkeys"}
"""Calls whose result keeps the order of what they are given."""


def is_set(node: ast.expr) -> bool:
    """Tell whether an expression is a set by its form alone."""
    if isinstance(node, ast.BinOp):
        sides = (node.left, node.right)
        return isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor | ast.Sub) and any(
            is_set(side) or called(side) == "keys" for side in sides
        )
    return isinstance(node, ast.Set | ast.SetComp) or called(node) in ("set", "frozenset")


def called(node: ast.expr) -> str | None:
    """Return the last name of what a call calls."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "id", getattr(node.func, "attr", None))


def ordered_by_hash(source: str) -> Iterator[int]:
    """Yield the lines where the order of a set becomes the order of something else."""
    for node in ast.walk(ast.parse(source)):
        taken: list[ast.expr] = []
        if isinstance(node, ast.For | ast.Starred):
            taken = [node.iter if isinstance(node, ast.For) else node.value]
        elif isinstance(node, ast.ListComp | ast.DictComp):
            taken = [generator.iter for generator in node.generators]
        elif isinstance(node, ast.Call) and called(node) in ORDER_MATTERS:
            inner = [a.generators[0].iter for a in node.args if isinstance(a, ast.GeneratorExp)]
            taken = [*node.args, *inner]
        yield from (node.lineno for part in taken if is_set(part))


def test_no_loop_takes_its_order_from_a_set() -> None:
    found = [
        f"{file.relative_to(HOME)}:{line}"
        for package in PACKAGES
        for file in sorted((HOME / package).rglob("*.py"))
        for line in ordered_by_hash(file.read_text())
    ]
    assert found == [], "sort it, or keep the names in a dict"


@pytest.mark.parametrize(
    "line",
    [
        "for name in protocol.keys() & given.keys(): pass",
        "for slot in set(colors) - set(palette): raise KeyError(slot)",
        "{name: moments(name) for name in set(condition)}",
        "', '.join(str(n) for n in {1, 2})",
        "print(*{n for n in names})",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert list(ordered_by_hash(line)) == [1]
    assert list(ordered_by_hash("for n in sorted(set(names)): pass\nlen({1} | {2})")) == []


DRIVER = """
import json, sys
from experiments import evaluate, report, train
for name, words in json.loads(sys.argv[1]):
    print(name, {"train": train, "evaluate": evaluate, "report": report}[name].main(words))
"""


def commands(folder: Path, hash_seed: int) -> tuple[str, str]:
    """Run some commands, right and wrong ones, in a process with that hash seed; return output and errors."""
    run = folder / "run"
    short = arguments("sgqn", "toy/reach", run, steps=24, eval_every=12, eval_episodes=1,
                      episode_length=9, distraction="color_easy+video_hard+camera_easy")  # fmt: skip
    looked = ["--distractions", "clean", "objects_easy+light_easy+noise_easy", "randomized"]
    differing = [
        *("--size", "48", "--frame-stack", "2", "--action-repeat", "1", "--camera", "1"),
        *("--batch-size", "7", "--updates-per-step", "3", "--encoder", "small"),
    ]
    todo = [
        ("train", short),
        ("evaluate", [str(run), *looked, "--episodes", "2", "--workers", "0", "--no-media"]),
        ("report", [str(run), "--out", str(folder / "report")]),
        ("train", ["--protocol", "dmc-gb", "--env", "dmc/walker-walk", *differing]),
        ("train", ["--agent", "sgq"]),
        ("train", ["--env", "dmc/walker"]),
        ("train", ["--env", "toy/reach", "--distraction", "video+color"]),
        ("train", ["--resume", str(run), "--hidden", "3"]),
        ("evaluate", [str(run), "--distractions", "colour_hard", "wideo_easy"]),
    ]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(HOME)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(todo)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    codes = [line for line in done.stdout.splitlines() if line[-2:] in (" 0", " 2")]
    assert [line[-1] for line in codes] == ["0"] * 3 + ["2"] * 6, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    return "\n".join(codes), "\n".join(errors).replace(str(folder), "")


@pytest.mark.slow
def test_results_and_messages_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    said = []
    for hash_seed, folder in enumerate(folders, 1):
        folder.mkdir()
        said.append(commands(folder, hash_seed))
    assert said[0] == said[1]
    for name in ("config.json", "evaluations/step-000000024-test-seed0.json"):
        # As text: the order of the keys counts too.
        one, two = ((folder / "run" / name).read_text() for folder in folders)
        assert one == two
    assert metrics(folders[0]) == metrics(folders[1])
    tables = sorted(file.name for file in (folders[0] / "report").glob("*.csv"))
    assert len(tables) > 3
    for name in tables:
        one, two = (untimed(folder, name) for folder in folders)
        assert one == two, name


def metrics(folder: Path) -> list[tuple[str, ...]]:
    """Return the rows of metrics.csv in their order, without what a clock says."""
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["tag"].startswith("time/")]
    assert {row["tag"].partition("/")[0] for row in rows} >= {"train", "eval"}
    return [tuple(v for k, v in row.items() if k != "wall_seconds") for row in rows]


def untimed(folder: Path, name: str) -> list[tuple[str, ...]]:
    """Return a report table's rows without what a clock says."""
    with (folder / "report" / name).open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    clocks = ("time/", "wall_", "minutes")
    return [
        tuple(
            value.replace(str(folder), "")
            for key, value in row.items()
            if not any(clock in key for clock in clocks)
        )
        for row in rows
        if not any(clock in value for value in row.values() for clock in clocks)
    ]
