"""The settings behind runs, where they differ, and what a reader must be warned of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.reporting.runs import Run
from experiments.reporting.scores import Group, Summary


def settings(run: Run) -> dict[str, str]:
    """Return everything that was set or found for a run, as dotted name -> text."""
    flat: dict[str, str] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = str(node)

    walk("", {k: v for k, v in run.config.items() if k not in ("schema", "agent", "spaces")})
    walk("system", run.system)
    flat.pop("env.id", None)
    return flat


def differing(runs: list[Run]) -> list[str]:
    """Return the settings, besides seeds, in which runs differ.

    A setting that only some of the agents have (SGQN's quantile) is compared among those.
    """
    flat = [settings(run) for run in runs]
    values: dict[str, set[str]] = {}
    for one in flat:
        for name, value in one.items():
            values.setdefault(name, set()).add(value)
    return sorted(
        name for name, found in values.items() if len(found) > 1 and not name.endswith("seed")
    )


def cautions(summary: Summary) -> list[str]:
    """Return every reason for which a number of the report may mislead, and what is missing."""
    texts = [text for group in summary.groups for text in _group_cautions(group)]
    for env_id in summary.env_ids:
        texts += _task_cautions(env_id, [run for run in summary.runs if run.env_id == env_id])
    texts += [f"{run.label}: {note}." for run in summary.runs for note in run.notes]
    unmeasured = [env_id for env_id in summary.env_ids if env_id not in summary.random]
    return texts + [f"{env_id}: no random policy was measured." for env_id in unmeasured]


def _group_cautions(group: Group) -> Iterable[str]:
    name = f"{group.agent} on {group.env_id}"
    # Neither the machine nor the number of workers changes what is learned.
    names = [n for n in differing(group.runs) if not n.startswith(("system.", "vector."))]
    if names:
        yield f"{name}: its runs differ in {', '.join(names)}, so their mean mixes settings."
    seeds = [run.seed for run in group.runs]
    if len(set(seeds)) < len(seeds):
        yield f"{name}: a seed occurs twice ({seeds}), so its interval is too narrow."
    evaluations = [run.evaluation for run in group.runs if run.evaluation]
    steps = sorted({evaluation.agent_steps for evaluation in evaluations})
    if len(steps) > 1:
        yield f"{name}: its runs were evaluated after different numbers of agent steps ({steps})."
    if any(evaluation.split != "test" for evaluation in evaluations):
        yield f"{name}: evaluated on another split than test, so its scores may be optimistic."
    for run in group.runs:
        planned, done = run.config.get("train", {}).get("steps"), run.counters.get("agent_steps")
        if isinstance(planned, int) and done is not None and done < planned:
            yield f"{run.label}: stopped at {done:,.0f} of {planned:,} agent steps."
        if len(run.renderers) > 1:
            trained, evaluated = run.renderers
            yield (
                f"{run.label}: trained on pictures of {trained}, evaluated on those of {evaluated}; "
                "no two renderers draw the same pixels."
            )


def _task_cautions(env_id: str, runs: list[Run]) -> Iterable[str]:
    for key, what in (("env.quality", "render qualities"), ("system.gl_renderer", "renderers")):
        found = sorted({settings(run).get(key, "unknown") for run in runs})
        if len(found) > 1:
            yield f"{env_id}: runs saw different {what} ({'; '.join(found)}); do not compare them."
    evaluations = [run.evaluation for run in runs if run.evaluation]
    drawn = sorted(
        {str(e.system["gl_renderer"]) for e in evaluations if e.system.get("gl_renderer")}
    )
    if len(drawn) > 1:
        yield f"{env_id}: runs were evaluated with different renderers ({'; '.join(drawn)}); do not compare them."
    scored = sorted(
        {e.foreground for e in evaluations if any(r.saliency for r in e.results.values())}
    )
    if len(scored) > 1:
        yield f"{env_id}: saliency was scored on {' and on '.join(scored)}; do not compare it."
    protocols = sorted({f"{e.split} split, {e.backgrounds} videos" for e in evaluations})
    if len(protocols) > 1:
        yield f"{env_id}: evaluated differently ({'; '.join(protocols)}); do not compare them."
