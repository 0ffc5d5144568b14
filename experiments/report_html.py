"""One HTML file that carries its pictures and videos inside, loads nothing, and fits a phone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report_runs import Run
from experiments.report_scores import CLEAN, Group, Score, Summary, differing, settings

MAX_EMBEDDED = 8_000_000
"""Bytes of one picture or video; longer ones are named instead, to keep the page openable."""
MIME = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif;
  color: #222; background: #fff; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #bbb; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p, ul, dl { margin: .4rem 0 .8rem; }
.lead, figcaption, .sub, .foot { color: #555; }
figcaption, .foot, details { font-size: .86rem; }
code { font: .84em/1.4 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font: .86rem/1.4 system-ui, "Segoe UI", Helvetica, sans-serif;
  font-variant-numeric: tabular-nums; min-width: 60%;
  border-top: 2px solid #222; border-bottom: 2px solid #222; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1.3rem .4rem 0; }
td.wide { overflow-wrap: anywhere; min-width: 9rem; max-width: 20rem; }
thead th { border-bottom: 1px solid #222; font-weight: 600; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid #e2e2e2; }
tbody th { font-weight: 600; }
.nowrap, .runs td { white-space: nowrap; }
.runs td, .runs th { padding-right: .95rem; }
.sub { font-size: .78rem; font-weight: 400; white-space: nowrap; }
.flag { display: inline-block; border: 1px solid #222; border-radius: .2rem; padding: 0 .35rem;
  font-size: .74rem; font-weight: 600; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.note { border-left: 3px solid #222; padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
figure { margin: .8rem 0 1.2rem; }
figure > img.plot { width: 100%; max-width: 54rem; height: auto; display: block; }
.media { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .9rem; }
.media figure { margin: 0; }
.media img, .media video { width: 100%; height: auto; display: block; background: #eee;
  image-rendering: pixelated; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; } h2, figure, tr { break-inside: avoid; } }
"""

METHOD = """
<p>The <b>mean</b> is over seeds, of each seed's mean return over its evaluation episodes. The
<b>IQM</b> (interquartile mean) leaves out the lowest and the highest quarter of the seeds;
below four seeds it equals the mean. <b>Intervals</b> are 95&nbsp;% percentile bootstrap
intervals over seeds. With fewer than about five seeds they are too narrow. With one seed (†)
mean, IQM and interval are over its episodes, which says nothing about other seeds. The
<b>gap</b> is the share of the clean return that a distraction takes; it is not given for an
agent that did not learn, which has nothing to lose. <b>Did not learn</b> means: the lower limit
of the clean return is not above the upper limit of the random policy's. The random policy does
not look, so its clean return holds under every distraction. <b>Agent steps</b> are decisions,
<b>environment frames</b> are control steps of the simulator (agent steps × action repeat),
<b>gradient updates</b> are the agent's.</p>
"""


def render_html(
    summary: Summary, figures: Mapping[str, bytes], files: Iterable[str], statistic: str
) -> str:
    """Return the whole page.

    Args:
        summary: what is reported.
        figures: PNG bytes under `<kind>_<task slug>.png`, kind one of curves, generalization and
            diagnostics; a figure that could not be drawn is absent.
        files: names of the files that lie beside the page.
        statistic: what the learning curves show over seeds.
    """
    agents = sorted({group.agent for group in summary.groups})
    title = f"{', '.join(agents)} on {', '.join(summary.env_ids)}"
    sections = [_section(summary, env_id, figures, statistic) for env_id in summary.env_ids]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
<h1>{escape(title)}</h1>
<p class="lead">Sightline report · {_count(len(summary.runs), "run")}, \
{_count(len(agents), "agent")}, {_count(len(summary.env_ids), "task")}</p>
{_notes(summary)}
<h2>What was run</h2>
<div class="runs">{_runs_table(summary)}</div>
{_facts(summary.runs)}
{_commands(summary.runs)}
{"".join(sections)}
<h2>Settings that differ between runs</h2>
{_settings_table(summary.runs)}
<h2>How the numbers are made</h2>
{METHOD}
<p class="foot">Beside this page: {", ".join(f"<code>{escape(name)}</code>" for name in files)}.</p>
</body></html>
"""


def slug(env_id: str) -> str:
    """Return a task id as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in env_id)


def number(value: float, scale: float | None = None) -> str:
    """Format with the digits that suit `scale` (default: the value): 846, 18.3, 0.52."""
    size = abs(value if scale is None else scale)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    text = f"{value:,.{digits}f}"
    return (text if float(text.replace(",", "")) else text.lstrip("-")).replace("-", "−")


# --- top of the page ----------------------------------------------------------------------------


def _notes(summary: Summary) -> str:
    texts = list(summary.cautions)
    texts += [f"{run.label}: {note}." for run in summary.runs for note in run.notes]
    texts += [f"{env}: no random policy was measured." for env in summary.env_ids
              if env not in summary.random]  # fmt: skip
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<div class="note"><b>Please note</b><ul>{items}</ul></div>'


def _runs_table(summary: Summary) -> str:
    rows = []
    for group in summary.groups:
        seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in group.runs)
        cells = [
            _span(group.runs, key) for key in ("agent_steps", "env_frames", "gradient_updates")
        ]
        times = [run.counters["wall_seconds"] for run in group.runs if run.counters]
        cells.append(" to ".join(dict.fromkeys(_clock(t) for t in (min(times), max(times))))
                     if times else "–")  # fmt: skip
        cells += [
            _joined(settings(run).get(f"env.{key}") for run in group.runs)
            for key in ("size", "action_repeat", "quality", "distraction")
        ]
        cells[-1] = "clean" if cells[-1] == "None" else cells[-1]
        rows.append([f"{escape(group.agent)}{_flag(group)}", group.env_id, seeds, *cells])
    head = ["agent", "task", "seeds", "agent steps", "environment frames", "gradient updates"]
    head += ["wall clock (h:mm:ss)", "pixels", "action repeat", "quality", "trained under"]
    return _table(head, rows, raw_first=True)


def _facts(runs: list[Run]) -> str:
    def found(*keys: str) -> str:
        return _joined(
            (_plain(run.system.get(key)) for run in runs for key in keys), "not recorded"
        )

    facts = {
        "Commit": found("commit"),
        "Hardware": found("hardware"),
        "Renderer": found("gl_renderer", "gl_backend"),
        "Versions": found("versions"),
    }
    evaluated = (run.evaluation for run in runs if run.evaluation)
    facts["Evaluated on"] = _joined(f"{e.split} split, {e.backgrounds} videos" for e in evaluated)
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"


def _commands(runs: list[Run]) -> str:
    items = "".join(
        f"<dt>{escape(run.label)}</dt><dd><code>{escape(run.command or 'not recorded')}</code></dd>"
        for run in runs
    )
    opened = " open" if len(runs) <= 3 else ""
    return f"<details{opened}><summary>Commands, one per run</summary><dl>{items}</dl></details>"


# --- one task -----------------------------------------------------------------------------------


def _section(summary: Summary, env_id: str, figures: Mapping[str, bytes], statistic: str) -> str:
    def plot(kind: str, alt: str, caption: str, missing: str) -> str:
        png = figures.get(f"{kind}_{slug(env_id)}.png")
        if png is None:
            return f"<p>{missing}</p>"
        image = f'<img class="plot" alt="{escape(alt)}" src="{_data_uri(png, ".png")}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    curves = plot(
        "curves",
        f"Learning curves on {env_id}",
        f"Line: {statistic} over seeds; band: its 95 % bootstrap interval; n: seeds. "
        "Seeds that logged at different steps are averaged in sixtieths of the run.",
        "No returns were logged, so there are no learning curves.",
    )
    dots = plot(
        "generalization",
        f"Return under each distraction on {env_id}",
        "Mean return with its 95 % interval over n seeds (n = 1: over its episodes); grey: the "
        "random policy.",
        "No run was evaluated.",
    )
    logged = plot(
        "diagnostics",
        f"Losses and times on {env_id}",
        "What the training loop logged, mean over seeds (all of it is in metrics.csv).",
        "Neither losses nor times were logged.",
    )
    return f"""<h2>{escape(env_id)}</h2>
<h3>Learning curves</h3>{curves}
<h3>Generalization</h3>{_scores_table(summary, env_id)}{dots}
<h3>Where the agent looks</h3>{_media(summary, env_id, "saliency")}
<h3>Episodes</h3>{_media(summary, env_id, "videos")}
<h3>Losses and times</h3>{_times_table(summary, env_id)}{logged}
"""


def _scores_table(summary: Summary, env_id: str) -> str:
    names = summary.distractions(env_id)
    if not names:
        return ""
    groups = summary.of(env_id)
    scale = max(abs(score.mean) for group in groups for score in group.scores.values())
    rows = []
    for group in groups:
        head = f"{escape(group.agent)}{_flag(group)}"
        if group.scores:
            counts = {(score.runs, score.episodes // score.runs) for score in group.scores.values()}
            runs, episodes = max(counts)
            head += f'<div class="sub">{_count(runs, "seed")} × {_count(episodes, "episode")}</div>'
        rows.append(
            [head, *(_score_cell(group.scores.get(n), scale, group.learned) for n in names)]
        )
    if env_id in summary.random:
        random = summary.random[env_id]
        head = f'random policy<div class="sub">{_count(random.episodes, "episode")}</div>'
        cell = _score_cell(random, scale, None, dagger=False) if CLEAN in names else ""
        rows.append([head, *(cell if name == CLEAN else "as clean" for name in names)])
    return _table(["agent", *names], rows, raw=True)


def _score_cell(
    score: Score | None, scale: float, learned: bool | None, *, dagger: bool = True
) -> str:
    if score is None:
        return "–"
    mark = "†" if dagger and score.runs == 1 else ""
    limits = f"[{number(score.low, scale)}, {number(score.high, scale)}]{mark}"
    parts = [f"IQM {number(score.iqm, scale)}"]
    # A policy that learned nothing loses nothing: a gap of zero would read as robustness.
    if score.gap is not None and learned is not False:
        parts.append(f"gap {number(score.gap, 100)} %")
        if score.gap_interval is not None:
            low, high = (number(limit, 100) for limit in score.gap_interval)
            parts[-1] += f" [{low}, {high}]"
    if score.success is not None:
        parts.append(f"success {100 * score.success:.0f} %")
    below = "".join(f'<div class="sub">{part}</div>' for part in parts)
    return f'<span class="nowrap"><b>{number(score.mean, scale)}</b> {limits}</span>{below}'


def _times_table(summary: Summary, env_id: str) -> str:
    groups = summary.of(env_id)
    tags = sorted({t for g in groups for run in g.runs for t in run.series if t[:5] == "time/"})
    if not tags:
        return ""
    rows = []
    for group in groups:
        cells = []
        for tag in tags:
            medians = [np.median(run.series[tag][1]) for run in group.runs if tag in run.series]
            cells.append(number(float(np.mean(medians))) if medians else "–")
        rows.append([group.agent, *cells])
    return _table(["agent (median over a run, mean over seeds)", *(t[5:] for t in tags)], rows)


def _media(summary: Summary, env_id: str, kind: str) -> str:
    """Show each agent's pictures or videos of its first seed that has some."""
    blocks = []
    for group in summary.of(env_id):
        for run in group.runs:
            found: dict[str, Path] = getattr(run.evaluation, kind, {})
            if found:
                order = [name for name in summary.distractions(env_id) if name in found]
                items = "".join(_medium(name, found[name]) for name in order)
                steps = run.evaluation.agent_steps if run.evaluation else 0
                caption = f"{run.label}, after {steps:,} agent steps"
                blocks.append(f'<p>{escape(caption)}</p><div class="media">{items}</div>')
                break
    what = "saliency overlays" if kind == "saliency" else "videos"
    return "".join(blocks) or f"<p>The evaluations hold no {what}.</p>"


def _medium(name: str, path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"<p>{escape(name)}: {escape(path.name)} cannot be read ({escape(str(error))}).</p>"
    if len(content) > MAX_EMBEDDED:
        size = f"{len(content) / 1e6:.0f} MB"
        return f"<p>{escape(name)}: <code>{escape(str(path))}</code> is {size}, not embedded.</p>"
    uri, alt = _data_uri(content, path.suffix), escape(name)
    if path.suffix == ".mp4":
        shown = f'<video controls muted loop playsinline src="{uri}" aria-label="{alt}"></video>'
    else:
        shown = f'<img alt="{alt}" src="{uri}">'
    return f"<figure>{shown}<figcaption>{alt}</figcaption></figure>"


# --- bottom of the page and small parts ---------------------------------------------------------


def _settings_table(runs: list[Run]) -> str:
    names = differing(runs)
    if not names:
        return "<p>None besides the seed.</p>" if len(runs) > 1 else "<p>There is one run.</p>"
    seeds: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        values = (settings(run).get(name, "–") for name in names)
        seeds.setdefault((run.agent, run.env_id, *values), []).append(str(run.seed))
    rows = [[agent, env, ", ".join(s), *values] for (agent, env, *values), s in seeds.items()]
    return _table(["agent", "task", "seeds", *names], rows, wide=True)


def _table(
    head: list[str],
    rows: list[list[str]],
    *,
    raw: bool = False,
    raw_first: bool = False,
    wide: bool = False,
) -> str:
    """Return a table; cells are text unless `raw`, in the first column also with `raw_first`."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = []
    for first, *rest in rows:
        cells = "".join(
            f"<td{' class=wide' if wide else ''}>{cell if raw else escape(cell)}</td>"
            for cell in rest
        )
        body.append(f"<tr><th>{first if raw or raw_first else escape(first)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _flag(group: Group) -> str:
    return ' <span class="flag">did not learn</span>' if group.learned is False else ""


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _span(runs: list[Run], counter: str) -> str:
    values = [run.counters[counter] for run in runs if run.counters]
    texts = dict.fromkeys(f"{v:,.0f}" for v in (min(values), max(values))) if values else ["–"]
    return " to ".join(texts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _joined(values: Iterable[Any], missing: str = "–") -> str:
    texts = dict.fromkeys(str(value) for value in values if value not in (None, "", {}))
    return "; ".join(texts) or missing


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return value


def _data_uri(content: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"
