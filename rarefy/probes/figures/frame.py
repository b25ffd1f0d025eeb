"""The frame of a figure: its words for who cannot see it, its ticks, its caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.probes.html import escape


def figure(drawing: str, caption: str, summary: str, height: int) -> str:
    """A figure of `height` pixels; `caption` is HTML, `summary` the words that stand for the drawing."""
    return f"<figure><svg class=plot height={height} role=img aria-label='{escape(summary)}'>{drawing}</svg><figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as percent of a figure; `down` where larger ones lie higher up."""

    low: float
    high: float
    down: bool = False

    def __call__(self, value: float) -> float:
        """
        >>> Scale(0, 4)(1), Scale(0, 4, down=True)(1)
        (25.0, 75.0)
        """
        share = 100 * (value - self.low) / (self.high - self.low or 1.0)
        return 100 - share if self.down else share

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside, at most `most` + 1 of them.

        >>> Scale(0, 0.37).ticks()
        [0.0, 0.1, 0.2, 0.3]
        """
        rough = (self.high - self.low) / most
        if not rough > 0 or not math.isfinite(rough):
            return [self.low]
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def rows(scale: Scale, unit: str = "", per: float = 1.0) -> str:
    """Lines across at the ticks of a vertical scale; a tick reads value × `per` and the unit."""
    return "".join(
        f"<line class=rule x1=0 x2=100% y1={y:.2f}% y2={y:.2f}% /><text class='tick end' x=0 dx=-6 dy=4 y={y:.2f}%>{v * per:.4g}{unit}</text>"
        for v in scale.ticks(4)
        for y in (scale(v),)
    )


def columns(scale: Scale, what: str, unit: str = "", per: float = 1.0, most: int = 4) -> str:
    """Ticks under a horizontal scale, and what it is of."""
    marks = "".join(f"<text class='tick middle' y=100% dy=17 x={scale(v):.2f}%>{v * per:.4g}{unit}</text>" for v in scale.ticks(most))
    return marks + under(what)


def under(what: str) -> str:
    """What the horizontal axis is of."""
    return f"<text class='tick end' x=100% y=100% dy=34>{escape(what)}</text>"


def over(what: str) -> str:
    """What the vertical axis is of."""
    return f"<text class=tick x=0 dx=-44 y=0 dy=-12>{escape(what)}</text>"


def key(entries: Sequence[tuple[str, str]]) -> str:
    """A legend: (css classes of the sign, what it stands for)."""
    return " ".join(f"<span><i class='{css}'></i>{escape(words)}</span>" for css, words in entries)
