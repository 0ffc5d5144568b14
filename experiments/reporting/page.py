"""The report as a sequence of blocks: what a reader meets, in which order, on any medium."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reporting.aggregates import NORMALIZATION, Aggregates
from experiments.reporting.blocks import (
    Block,
    Facts,
    Figure,
    Heading,
    Media,
    Notes,
    Paragraph,
    Table,
    count,
    slug,
)
from experiments.reporting.fine_tuning import fine_tuning_table
from experiments.reporting.published import Comparison, published_tables
from experiments.reporting.runs import Evaluation, Run
from experiments.reporting.scores import Summary, efficiency_tag
from experiments.reporting.settings import cautions
from experiments.reporting.tables import (
    joined,
    runs_table,
    scores_table,
    settings_table,
    times_table,
)
from experiments.reporting.tables_across import (
    aggregate_tables,
    gap_table,
    improvement_tables,
    looks_table,
)

METHOD = (
    "The **mean** is over seeds, of each seed's mean return over its evaluation episodes. The "
    "**IQM** (interquartile mean) leaves out the lowest and the highest quarter of the runs; below "
    "four runs it equals the mean. **Intervals** are 95 % percentile bootstrap intervals over "
    "seeds. With fewer than about five seeds they are too narrow. With one seed (†) mean, IQM and "
    "interval are over its episodes, which says nothing about other seeds. The **gap** is the share "
    "of the clean return that a distraction takes; it is not given for an agent that did not learn, "
    "which has nothing to lose. **Did not learn** means: the lower limit of the clean return is not "
    "above the upper limit of the random policy's. The random policy does not look, so its clean "
    "return holds under every distraction. **Agent steps** are decisions, **environment frames** are "
    "control steps of the simulator (agent steps × action repeat), **gradient updates** are the "
    "agent's; **wall clock** includes evaluation while training.",
    f"{NORMALIZATION} Over several tasks, the **optimality gap** is by how much scores miss 1 on "
    "average, a **performance profile** the share of runs above each score, and **P(improvement)** "
    "the probability that a run of one agent beats a run of another on a task, ties counting half; "
    "runs are resampled inside each task, and a task with more runs weighs more (Agarwal et al. "
    "2021, arXiv:2108.13264).",
)


OPEN_MARKERS = (
    " Open markers: published, same protocol and rendering, at their own budget; bars are standard "
    "deviations."
)


@dataclass(frozen=True)
class Contents:
    """Everything that a page is made of."""

    summary: Summary
    aggregates: Aggregates | None
    comparisons: Mapping[str, Sequence[Comparison]]
    """Published numbers by task."""
    figures: Collection[str]
    """Files that were drawn; a figure that could not be drawn is absent."""
    files: tuple[str, ...]
    """Names of what lies beside the page."""
    statistic: str
    """What the learning curves show over seeds."""


def title_of(summary: Summary) -> str:
    """Return what the report is about."""
    agents = sorted({group.agent for group in summary.groups})
    return f"{', '.join(agents)} on {', '.join(summary.env_ids)}"


def blocks(contents: Contents) -> list[Block]:
    """Return the whole report."""
    summary = contents.summary
    agents = {group.agent for group in summary.groups}
    counts = (
        (len(summary.runs), "run"),
        (len(agents), "agent"),
        (len(summary.env_ids), "task"),
    )
    found: list[Block] = [Heading(title_of(summary), 1)]
    found.append(
        Paragraph(f"Sightline report · {', '.join(count(number, noun) for number, noun in counts)}")
    )
    warnings = tuple(cautions(summary))
    if warnings:
        found.append(Notes("Please note", warnings))
    found += [Heading("What was run", 2), runs_table(summary), _facts(summary.runs)]
    found.append(_commands(summary.runs))
    found += _across(contents)
    for env_id in summary.env_ids:
        found += _task(contents, env_id)
    found.append(Heading("Settings that differ between runs", 2))
    only = "None besides the seed." if len(summary.runs) > 1 else "There is one run."
    found.append(settings_table(summary) or Paragraph(only))
    found.append(Heading("How the numbers are made", 2))
    found += [Paragraph(text) for text in METHOD]
    found.append(Paragraph(f"Beside this page: {', '.join(contents.files)}."))
    return found


def _facts(runs: list[Run]) -> Facts:
    def found(*keys: str) -> str:
        values = (_plain(run.system.get(key)) for run in runs for key in keys)
        return joined(values, "not recorded")

    evaluations = [run.evaluation for run in runs if run.evaluation]
    where = joined(f"{e.split} split, {e.backgrounds} videos" for e in evaluations)
    return Facts((
        ("Commit", found("commit")),
        ("Hardware", found("hardware")),
        ("Renderer", found("gl_renderer", "gl_backend")),
        ("Versions", found("versions")),
        ("Evaluated on", where),
        ("Evaluated by", joined(map(_maker, evaluations), "not recorded")),
    ))  # fmt: skip


def _maker(evaluation: Evaluation) -> str:
    """Return by whom, and on what, an evaluation was drawn; empty where that was not recorded yet."""
    system = evaluation.system
    texts = [
        f"commit {system['commit']}" if system.get("commit") else "",
        _plain(system.get("gl_renderer") or system.get("gl_backend")),
        _plain(system.get("hardware")),
    ]
    return ", ".join(filter(None, texts))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return value


def _commands(runs: list[Run]) -> Facts:
    items = tuple((run.label, run.command or "not recorded") for run in runs)
    return Facts(items, "Commands, one per run", unfolded=len(runs) <= 3, code=True)


def _across(contents: Contents) -> Iterable[Block]:
    aggregates = contents.aggregates
    if aggregates is None:
        return
    yield Heading("All tasks together", 2)
    yield Paragraph(NORMALIZATION)
    yield from aggregate_tables(aggregates)
    yield from _figure(
        contents,
        "aggregates.png",
        "Aggregates of normalized scores",
        "Aggregates of normalized scores over runs, with 95 % intervals; n: runs of all tasks.",
    )
    yield from _figure(
        contents,
        "profiles.png",
        "Performance profiles",
        "Performance profiles: the share of runs whose normalized score is above each value, with "
        "95 % bands. Higher is better; a line that lies above another everywhere is better at "
        "every level.",
    )
    yield from improvement_tables(aggregates)
    gaps = gap_table(aggregates)
    if gaps:
        yield gaps


def _figure(
    contents: Contents, file: str, alt: str, caption: str, missing: str = ""
) -> Iterable[Block]:
    if file in contents.figures:
        yield Figure(file, alt, caption)
    elif missing:
        yield Paragraph(missing)


def _task(contents: Contents, env_id: str) -> Iterable[Block]:
    summary, name = contents.summary, slug(env_id)
    published = any(not c.differences for c in contents.comparisons[env_id])
    comparable = any(c.comparable for c in contents.comparisons[env_id])
    yield Heading(env_id, 2)
    yield Heading("Learning curves", 3)
    yield from _figure(
        contents,
        f"curves_{name}.png",
        f"Learning curves on {env_id}",
        f"Line: {contents.statistic} over seeds; band: its 95 % bootstrap interval; n: seeds. "
        "Seeds that logged at different steps are averaged in sixtieths of the run."
        + OPEN_MARKERS
        * published,
        "No returns were logged, so there are no learning curves.",
    )
    tag = efficiency_tag(run for group in summary.of(env_id) for run in group.runs)
    what = "clean evaluation" if (tag or "").startswith("eval/") else "training episodes"
    yield from _figure(
        contents,
        f"efficiency_{name}.png",
        f"Sample efficiency on {env_id}",
        f"The same learning ({what}) against each cost: decisions, control steps of the simulator, "
        "updates, and minutes on the hardware named above.",
    )
    yield Heading("Generalization", 3)
    scores = scores_table(summary, env_id)
    if scores:
        yield scores
    yield from _figure(
        contents,
        f"generalization_{name}.png",
        f"Return under each distraction on {env_id}",
        "Mean return with its 95 % interval over n seeds (n = 1: over its episodes); grey: the "
        "random policy." + OPEN_MARKERS * comparable,
        "No run was evaluated.",
    )
    tuned = fine_tuning_table(summary, env_id)
    if tuned:
        yield Heading("Fine-tuning", 3)
        yield tuned
    yield from published_tables(summary, env_id, contents.comparisons[env_id])
    yield Heading("Where the agent looks", 3)
    looks = looks_table(summary, env_id)
    if looks:
        yield looks
    yield from _side_by_side(summary, env_id)
    yield Heading("Episodes", 3)
    yield from _videos(summary, env_id)
    yield Heading("Losses and times", 3)
    times: Table | None = times_table(summary, env_id)
    if times:
        yield times
    yield from _figure(
        contents,
        f"diagnostics_{name}.png",
        f"Losses and times on {env_id}",
        "What the training loop logged, mean over seeds (all of it is in metrics.csv).",
        "Neither losses nor times were logged.",
    )


def _with_media(summary: Summary, env_id: str, kind: str) -> list[tuple[str, Run, dict[str, Path]]]:
    """Return each agent's first run that has pictures or videos: label, run, media."""
    found = []
    for group in summary.of(env_id):
        for run in group.runs:
            media = getattr(run.evaluation, kind, None)
            if media:
                state = " (did not learn)" if group.learned is False else ""
                found.append((f"{group.agent}{state}", run, media))
                break
    return found


def _side_by_side(summary: Summary, env_id: str) -> Iterable[Block]:
    """Show all agents' saliency under one distraction beside each other."""
    found = _with_media(summary, env_id, "saliency")
    if not found:
        yield Paragraph("The evaluations hold no saliency overlays.")
    for name in summary.distractions(env_id):
        items = tuple(
            (f"{label}, seed {run.seed}", media[name])
            for label, run, media in found
            if name in media
        )
        if items:
            yield Media(f"Saliency overlays on {env_id}, {name}", items)


def _videos(summary: Summary, env_id: str) -> Iterable[Block]:
    found = _with_media(summary, env_id, "videos")
    if not found:
        yield Paragraph("The evaluations hold no videos.")
    for label, run, media in found:
        steps = run.evaluation.agent_steps if run.evaluation else 0
        names = [name for name in summary.distractions(env_id) if name in media]
        caption = f"{label}, {env_id}, seed {run.seed}, after {steps:,} agent steps"
        yield Media(caption, tuple((name, media[name]) for name in names))
