"""Measured points in a plane: an error upwards, a gain to the right, the budget as a line, and the best of what was measured joined by steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rarefy.probes.figures.frame import Scale, columns, figure, key, over, rows
from rarefy.probes.figures.labels import LETTER, Box, place
from rarefy.probes.html import escape, percent

HEIGHT = 300  # pixels
REACH = 4.0  # budgets that the vertical axis shows, at most
LEAST = 0.005  # loss: a budget of nothing is drawn like one of this


@dataclass(frozen=True)
class Point:
    """One measurement: a short label, its whole name, the gain, the relative loss and its 95% interval."""

    label: str
    name: str
    x: float
    loss: float
    interval: Sequence[float]
    ok: bool
    chosen: bool


@dataclass(frozen=True)
class Axis:
    """What is to the right: its name, its unit, what a value is multiplied by to be read, and whether more of it is better."""

    what: str
    unit: str = ""
    per: float = 1.0
    more: bool = True

    def read(self, value: float) -> str:
        return f"{value * self.per:.4g}{self.unit} {self.what}"


def plane(points: Sequence[Point], budget: float, axis: Axis, joined: bool = True) -> str:
    """Every point with its interval; those beyond the vertical axis at its edge, as triangles."""
    if not points:
        return ""
    x, y = _across(points), _up(points, budget)
    shown = [(x(p.x) / 100, y(_within(p.loss, y)) * HEIGHT / 100, _label(p)) for p in points]
    limit = f"budget {budget:.3g}" if budget < 0.0005 else f"budget {100 * budget:.3g}%"
    line = y(budget) * HEIGHT / 100
    taken = [Box(1.0, -LETTER * len(limit), 0, line - 18, line - 2)]
    whiskers = [Box(at, -2, 2, *sorted(y(_within(end, y)) * HEIGHT / 100 for end in p.interval)) for (at, _, _), p in zip(shown, points, strict=True)]
    order = sorted(range(len(points)), key=lambda i: not points[i].chosen)
    put = dict(zip(order, place([shown[i] for i in order], HEIGHT, taken, [*whiskers, Box(0, 0, 2000, line - 1, line + 1)]), strict=True))
    drawn = [rows(y, "%", 100), columns(x, axis.what, axis.unit, axis.per), over("loss")]
    drawn.append(f"<line class=budget x1=0 x2=100% y1={y(budget):.2f}% y2={y(budget):.2f}% /><text class=end x=100% y={y(budget):.2f}% dy=-5>{limit}</text>")
    drawn.append(_steps(points, axis, x, y) if joined else "")
    drawn += [f"<line class=whisker x1={x(p.x):.2f}% x2={x(p.x):.2f}% y1={y(_within(p.interval[0], y)):.2f}% y2={y(_within(p.interval[1], y)):.2f}% />" for p in points]
    for i, point in sorted(enumerate(points), key=lambda one: one[1].chosen):
        dx, dy = put[i].dx, put[i].dy
        lead = f"<line class=lead x1=0 y1=0 x2={dx + LETTER * len(_label(point)) * (dx < 0):.1f} y2={dy:.1f} />" if put[i].far else ""
        text = f"<text x={dx:.1f} y={dy + 4:.1f}{' class=strong' if point.chosen else ''}>{escape(_label(point))}</text>"
        name = f"<title>{escape(point.name)}: loss {percent(point.loss)}, {escape(axis.read(point.x))}</title>"
        drawn.append(f"<svg x={x(point.x):.2f}% y={y(_within(point.loss, y)):.2f}%>{lead}{_mark(point, y)}{text}{name}</svg>")
    return figure("".join(drawn), _key(points, y, joined), _words(points, limit, axis), HEIGHT)


def best(points: Sequence[Point], axis: Axis) -> list[Point]:
    """The points that no other one is at least as good as in both and better in one, from the least loss.

    >>> points = [Point(str(i), "", x, loss, (loss, loss), True, False) for i, (x, loss) in enumerate([(1, 0.0), (3, 0.2), (2, 0.3), (2, 0.1)])]
    >>> [p.label for p in best(points, Axis("tokens/s"))]
    ['0', '3', '1']
    """
    gain = (lambda p: p.x) if axis.more else (lambda p: -p.x)
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.loss, -gain(p))):
        if not found or gain(point) > gain(found[-1]):
            found.append(point)
    return found


def _across(points: Sequence[Point]) -> Scale:
    high = max(p.x for p in points) or 1.0
    return Scale(0.0, high * 1.06)


def _up(points: Sequence[Point], budget: float) -> Scale:
    """Zero, the budget and the points; a loss far above the budget is beyond it."""
    unit = max(budget, LEAST)
    ends = [end for p in points for end in (p.loss, *p.interval)]
    high = max(1.25 * unit, min(max(ends), REACH * unit))
    low = min(0.0, max(min(ends), -REACH * unit / 2))
    room = 0.05 * (high - low)
    return Scale(low - room, high + room, down=True)


def _within(value: float, scale: Scale) -> float:
    return min(max(value, scale.low), scale.high)


def _label(point: Point) -> str:
    return f"{point.label} chosen" if point.chosen else point.label


def _mark(point: Point, y: Scale) -> str:
    if point.loss > y.high:
        return "<path class=hollow d='M-6 4L0-6L6 4z'/>"
    if point.chosen:
        return "<path class=b d='M0-9L9 0L0 9L-9 0z'/>"
    return f"<circle class={'a' if point.ok else 'hollow'} r=5 />"


def _steps(points: Sequence[Point], axis: Axis, x: Scale, y: Scale) -> str:
    """Between neighbours of the frontier: at the loss of the worse one as far as the better one's gain."""
    found = [p for p in best(points, axis) if p.loss <= y.high]
    drawn = []
    for one, two in pairwise(found):
        drawn.append(f"<line class=edge x1={x(one.x):.2f}% x2={x(one.x):.2f}% y1={y(one.loss):.2f}% y2={y(two.loss):.2f}% />")
        drawn.append(f"<line class=edge x1={x(one.x):.2f}% x2={x(two.x):.2f}% y1={y(two.loss):.2f}% y2={y(two.loss):.2f}% />")
    return "".join(drawn)


def _key(points: Sequence[Point], y: Scale, joined: bool) -> str:
    entries = [("b diamond", "chosen")] if any(p.chosen for p in points) else []
    entries += [("a dot", "within the budget")] if any(p.ok and not p.chosen for p in points) else []
    entries += [("hollow", "over the budget")] if any(not p.ok for p in points) else []
    beyond = sum(p.loss > y.high for p in points)
    words = f"Upright lines: 95% intervals{', cut off at the edge' if any(p.interval[1] > y.high for p in points) else ''}."
    words += " Steps: the best of what was measured." if joined else ""
    words += f" Above the axis, drawn as triangles at its edge: {beyond}." if beyond else ""
    return f"{key(entries)}<br />{words}"


def _words(points: Sequence[Point], limit: str, axis: Axis) -> str:
    each = "; ".join(f"{_label(p)} ({p.name}): {axis.read(p.x)}, loss {percent(p.loss)}" for p in points)
    return f"Loss against {axis.what}, {limit}. {each}"
