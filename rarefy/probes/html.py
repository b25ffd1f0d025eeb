"""The pieces of a self-contained page: no script, no outside resource, landmarks and headings in order, tables that say what their cells are."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.probes.style import STYLE


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading; one without a body is left out."""

    title: str
    body: str


def document(title: str, lead: Sequence[str], sections: Sequence[Section], foot: str) -> str:
    """A page: what it is about, links to its sections, the sections, and what is claimed."""
    shown = [(f"s{number}", section) for number, section in enumerate((s for s in sections if s.body), 1)]
    links = "".join(f"<li><a href=#{key}>{escape(section.title)}</a></li>" for key, section in shown)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<a class=skip href=#main>Skip to the figures</a><header><h1>{escape(title)}</h1>{''.join(lead)}</header>",
        f"<nav aria-label=Contents><ul>{links}</ul></nav>" if len(shown) > 1 else "",
        "<main id=main tabindex=-1>",
        *(f"<section aria-labelledby={key}><h2 id={key}>{escape(section.title)}</h2>{section.body}</section>" for key, section in shown),
        f"</main><footer>{paragraph(foot, 'soft')}</footer></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is `soft` for what stands back, `warn` for what must be seen."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(words)}</p>" if words else ""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] = (), words: bool = False) -> str:
    """A table whose first column names the row; `total` is its last row, `words` says that cells are prose."""
    if not rows:
        return ""
    prose = [words or any(row[i][:1].isalpha() for row in rows) for i in range(len(head))]
    columns = "".join(f"<th scope=col{' class=t' if left else ''}>{escape(h)}</th>" for h, left in zip(head, prose, strict=True))
    body = "".join(_row(row, prose) for row in rows)
    foot = f"<tfoot>{_row(total, prose)}</tfoot>" if total else ""
    label = f"role=region tabindex=0 aria-label='{escape(caption)}'"
    return f"<div class='scroll{' words' if words else ''}' {label}><table><caption><span>{escape(caption)}</span></caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody>{foot}</table></div>"


def _row(cells: Sequence[str], prose: Sequence[bool]) -> str:
    rest = "".join(f"<td{' class=t' if left else ''}>{escape(cell)}</td>" for cell, left in zip(cells[1:], prose[1:], strict=True))
    return f"<tr><th scope=row>{escape(cells[0])}</th>{rest}</tr>"


def fold(summary: str, body: str, *, unfolded: bool = False) -> str:
    """What is opened by a click or the keyboard."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(summary)}</summary>{body}</details>"


def megabytes(count: float) -> str:
    """
    >>> megabytes(1_260_000), megabytes(12_300)
    ('1.3 MB', '12.3 kB')
    """
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def percent(value: float) -> str:
    """
    >>> percent(0.0351), percent(-0.000001)
    ('3.51%', '0.00%')
    """
    return f"{round(value, 4) + 0.0:.2%}"


def number(count: int, one: str, many: str) -> str:
    """
    >>> number(1, "matrix", "matrices"), number(1200, "matrix", "matrices")
    ('1 matrix', '1,200 matrices')
    """
    return f"{count:,} {one if count == 1 else many}"


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)
