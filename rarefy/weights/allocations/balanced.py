"""Balanced: every layer keeps the same number of weights, or all it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rarefy.core.records import Units
from rarefy.core.roles import Allocation
from rarefy.weights.allocations.shares import by_wish


@dataclass(frozen=True)
class Balanced(Allocation):
    """The same count for every layer, whatever its size; a layer with fewer weights stays whole.

    ``c_l = min(n_l, X)`` with X such that ``sum_l c_l = budget``

    `counts` takes units and the total; returns counts that add up to it exactly.

    Raises:
        BadInput: a budget outside the sum of floors and the sum of caps.

    Source: Gadhikar, Mukherjee and Burkholz, Why Random Pruning Is All We Need to Start Sparse, arXiv 2210.02412, and the
    authors' code, where X is the budget over the number of layers and what a small layer cannot take is lost; we give it
    to the others, so that the total is exact.

    >>> Balanced().counts([Units("a", (2, 3), ()), Units("b", (10, 10), ()), Units("c", (50, 10), ())], 60)
    {'a': 6, 'b': 27, 'c': 27}
    """

    name = "balanced"
    monotone: ClassVar[bool] = True

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        return by_wish(units, [1.0] * len(units), budget)
