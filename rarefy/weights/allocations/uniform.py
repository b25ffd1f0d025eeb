"""Uniform: every unit keeps the same fraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.core.records import Units
from rarefy.core.roles import Allocation
from rarefy.weights.allocations.shares import by_wish


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same density everywhere, the total exact.

    ``c_i proportional to n_i`` within floors and caps, rounded by largest remainder.

    >>> Uniform().counts([Units("a", (2, 2), ()), Units("b", (2, 4), ())], 6)
    {'a': 2, 'b': 4}
    """

    name = "uniform"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        return by_wish(units, [u.numel for u in units], budget)
