"""Counts that follow wishes, within what every unit takes at least and at most."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.core.exact import split_budget
from rarefy.core.records import Units


def by_wish(units: Sequence[Units], wishes: Sequence[float], budget: int) -> dict[str, int]:
    """{unit: count} in proportion to one wish per unit, adding up to the budget exactly; see `split_budget`.

    Raises:
        BadInput: a budget outside the sum of floors and the sum of caps.

    >>> by_wish([Units("a", (2, 3), ()), Units("b", (10, 10), ())], [1.0, 1.0], 20)
    {'a': 6, 'b': 14}
    """
    split = split_budget(wishes, budget, floors=[u.floor for u in units], caps=[u.limit for u in units])
    return dict(zip((u.name for u in units), split, strict=True))
