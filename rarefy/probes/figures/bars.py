"""Bars from left to right, a group a row of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.probes.figures.frame import Scale, figure, key, over, rows, under
from rarefy.probes.html import escape

NAMED = 300  # bars; more are outlines, which stand before one another and have no name each
HEIGHT = 170  # pixels
Series = Sequence[tuple[str, str, str]]  # (key of a row, css class, what it is)


def bars(found: Sequence[Mapping[str, Any]], series: Series, what: str, along: str, marks: Sequence[tuple[float, str]] = (), unit: str = "") -> str:
    """A bar a row and series, from zero to the largest.

    Args:
        found: rows with a `name` and the series' figures. what: is measured upwards. along: is counted to the right.
        marks: (place in rows, label) under the bars.
    """
    if not found:
        return ""
    scale = Scale(0.0, max(float(row[k]) for row in found for k, _, _ in series) or 1.0)
    named = len(found) * len(series) <= NAMED
    drawn = "".join(_each(found, k, css, j, len(series), scale, unit) for j, (k, css, _) in enumerate(series)) if named else _outlines(found, series, scale)
    inner = f"<svg width=100% height=100% viewBox='0 0 {len(found)} 100' preserveAspectRatio=none>{drawn}</svg>"
    below = "".join(f"<text class='tick middle' y=100% dy=17 x={100 * at / len(found):.2f}%>{escape(label)}</text>" for at, label in marks)
    summary = "; ".join(f"{label} from {min(row[k] for row in found):.3g} to {max(row[k] for row in found):.3g}{unit}" for k, _, label in series)
    frame = rows(Scale(scale.low, scale.high, down=True), unit) + below + under(along) + over(what)
    return figure(frame + inner, key([(css, label) for _, css, label in series]), f"{len(found)} bars of {what}: {summary}", HEIGHT)


def _each(found: Sequence[Mapping[str, Any]], what: str, css: str, j: int, of: int, scale: Scale, unit: str) -> str:
    wide = 0.9 / of
    return "".join(
        f"<rect class={css} x={i + 0.05 + j * wide:.3f} y={100 - scale(row[what]):.2f} width={wide:.3f} height={scale(row[what]):.2f}>"
        f"<title>{escape(row['name'])}: {row[what]:.4g}{unit}</title></rect>"
        for i, row in enumerate(found)
    )


def _outlines(found: Sequence[Mapping[str, Any]], series: Series, scale: Scale) -> str:
    """The series before one another, in each row the smaller before the larger."""
    drawn = []
    for rank in range(len(series)):
        parts: dict[str, list[str]] = {}
        for i, row in enumerate(found):
            _, what, css = sorted((-float(row[what]), what, css) for what, css, _ in series)[rank]
            parts.setdefault(css, []).append(f"M{i} 100V{100 - scale(row[what]):.1f}h1V100z")
        drawn += [f"<path class={css} shape-rendering=crispEdges d='{''.join(path)}'/>" for css, path in parts.items()]
    return "".join(drawn)
