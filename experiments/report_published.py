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
from experiments.report_blocks import Cell, Table, cells, limits, slug
from experiments.report_runs import Run
from experiments.report_scores import CLEAN, Group, Summary, in_order
from experiments.report_tables import flag, joined, learned_notes

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
    """Return the comparable published numbers, then the others with what differs."""
    learned = learned_notes(summary.of(env_id))
    comparable = [c for c in comparisons if c.comparable]
    others = [c for c in comparisons if not c.comparable]
    tables = []
    if comparable:
        caption = (
            f"Published numbers on {env_id}, same protocol, rendering and budget: mean ± standard "
            "deviation; ours: mean and 95 % interval."
        )
        notes = (REDRAWN, *learned)
        table = _table(f"published-{slug(env_id)}", caption, comparable, notes)
        tables.append(replace(table, rows=[*_own_rows(summary, env_id, comparable), *table.rows]))
    if others:
        caption = (
            f"Published on {env_id}, other protocol, renderer or budget: not comparable with the "
            "numbers of this report."
        )
        tables.append(
            _table(f"published-other-{slug(env_id)}", caption, others, learned, differs=True)
        )
    return tables


def _own_rows(summary: Summary, env_id: str, comparable: Sequence[Comparison]) -> list[list[Cell]]:
    """Return our agents under the distractions that have comparable numbers, in the same columns."""
    rows = []
    for name in in_order({comparison.row.distraction for comparison in comparable}):
        for group in summary.of(env_id):
            score = group.scores.get(name)
            if score is None:
                continue
            row = next(c.row for c in comparable if c.row.distraction == name)
            texts = [
                name,
                f"{score.mean:.0f} {limits(score.low, score.high, 100)}",
                str(score.runs),
                f"{row.agent_steps:,}",
                f"{row.protocol}, action repeat {row.action_repeat}",
                joined(run.system.get("gl_renderer") for run in group.runs),
                "this report",
            ]
            rows.append([Cell(group.agent, flag=flag(group)), *cells(texts)])
    return rows


def _table(
    name: str,
    caption: str,
    comparisons: Sequence[Comparison],
    notes: tuple[str, ...],
    *,
    differs: bool = False,
) -> Table:
    sources = list(dict.fromkeys(c.row.source for c in comparisons))
    rows = []
    for comparison in comparisons:
        row = comparison.row
        spread = "" if row.std is None else f" ± {row.std:.0f}"
        texts = [
            row.distraction,
            f"{row.mean:.0f}{spread}",
            row.seeds or "not said",
            f"{row.agent_steps:,}",
            f"{row.protocol}, action repeat {row.action_repeat}",
            row.renderer,
            str(1 + sources.index(row.source)) + (f"; {row.remark}" if row.remark else ""),
        ]
        if differs:
            budget = (f"trained for {comparison.budget} agent steps",) if comparison.budget else ()
            texts.append("; ".join((*comparison.differences, *budget)))
        rows.append([Cell(row.agent), *cells(texts)])
    head = ["agent", "distraction", "return", "seeds", "agent steps", "protocol"]
    head += ["renderer", "source", *(["our runs have"] if differs else [])]
    listed = tuple(f"{number}: {source}." for number, source in enumerate(sources, 1))
    return Table(name, caption, head, rows, (*listed, *notes), wide=True)
