"""A report as blocks, written as Markdown with its figures beside it and as one HTML file with everything in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """`level` 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text in which `**` marks what is bold and a backtick what is code."""

    text: str


@dataclass(frozen=True)
class Table:
    """The first `texts` columns are text, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True)
class Figure:
    """An SVG; `name` is its file's, `text` says what it shows."""

    name: str
    text: str
    svg: str


Block = Heading | Paragraph | Table | Figure

_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#13212a;--rule:#c9d3d8}
@media(prefers-color-scheme:dark){:root{--ground:#0d1418;--ink:#e4ebee;--rule:#33444e}}
body{font:16px/1.5 system-ui,sans-serif;background:var(--ground);color:var(--ink)}
main{max-width:60rem;margin:2rem auto;padding:0 .5rem}
h1,h2,h3{line-height:1.2}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th.text,td.text{text-align:left}
.scroll{overflow-x:auto}figure{margin:1rem 0}svg{max-width:100%;height:auto}
"""


def write(blocks: Sequence[Block], folder: Path) -> None:
    """`report.md` with its figures, and `report.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(map(_markdown, blocks)))
    for block in blocks:
        if isinstance(block, Figure):
            (folder / f"{block.name}.svg").write_text(block.svg)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(map(_html, blocks))
    page = f"<head>{head}<style>{_STYLE}</style></head>\n<body>\n<main>\n{body}\n</main>\n</body>"
    (folder / "report.html").write_text(f'<!doctype html>\n<html lang="en">{page}</html>\n')


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}\n"
        case Paragraph():
            return f"{block.text}\n"
        case Table():
            sides = ["---" if i < block.texts else "---:" for i in range(len(block.head))]
            lines = [f"| {' | '.join(block.head)} |", f"| {' | '.join(sides)} |"]
            return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in block.rows)]) + "\n"
        case Figure():
            return f"![{block.text}]({block.name}.svg)\n"


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Paragraph():
            text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(block.text))
            text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
            return f"<p>{text}</p>"
        case Table():
            head = _cells('th scope="col"', block.head, block.texts)
            rows = "".join(f"<tr>{_cells('td', row, block.texts)}</tr>" for row in block.rows)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            return f'<div class="scroll" tabindex="0">{table}</div>'
        case Figure():
            return f"<figure>{block.svg}</figure>"


def _cells(tag: str, cells: Sequence[str], texts: int) -> str:
    opened = [f'<{tag} class="text">' if i < texts else f"<{tag}>" for i in range(len(cells))]
    closed = f"</{tag.split()[0]}>"
    return "".join(f"{begin}{escape(cell)}{closed}" for begin, cell in zip(opened, cells, strict=True))
