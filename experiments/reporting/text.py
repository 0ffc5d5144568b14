"""The report as Markdown, and its tables as LaTeX for a paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "τ": r"$\tau$",
    "†": r"$^\dagger$",
    "[": "{[}",
    "–": "--",
}
LATEX_PATTERN = re.compile("|".join(map(re.escape, LATEX_SPECIAL)))


def render_markdown(blocks: Iterable[Block]) -> str:
    """Return the report as Markdown; pictures are linked, videos are in the HTML page only."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return "**".join(_plain(part) for part in text.split("**"))
        case Notes(title, items):
            return "\n".join([f"**{_plain(title)}**", "", *(f"- {_plain(item)}" for item in items)])
        case Facts(items, summary, _, code):
            lines = [f"**{_plain(summary)}**", ""] if summary else []
            quote = _code if code else _plain
            return "\n".join([*lines, *(f"- {_plain(name)}: {quote(v)}" for name, v in items)])
        case Figure(file, alt, caption):
            return f"![{_plain(alt)}]({file})\n\n*{_plain(caption)}*"
        case Media(caption, items):
            labels = ", ".join(_plain(label) for label, _ in items)
            return f"*{_plain(caption)}: {labels}. In report.html.*"
        case Table():
            return _markdown_table(block)


def _plain(text: str) -> str:
    """Escape what Markdown or the HTML inside it would take for markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text).replace("\n", " ")


def _code(text: str) -> str:
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _markdown_table(table: Table) -> str:
    lines = [f"**{_plain(table.caption)}**", ""]
    lines.append(f"| {' | '.join(map(_plain, table.head))} |")
    lines.append("| --- " * len(table.head) + "|")
    lines += [f"| {' | '.join(map(_markdown_cell, row))} |" for row in table.rows]
    return "\n".join([*lines, "", *(f"{_plain(note)}  " for note in table.notes)]).rstrip()


def _markdown_cell(cell: Cell) -> str:
    text = _plain(cell.text)
    if cell.aside:
        text = f"**{text}** {_plain(cell.aside)}"
    if cell.flag:
        text += f" **({_plain(cell.flag)})**"
    return "<br>".join([text, *map(_plain, cell.below)])


def render_latex(title: str, tables: Sequence[Table]) -> str:
    """Return the tables as `table` environments; they need `booktabs` and `graphicx` only.

    Where a table would be wider than the text, it is shrunk to it.
    """
    head = [
        f"% {title}".replace("\n", " "),
        r"% \usepackage{booktabs,graphicx}; \input this file; labels are tab:<name>",
    ]
    return "\n\n".join(["\n".join(head), *map(_latex_table, tables)]) + "\n"


def _latex_table(table: Table) -> str:
    rows = [" & ".join(map(_latex_cell, row)) + r" \\" for row in table.rows]
    notes = " ".join(map(latex, table.notes))
    body = [
        rf"\begin{{tabular}}{{{'l' * len(table.head)}}}",
        r"\toprule",
        " & ".join(map(latex, table.head)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\sbox0{%",
        *(f"{line}%" for line in body),
        "}",
        r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
        *([rf"\par\smallskip{{\footnotesize {notes}}}"] if notes else []),
        r"\end{table}",
    ])  # fmt: skip


def _latex_cell(cell: Cell) -> str:
    text = latex(cell.text)
    if cell.aside:
        text = rf"{text} {{\scriptsize {latex(cell.aside)}}}"
    if cell.flag:
        text += rf" (\emph{{{latex(cell.flag)}}})"
    if not cell.below:
        return text
    below = r" \\ ".join(rf"\scriptsize {latex(line)}" for line in cell.below)
    return rf"\shortstack[l]{{{text} \\ {below}}}"


def latex(text: str) -> str:
    """Escape a text for LaTeX, also where a table's row would end in `[`."""
    return LATEX_PATTERN.sub(lambda match: LATEX_SPECIAL[match[0]], text.replace("\n", " "))
