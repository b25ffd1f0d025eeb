"""A curve over steps, and values with their intervals, a row each."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.probes.figures.frame import Scale, columns, figure, over, rows
from rarefy.probes.html import escape

HEIGHT = 170  # pixels
ROW = 34  # pixels
FINE = 1000  # points that a curve is drawn of, at most


def curve(values: Sequence[float], what: str, along: str) -> str:
    """One line from left to right; of more than `FINE` values, means of neighbours."""
    if len(values) < 2:
        return ""
    every = -(-len(values) // FINE)
    means = [sum(values[i : i + every]) / len(values[i : i + every]) for i in range(0, len(values), every)]
    low, high = min(values), max(values)
    scale = Scale(low, high if high > low else low + 1, down=True)
    points = " ".join(f"{100 * i / (len(means) - 1):.2f},{scale(v):.2f}" for i, v in enumerate(means))
    line = f"<svg width=100% height=100% viewBox='0 0 100 100' preserveAspectRatio=none><polyline class=line points='{points}' /></svg>"
    words = f"{what} from {values[0]:.4g} to {values[-1]:.4g} over {len(values):,} {along}; lowest {low:.4g}, highest {high:.4g}"
    return figure(rows(scale) + line + columns(Scale(1, len(values)), along) + over(what), escape(words), words, HEIGHT)


def ranges(found: Sequence[tuple[str, float, Sequence[float] | None, str]], what: str) -> str:
    """A value with its 95% interval a row, (label, value, interval, css class), on one scale that holds them all."""
    ends = [end for _, value, interval, _ in found for end in (value, *(interval or ()))]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 1.0
    scale = Scale(low - room, high + room)
    drawn = []
    for i, (label, value, interval, css) in enumerate(found):
        middle = ROW * i + 24
        left, right = interval or (value, value)
        drawn.append(f"<text x={scale(value):.2f}% y={middle - 8} class={'end' if scale(value) > 50 else 'start'}>{escape(label)} {value:.4g}</text>")
        drawn.append(f"<rect class={css} opacity=.35 x={scale(left):.2f}% y={middle - 4} width={max(scale(right) - scale(left), 0.2):.2f}% height=8 />")
        drawn.append(f"<svg x={scale(value):.2f}% y={middle}><circle class={css} r=5 /></svg>")
    summary = "; ".join(f"{label} {value:.4g}{f', 95% interval {i[0]:.4g} to {i[1]:.4g}' if i else ''}" for label, value, i, _ in found)
    return figure("".join(drawn) + columns(scale, what), "Bands are 95% intervals." if any(i for _, _, i, _ in found) else "", f"{what}: {summary}", ROW * len(found) + 12)
