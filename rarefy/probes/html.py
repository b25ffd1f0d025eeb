"""The pieces of a self-contained page: no script, no outside resource, inline SVG, colours that follow the reader's light or dark setting."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root{--ink:#1c1f24;--paper:#fdfdfc;--soft:#6a7079;--line:#dcdfe3;--a:#2b6cb0;--b:#c05621}
@media (prefers-color-scheme:dark){:root{--ink:#e7e9ec;--paper:#15181c;--soft:#9aa1ab;--line:#343a42;--a:#63a4e8;--b:#e59a5f}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere}h2{font-size:1.15rem;margin-top:2.2rem}p.soft,caption,figcaption{color:var(--soft)}
p.warn{border-left:.25rem solid var(--b);padding-left:.75rem;overflow-wrap:anywhere}
figure{margin:1rem 0}svg{width:100%;height:10rem}svg.low{height:5rem}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.85rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
svg .a{fill:var(--a)}svg .b{fill:var(--b)}.rule{stroke:var(--line)}svg .line{fill:none;stroke:var(--a);stroke-width:2;vector-effect:non-scaling-stroke}
"""
WIDTH, HEIGHT = 900, 160
Series = Sequence[tuple[str, str, str]]  # (key of a row, css class, what it is)


def document(title: str, parts: Sequence[str]) -> str:
    head = f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>{escape(title)}</title><style>{STYLE}</style>"
    return "\n".join([head, f"<h1>{escape(title)}</h1>", *(part for part in parts if part), "</html>"])


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is `soft` for what stands back, `warn` for what must be seen."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(words)}</p>" if words else ""


def chart(title: str, rows: Sequence[Mapping[str, Any]], series: Series, unit: str = "") -> str:
    """A bar a row and series, from zero to the largest."""
    if not rows:
        return ""
    top = max(max(float(row[key]) for row in rows) for key, _, _ in series) or 1.0
    step = WIDTH / len(rows)
    bars = [
        f"<rect class={css} x={i * step + j * step / len(series):.2f} y={HEIGHT * (1 - row[key] / top):.2f} width={max(step / len(series) - 0.4, 0.6):.2f} height={HEIGHT * row[key] / top:.2f}>"
        f"<title>{escape(row['name'])}: {row[key]:.4g}{unit}</title></rect>"
        for i, row in enumerate(rows)
        for j, (key, css, _) in enumerate(series)
    ]
    axis = f"<line class=rule x1=0 x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />"
    legend = "; ".join(f"<span style='color:var(--{css})'>■</span> {escape(label)}" for _, css, label in series)
    summary = "; ".join(f"{label} from {min(row[k] for row in rows):.3g} to {max(row[k] for row in rows):.3g}" for k, _, label in series)
    return _figure(title, axis + "".join(bars), f"{legend}; from 0 to {top:.3g}{unit}", summary)


def curve(title: str, values: Sequence[float], what: str) -> str:
    """One line from left to right, from the least value to the largest."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = high - low or 1.0
    points = " ".join(f"{WIDTH * i / (len(values) - 1):.2f},{4 + (HEIGHT - 8) * (1 - (v - low) / span):.2f}" for i, v in enumerate(values))
    words = f"{what} from {values[0]:.4g} to {values[-1]:.4g} over {len(values)} steps; lowest {low:.4g}, highest {high:.4g}"
    return _figure(title, f"<polyline class=line points='{points}' />", escape(words), words)


def ranges(title: str, rows: Sequence[tuple[str, float, Sequence[float] | None, str]], what: str) -> str:
    """A point with its interval a row, (label, value, interval, css class), on one scale that holds them all."""
    ends = [end for _, value, interval, _ in rows for end in (value, *(interval or ()))]
    low, high = min(ends), max(ends)
    span = high - low or 1.0
    step = HEIGHT / len(rows)

    def x(value: float) -> float:
        return 20 + (WIDTH - 40) * (value - low) / span

    drawn = []
    for i, (label, value, interval, css) in enumerate(rows):
        y = step * (i + 0.5)
        left, right = interval or (value, value)
        name = f"<title>{escape(label)}: {value:.4g}</title>"
        drawn.append(f"<rect class={css} opacity=.35 x={x(left):.2f} y={y - 12:.2f} width={max(x(right) - x(left), 2):.2f} height=24>{name}</rect>")
        drawn.append(f"<rect class={css} x={x(value) - 2:.2f} y={y - 24:.2f} width=4 height=48>{name}</rect>")
    legend = "; ".join(f"<span style='color:var(--{css})'>■</span> {escape(label)} {value:.4g}" for label, value, _, css in rows)
    summary = "; ".join(f"{label} {value:.4g}" for label, value, _, _ in rows)
    return _figure(title, "".join(drawn), f"{legend}; {escape(what)}, axis from {low:.4g} to {high:.4g}, bands are 95% intervals", summary, "low")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f"<th scope=col>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><div class=scroll tabindex=0><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>" if rows else ""


def megabytes(count: float) -> str:
    """
    >>> megabytes(1_260_000), megabytes(12_300)
    ('1.3 MB', '12.3 kB')
    """
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def number(count: int, one: str, many: str) -> str:
    """
    >>> number(1, "matrix", "matrices"), number(1200, "matrix", "matrices")
    ('1 matrix', '1,200 matrices')
    """
    return f"{count:,} {one if count == 1 else many}"


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _figure(title: str, drawing: str, caption: str, summary: str, css: str = "") -> str:
    size = f" class={css}" if css else ""
    return f"<h2>{escape(title)}</h2><figure><svg{size} viewBox='0 0 {WIDTH} {HEIGHT}' preserveAspectRatio=none role=img aria-label='{escape(summary)}'>{drawing}</svg><figcaption>{caption}</figcaption></figure>"
