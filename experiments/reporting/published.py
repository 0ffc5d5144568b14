"""Published numbers, and where they may stand beside ours.

`published.csv` holds end points of papers with source, protocol and renderer. They are shown, never
computed with: no mean, interval or aggregate of a report contains one. They are *comparable* with
the runs on a task only if every run there was trained with the very settings that `--protocol P
--preset gpu` gives its agent (task, pictures, rendering, networks, loop), from the task's own reward
and on clean pictures, and was evaluated on the test split, under `video_*` before videos of a folder
rather than procedural ones. All others are listed apart, with what differs. What a report cannot see,
whether a folder holds the authors' own videos or overlays, is said in the notes.

Left out: numbers known from secondary texts only, and averages over tasks.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from agents.core.errors import UserError
from envs import PROTOCOLS
from experiments.evaluating.videos import PROCEDURAL
from experiments.reporting.blocks import Cell, Table, cells, limits, number, slug
from experiments.reporting.runs import Run
from experiments.reporting.scores import CLEAN, Group, Summary, in_order
from experiments.reporting.tables import flag, joined, learned_notes
from experiments.running.configs import with_new_fields
from experiments.train import new_config, parser

REDRAWN = "Starting states and color sets are drawn anew from the same distributions."
PUBLISHED = Path(__file__).with_name("published.csv")

WORDS = {
    "quality": "rendering",
    "size": "pixels",
    "distraction": "training pictures",
    "batch_size": "batch",
}
"""What readers call some settings."""

FREE = {
    "protocol", "seed", "videos", "overlay_folder", "workers", "timeout", "precision", "channels_last",
    "steps", "log_every", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints", "exact_resume",
}  # fmt: skip
"""Settings that may differ: they are told or compared otherwise (protocol, steps, folders), or change rounding or no
more than what is logged and kept."""

ADDED = {
    "base": "another run's policy to begin with",
    "teacher": "a teacher",
    "demonstrations": "demonstrations",
}
"""Parts of config.json that no published number's training had."""


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
        found |= dict.fromkeys(_other_training(run, row))
        evaluation = run.evaluation
        if evaluation is None:
            continue
        if evaluation.split != "test":
            found[f"an evaluation on the {evaluation.split} split, not test"] = None
        if row.distraction.startswith("video_") and evaluation.backgrounds == PROCEDURAL:
            found["procedural background videos, not the authors'"] = None
    return tuple(found)


def _other_training(run: Run, row: Published) -> Iterator[str]:
    """Say in what a run's training departs from its agent's under a published number's protocol."""
    own = run.config["env"].get("protocol")
    if own != row.protocol:
        yield f"protocol {own or 'of no paper'}, not {row.protocol}"
    if row.protocol not in PROTOCOLS:
        return
    try:
        wanted = _protocol_config(run.config["agent"], row.task, row.protocol)
    except UserError:
        yield f"agent {run.config['agent']}, which no protocol is known for"
        return
    for part, what in ADDED.items():
        if part in run.config:
            yield what
    found = with_new_fields(run.config, wanted)
    if found["reward"] != wanted["reward"]:
        yield f"reward {found['reward']}, not {wanted['reward']}"
    task = {**wanted["env"], "action_repeat": row.action_repeat}
    for part, theirs in (("env", task), ("vector", wanted["vector"]), ("train", wanted["train"])):
        yield from _other_values(found[part], theirs)
    for name, values in wanted["configs"].items():
        yield from _other_values(found["configs"].get(name, {}), values)


def _other_values(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, theirs in wanted.items():
        ours = found.get(name)
        if name not in FREE and ours != theirs:
            word = WORDS.get(name, name.replace("_", " "))
            unset = CLEAN if name == "distraction" else "none"
            texts = (_plain(unset if value is None else value) for value in (ours, theirs))
            yield f"{word} {', not '.join(texts)}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@cache
def _protocol_config(agent: str, env_id: str, protocol: str) -> dict[str, Any]:
    """Return the config.json that the training command writes for an agent under a protocol.

    Raises:
        UserError: there is no such agent, or it cannot be trained by these words alone.
    """
    words = ["--agent", agent, "--env", env_id, "--protocol", protocol, "--preset", "gpu"]
    words += ["--device", "cpu", "--seed", "0"]
    return json.loads(json.dumps(new_config(vars(parser(agent).parse_args(words)))))


def _media_notes(runs: Iterable[Run], comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Say what of the runs' videos and overlays no file tells: whether they are the authors' own."""
    notes: dict[str, None] = {}
    for run in runs:
        videos = run.evaluation.backgrounds if run.evaluation else PROCEDURAL
        if videos != PROCEDURAL and any(c.row.distraction[:6] == "video_" for c in comparisons):
            notes[
                f"Our background videos are those of '{videos}': whether they are the authors' is not known."
            ] = None
        for values in run.config.get("configs", {}).values():
            if values.get("strong_augmentation") == "overlay":
                folder = values.get("overlay_folder")
                laid = f"the images of '{folder}'" if folder else "procedural textures"
                notes[f"{run.agent} lays {laid} over its pictures, the authors Places365."] = None
    return tuple(notes)


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
    runs = [run for group in summary.of(env_id) for run in group.runs]
    media = _media_notes(runs, comparisons)
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
        tables.append(replace(table, rows=rows, notes=(*table.notes, REDRAWN, *media, *learned)))
    if others:
        caption = (
            f"Published on {env_id}, other protocol, renderer or budget: not comparable with the "
            "numbers of this report."
        )
        table = _table(f"published-other-{slug(env_id)}", caption, others)
        tables.append(replace(table, notes=(*table.notes, *media, *learned)))
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
        how = f"this report, {joined(name for run in group.runs for name in run.renderers)}"
        agent = Cell(group.agent, flag=flag(group))
        rows.append([agent, *scores, *cells([str(seeds), steps, how])])
    return rows


def _table(name: str, caption: str, comparisons: Sequence[Comparison]) -> Table:
    """Return published numbers, a row per method and source; where they are from is in the notes."""
    names = in_order({c.row.distraction for c in comparisons})
    sources: dict[str, list[Comparison]] = {}
    rows: dict[tuple[str, str, int, str], dict[str, Published]] = {}
    for comparison in comparisons:
        row, source = comparison.row, _source(comparison.row)
        sources.setdefault(source, []).append(comparison)
        key = (row.agent, row.seeds, row.agent_steps, source)
        rows.setdefault(key, {})[row.distraction] = row
    places = {source: place for place, source in enumerate(sources, 1)}
    body = []
    for (agent, seeds, steps, source), found in rows.items():
        scores = [_score(found.get(name)) for name in names]
        cost = [seeds or "not said", f"{steps:,}", f"published, {places[source]}"]
        body.append(cells([agent, *scores, *cost]))
    head = ["agent", *names, "seeds", "agent steps", "source"]
    notes = tuple(
        f"{places[source]}: {'; '.join([source, *_remarks(found)])}."
        for source, found in sources.items()
    )
    return Table(name, caption, head, body, notes)


def _source(row: Published) -> str:
    """Return where a number is from and how it was made."""
    how = f"protocol {row.protocol}, action repeat {row.action_repeat}"
    return f"{row.source}; {how}; renderer: {row.renderer}"


def _remarks(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield what is said of one source's numbers, and what our runs have instead; where not of all, of which."""
    said: dict[str, list[str]] = {}
    for comparison in comparisons:
        row, ours = comparison.row, list(comparison.differences)
        if comparison.budget:
            ours.append(f"{comparison.budget} agent steps")
        texts = [row.remark, f"our runs have {', '.join(ours)}" if ours else ""]
        for text in filter(None, texts):
            said.setdefault(text, []).append(f"{row.agent} under {row.distraction}")
    for text, where in said.items():
        yield text if len(where) == len(comparisons) else f"{text} ({', '.join(where)})"


def _score(row: Published | None) -> str:
    if row is None:
        return "–"
    return f"{row.mean:.0f}" + ("" if row.std is None else f" ± {row.std:.0f}")
