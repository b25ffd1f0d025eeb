"""Where the labels of points go, so that none covers another, a point or a line of text at any width of the figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NARROW, WIDE = 250, 980  # pixels between which a figure's width lies
TALL = 14  # pixels of a label
GAP = 4  # pixels between labels side by side
LETTER = 8.0  # pixels, of the widest of the fonts met


@dataclass(frozen=True)
class Box:
    """A rectangle that hangs from a place: `at` is the share of the width, the rest pixels."""

    at: float
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap at some width.

        The gap between them is linear in the width, so that they stay apart where they are on the same sides at both ends.

        >>> Box(0.5, 0, 10, 0, 10).meets(Box(0.6, 0, 10, 5, 15)), Box(0.5, 0, 40, 0, 10).meets(Box(0.6, 0, 10, 5, 15))
        (False, True)
        """
        if self.bottom <= other.top or other.bottom <= self.top:
            return False
        before, after = (self._sides(other, width) for width in (NARROW, WIDE))
        return before == 0 or before != after

    def _sides(self, other: Box, width: int) -> int:
        apart = (other.at - self.at) * width
        return 1 if apart + other.left >= self.right else -1 if apart + other.right <= self.left else 0

    def inside(self, height: float) -> bool:
        """Whether it stays in a figure of this height, at its narrowest."""
        return self.top >= -8 and self.bottom <= height + 4 and self.at * NARROW + self.left >= -2 and self.at * NARROW + self.right <= NARROW + 8


@dataclass(frozen=True)
class Label:
    """A text whose left end is `dx`, and whose middle `dy` pixels from its point; `far` where a line should lead to it."""

    dx: float
    dy: float
    far: bool


def place(points: Sequence[tuple[float, float, str]], height: float, taken: Sequence[Box] = (), lines: Sequence[Box] = ()) -> list[Label]:
    """A place for the label of each point, the first one served first.

    Args:
        points: (share of the width, pixels from the top, text). taken: boxes that no label may meet. lines: boxes that it should not.
    """
    spots = [Box(at, -7, 7, y - 7, y + 7) for at, y, _ in points]
    found: list[Label] = []
    boxes: list[Box] = []
    for at, y, text in points:
        tried = [(label, Box(at, label.dx, label.dx + wide, y + label.dy - TALL / 2, y + label.dy + TALL / 2)) for wide in (LETTER * len(text),) for label in _around(wide)]
        tried = [(label, box) for label, box in tried if box.inside(height)] or tried
        label, box = min(tried, key=lambda one: (sum(one[1].meets(b) for b in (*spots, *taken, *boxes)), sum(one[1].meets(b) for b in lines)))
        found.append(label)
        boxes.append(Box(at, box.left - GAP, box.right + GAP, box.top, box.bottom))
    return found


def _around(wide: float) -> Iterator[Label]:
    """Near places before far ones."""
    for off in (10, 18, 28, 40, 54, 70):
        for right, down in ((1, 0), (0, -1), (-1, 0), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            far = off * (0.75 if right and down else 1)
            dx = (far if right > 0 else -far - wide if right < 0 else -wide / 2) * 1.0
            yield Label(dx, far * down * (1.1 if not right else 1.0), off > 18)
