"""Published numbers, and where they may stand beside ours.

`published.csv` holds end points of papers with source, protocol and renderer. They are shown, never
computed with: no mean, interval or aggregate of a report contains one. They are *comparable* with
the runs on a task only if every run there has the same protocol (action repeat, pictures, networks,
batch), rendered as the authors did (`quality="reference"`), trained on clean pictures, and, under
`video_*`, was evaluated before videos of a folder rather than procedural ones. All others are listed
apart, with what differs.

Left out: numbers known from secondary texts only, and averages over tasks.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

from agents.core.errors import UserError
from envs import PROTOCOLS
from experiments.reporting.blocks import Cell, Table, cells, limits, number, slug
from experiments.reporting.runs import Run
from experiments.reporting.scores import CLEAN, Group, Summary, in_order
from experiments.reporting.tables import flag, joined, learned_notes

REDRAWN = "Starting states and color sets are drawn anew from the same distributions."
PUBLISHED = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Published:
    """An end point of a paper: one method on one task under one distraction."""

    agent: str
    task: str
    distraction: str
    mean: float
    """Return per episode."""
    std: float | None
    """Over seeds; None where the source has none."""
    seeds: str
    """How many; empty where the source does not say."""
    agent_steps: int
    protocol: str
    action_repeat: int
    renderer: str
    source: str
    remark: str

    @property
    def method(self) -> str:
        """The name under which an agent of ours would be the same method: `SVEA (conv)` is svea."""
        return re.sub(r" \(.*\)", "", self.agent).lower().replace("-", "")


@dataclass(frozen=True)
class Comparison:
    """A published number beside the runs on its task."""

    row: Published
    differences: tuple[str, ...]
    """Why it is not comparable; empty where protocol and renderer agree."""
    budget: str
    """The runs' agent steps where they are not the published ones, else empty."""

    @property
    def comparable(self) -> bool:
        """Whether it may stand beside our scores."""
        return not self.differences and not self.budget


@cache
def read_published(path: Path = PUBLISHED) -> tuple[Published, ...]:
    """Return the rows of the file.

    Raises:
        UserError: a column is missing, or a number is none.
    """
    names = [field.name for field in fields(Published)]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise UserError(f"'{path}' has columns {reader.fieldnames}; expected {names}")
        try:
            return tuple(_row(row) for row in reader)
        except ValueError as error:
            raise UserError(f"'{path}', line {reader.line_num}: {error}; mend it") from error


def _row(row: dict[str, str]) -> Published:
    return Published(
        row["agent"],
        row["task"],
        row["distraction"],
        float(row["mean"]),
        float(row["std"]) if row["std"] else None,
        row["seeds"],
        int(row["agent_steps"]),
        row["protocol"],
        int(row["action_repeat"]),
        row["renderer"],
        row["source"],
        row["remark"],
    )


def compare(
    summary: Summary, env_id: str, published: Iterable[Published] | None = None
) -> list[Comparison]:
    """Return what was published on a task under the distractions that its runs were evaluated on."""
    runs = [run for group in summary.of(env_id) for run in group.runs]
    names = summary.distractions(env_id)
    steps = sorted({run.evaluation.agent_steps for run in runs if run.evaluation})
    found = []
    for row in read_published() if published is None else published:
        if row.task == env_id and row.distraction in names:
            budget = "" if steps == [row.agent_steps] else " / ".join(f"{s:,}" for s in steps)
            found.append(Comparison(row, _differences(runs, row), budget))
    return found


def _differences(runs: Iterable[Run], row: Published) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for run in runs:
        env, evaluation = run.config["env"], run.evaluation
        protocol = PROTOCOLS.get(row.protocol)
        expected = {
            "protocol": (env.get("protocol"), row.protocol),
            "rendering": (env.get("quality"), "reference"),
            "action repeat": (env.get("action_repeat"), row.action_repeat),
            "pixels": (env.get("size"), protocol.size if protocol else env.get("size")),
            "training pictures": (env.get("distraction") or CLEAN, CLEAN),
            # Another preset cuts networks and batch below the protocol's.
            "preset": (run.config.get("preset"), "gpu"),
            "batch": (_batch(run), protocol.batch_size if protocol else _batch(run)),
        }
        found |= {
            f"{what} {ours or 'of no paper'}, not {theirs}": None
            for what, (ours, theirs) in expected.items()
            if ours != theirs
        }
        if row.distraction.startswith("video_") and evaluation:
            if evaluation.backgrounds == "procedural":
                found["procedural background videos, not the authors'"] = None
    return tuple(found)


def _batch(run: Run) -> int | None:
    configs = run.config.get("configs", {}).values()
    return next((config["batch_size"] for config in configs if "batch_size" in config), None)


def beside(comparisons: Sequence[Comparison], group: Group, distraction: str) -> list[Comparison]:
    """Return the published end points of a group's own method under the same protocol.

    Their budget may be larger than the runs': they belong at their own agent steps.
    """
    method = group.agent.replace("-", "")
    return [
        comparison
        for comparison in comparisons
        if comparison.row.method == method
        and comparison.row.distraction == distraction
        and not comparison.differences
    ]


def published_tables(
    summary: Summary, env_id: str, comparisons: Sequence[Comparison]
) -> list[Table]:
    """Return the comparable published numbers under our own, then the others with what differs."""
    learned = learned_notes(summary.of(env_id))
    comparable = [c for c in comparisons if c.comparable]
    others = [c for c in comparisons if not c.comparable]
    tables = []
    if comparable:
        caption = (
            f"Published numbers on {env_id}, same protocol, rendering and budget: mean ± standard "
            "deviation; ours: mean and 95 % interval."
        )
        table = _table(f"published-{slug(env_id)}", caption, comparable)
        rows = [*_own_rows(summary, env_id, table.head[1:-3]), *table.rows]
        tables.append(replace(table, rows=rows, notes=(*table.notes, REDRAWN, *learned)))
    if others:
        caption = (
            f"Published on {env_id}, other protocol, renderer or budget: not comparable with the "
            "numbers of this report."
        )
        table = _table(f"published-other-{slug(env_id)}", caption, others)
        tables.append(replace(table, notes=(*table.notes, *learned)))
    return tables


def _own_rows(summary: Summary, env_id: str, names: Sequence[str]) -> list[list[Cell]]:
    """Return our agents in the columns of `_table`."""
    rows = []
    for group in summary.of(env_id):
        found = [group.scores.get(name) for name in names]
        scores = [
            Cell(number(s.mean, 100), limits(s.low, s.high, 100)) if s else Cell("–") for s in found
        ]
        seeds = max((score.runs for score in found if score), default=0)
        steps = joined(f"{r.evaluation.agent_steps:,}" for r in group.runs if r.evaluation)
        how = f"this report, {joined(run.system.get('gl_renderer') for run in group.runs)}"
        agent = Cell(group.agent, flag=flag(group))
        rows.append([agent, *scores, *cells([str(seeds), steps, how])])
    return rows


def _table(name: str, caption: str, comparisons: Sequence[Comparison]) -> Table:
    """Return published numbers, a row per method and source; where they are from is in the notes."""
    names = in_order({c.row.distraction for c in comparisons})
    origins = list(dict.fromkeys(map(_origin, comparisons)))
    rows: dict[tuple[str, str, int, str], dict[str, Published]] = {}
    for comparison in comparisons:
        row = comparison.row
        key = (row.agent, row.seeds, row.agent_steps, _origin(comparison))
        rows.setdefault(key, {})[row.distraction] = row
    body = []
    for (agent, seeds, steps, origin), found in rows.items():
        scores = [_score(found.get(name)) for name in names]
        cost = [seeds or "not said", f"{steps:,}", f"published, {origins.index(origin) + 1}"]
        body.append(cells([agent, *scores, *cost]))
    head = ["agent", *names, "seeds", "agent steps", "source"]
    notes = tuple(f"{place}: {origin}." for place, origin in enumerate(origins, 1))
    return Table(name, caption, head, body, notes)


def _origin(comparison: Comparison) -> str:
    """Return where a number is from, how it was made, and what our runs have instead."""
    row = comparison.row
    parts = [
        row.source,
        f"protocol {row.protocol}, action repeat {row.action_repeat}",
        f"renderer: {row.renderer}",
        *([row.remark] if row.remark else []),
    ]
    ours = list(comparison.differences)
    if comparison.budget:
        ours.append(f"{comparison.budget} agent steps")
    return "; ".join([*parts, *([f"our runs have {', '.join(ours)}"] if ours else [])])


def _score(row: Published | None) -> str:
    if row is None:
        return "–"
    return f"{row.mean:.0f}" + ("" if row.std is None else f" ± {row.std:.0f}")
