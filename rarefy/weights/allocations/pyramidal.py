"""Pyramidal: from layer to layer the density falls by one factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.core.records import Units
from rarefy.core.roles import Allocation
from rarefy.weights.allocations.shares import by_wish


def falling_factor(sizes: Sequence[int], budget: float) -> float:
    """The r in [0, 1] with ``sum_l r^l n_l = budget``, l from 1, by bisection.

    >>> round(falling_factor([8, 8], 6), 9)
    0.5
    """
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(n * middle ** (depth + 1) for depth, n in enumerate(sizes)) < budget:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Pyramidal(Allocation):
    """Layer l, in the order of the model, has density r^l.

    ``p_l = r^l, l = 1, 2, ...``, r the root in (0, 1) of ``sum_l r^l n_l = budget``

    `counts` takes units in order and the total; returns counts that add up to it exactly.

    Raises:
        BadInput: a budget outside the sum of floors and the sum of caps.

    Source: Gadhikar, Mukherjee and Burkholz, Why Random Pruning Is All We Need to Start Sparse, arXiv 2210.02412, and the
    authors' code. We round by largest remainder.

    >>> Pyramidal().counts([Units("a", (2, 4), ()), Units("b", (4, 2), ())], 6)
    {'a': 4, 'b': 2}
    """

    name = "pyramidal"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        r = falling_factor([u.numel for u in units], budget)
        wishes = [u.numel * r ** (depth + 1) for depth, u in enumerate(units)]
        return by_wish(units, wishes, budget)
