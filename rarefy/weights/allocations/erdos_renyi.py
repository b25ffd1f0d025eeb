"""Erdős–Rényi layer ratios: small layers keep more, because a layer's budget grows with the sum of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.core.records import Units
from rarefy.core.roles import Allocation
from rarefy.weights.allocations.shares import by_wish


@dataclass(frozen=True)
class ER(Allocation):
    """A layer's density is proportional to (outputs + inputs) / (outputs * inputs); kernel dimensions do not count.

    ``p_l = min(1, eps (O_l + I_l) / (O_l I_l))`` with eps such that ``sum_l p_l n_l = budget``

    `counts` takes units of shape [O, ..., I] and the total; returns counts that add up to it exactly. A layer whose
    density would exceed 1 (or its cap) is kept whole and the others are scaled again, until all fit.

    Raises:
        BadInput: a budget outside the sum of floors and the sum of caps.

    Source: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity,
    arXiv 1707.04780, eq. 2; the layer ratio of arXiv 2202.02643, section 3.2. We round by largest remainder.

    >>> ER().counts([Units("a", (2, 8), ()), Units("b", (10, 10), ())], 30)
    {'a': 10, 'b': 20}
    """

    name = "er"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        return by_wish(units, [(u.shape[0] + _inputs(u)) * u.numel / max(u.shape[0] * _inputs(u), 1) for u in units], budget)


@dataclass(frozen=True)
class ERK(Allocation):
    """A layer's density is proportional to the sum of all its dimensions, kernel included, over their product.

    ``p_l = min(1, eps (O_l + kh_l + kw_l + I_l) / n_l)`` with eps such that ``sum_l p_l n_l = budget``

    `counts` takes units of shape [O, kh, kw, I] (or [O, I]) and the total; returns counts that add up to it exactly.
    A layer whose density would exceed 1 (or its cap) is kept whole and the others are scaled again, until all fit.

    Raises:
        BadInput: a budget outside the sum of floors and the sum of caps.

    Source: Evci et al., Rigging the Lottery, arXiv 1911.11134, section 3; the layer ratio of arXiv 2202.02643,
    section 3.2. We round by largest remainder.

    >>> ERK().counts([Units("conv", (4, 3, 3, 2), ()), Units("head", (10, 8), ())], 30)
    {'conv': 12, 'head': 18}
    """

    name = "erk"

    def counts(self, units: Sequence[Units], budget: int) -> dict[str, int]:
        return by_wish(units, [float(sum(u.shape)) if u.numel else 0.0 for u in units], budget)


def _inputs(unit: Units) -> int:
    return unit.shape[-1] if len(unit.shape) > 1 else 1
