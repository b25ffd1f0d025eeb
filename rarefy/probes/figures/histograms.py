"""How many there are of what size, a row of columns a series, all on one scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rarefy.probes.figures.frame import Scale, figure, under
from rarefy.probes.html import escape

ROW = 84  # pixels
BINS = 24


@dataclass(frozen=True)
class Counts:
    """A series: its name, what to say beside it, and how many lie in each of the bins."""

    name: str
    words: str
    counts: Sequence[int]


def histograms(series: Sequence[Counts], low: float, high: float, what: str, caption: str, read: Callable[[float], str] = "{:.3g}".format, ticks: Sequence[float] = ()) -> str:
    """Each series' bins from `low` to `high`, its highest column as tall as the row; `read` writes a value of the axis, `ticks` are values on it."""
    if not series:
        return ""
    scale = Scale(low, high)
    drawn = [_row(i, one, low, high, read) for i, one in enumerate(series)]
    axis = "".join(f"<text class='tick middle' y=100% dy=17 x={scale(v):.2f}%>{read(v)}</text>" for v in ticks or scale.ticks(4)) + under(what)
    summary = "; ".join(f"{one.name}: {one.words}" for one in series)
    return figure("".join(drawn) + axis, escape(caption), f"Distribution of {what}. {summary}", ROW * len(series))


def _row(i: int, one: Counts, low: float, high: float, read: Callable[[float], str]) -> str:
    top, wide = max(one.counts) or 1, (high - low) / len(one.counts)
    tall, foot = ROW - 44, ROW * (i + 1)
    each = "".join(
        f"<rect class=a x={100 * j / len(one.counts):.2f}% y={foot - tall * n / top:.1f} width={92 / len(one.counts):.2f}% height={tall * n / top:.1f}>"
        f"<title>{escape(one.name)}: {n:,} from {read(low + j * wide)} to {read(low + (j + 1) * wide)}</title></rect>"
        for j, n in enumerate(one.counts)
        if n
    )
    words = f"<text class=strong x=0 y={foot - tall - 24}>{escape(one.name)}</text><text x=0 y={foot - tall - 8}>{escape(one.words)}</text>"
    return f"{each}<line class=rule x1=0 x2=100% y1={foot} y2={foot} />{words}"


def binned(values: Sequence[float], low: float, high: float, bins: int = BINS) -> list[int]:
    """How many values lie in each of equally wide bins, the ends included.

    >>> binned([0.0, 0.5, 1.0, 1.0], 0.0, 1.0, 2)
    [1, 3]
    """
    counts = [0] * bins
    for value in values:
        counts[min(max(int(bins * (value - low) / ((high - low) or 1.0)), 0), bins - 1)] += 1
    return counts
