"""One HTML file that carries its pictures and videos inside, loads nothing, and fits a phone."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from experiments.reporting.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
    Heading,
    Media,
    Notes,
    Paragraph,
    Table,
)

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
td.wide { overflow-wrap: anywhere; min-width: 5rem; max-width: 18rem; }
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
.media figcaption { overflow-wrap: anywhere; }
caption { text-align: left; caption-side: top; padding: 0 0 .35rem; color: #222; font-weight: 600; }
.under { font-size: .82rem; color: #555; margin: -.2rem 0 1rem; }
figure > img.plot { width: 100%; max-width: 54rem; height: auto; display: block; }
.media { display: flex; flex-wrap: wrap; gap: .9rem; }
.media figure { margin: 0; flex: 1 1 13rem; max-width: 24rem; }
.media img, .media video { width: 100%; height: auto; display: block; background: #eee;
  image-rendering: pixelated; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; } h2, figure, tr { break-inside: avoid; } }
"""


def render_html(title: str, blocks: Iterable[Block], figures: Mapping[str, bytes]) -> str:
    """Return the whole page.

    Args:
        title: for the browser's tab.
        blocks: what is on the page, in order.
        figures: PNG bytes by file name, for every `Figure` among the blocks.
    """
    body = "\n".join(_block(block, figures) for block in blocks)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
{body}
</body></html>
"""


def _block(block: Block, figures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Notes(title, items):
            lines = "".join(f"<li>{escape(text)}</li>" for text in items)
            return f'<div class="note"><b>{escape(title)}</b><ul>{lines}</ul></div>'
        case Facts():
            return _facts(block)
        case Figure(file, alt, caption):
            image = f'<img class="plot" alt="{escape(alt)}" src="{_uri(figures[file], ".png")}">'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case Media(caption, media):
            shown = "".join(_medium(label, path) for label, path in media)
            return f'<p>{escape(caption)}</p><div class="media">{shown}</div>'
        case Table():
            return _table(block)


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))


def _facts(facts: Facts) -> str:
    before, after = ("<code>", "</code>") if facts.code else ("", "")
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{before}{escape(value)}{after}</dd>"
        for name, value in facts.items
    )
    if not facts.summary:
        return f"<dl>{items}</dl>"
    unfolded = " open" if facts.unfolded else ""
    summary = f"<summary>{escape(facts.summary)}</summary>"
    return f"<details{unfolded}>{summary}<dl>{items}</dl></details>"


def _table(table: Table) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    wide = " class=wide" if table.wide else ""
    body = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{wide}>{_cell(cell)}</td>" for cell in rest)
        body.append(f"<tr><th>{_cell(first)}</th>{cells}</tr>")
    notes = "<br>".join(escape(note) for note in table.notes)
    kind = "scroll runs" if table.name == "runs" else "scroll"
    return (
        f'<div class="{kind}"><table><caption>{escape(table.caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        + (f'<p class="under">{notes}</p>' if notes else "")
    )


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.aside:
        text = f'<span class="nowrap"><b>{text}</b> {escape(cell.aside)}</span>'
    if cell.flag:
        text += f' <span class="flag">{escape(cell.flag)}</span>'
    return text + "".join(f'<div class="sub">{escape(line)}</div>' for line in cell.below)


def _medium(label: str, path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"<p>{escape(label)}: {escape(path.name)} cannot be read ({escape(str(error))}).</p>"
    if len(content) > MAX_EMBEDDED:
        size = f"{len(content) / 1e6:.0f} MB"
        return f"<p>{escape(label)}: <code>{escape(str(path))}</code> is {size}, not embedded.</p>"
    uri, alt = _uri(content, path.suffix), escape(label)
    if path.suffix == ".mp4":
        shown = f'<video controls muted loop playsinline src="{uri}" aria-label="{alt}"></video>'
    else:
        shown = f'<img alt="{alt}" src="{uri}">'
    return f"<figure>{shown}<figcaption>{alt}</figcaption></figure>"


def _uri(content: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"
