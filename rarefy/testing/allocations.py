"""The contract of an Allocation: the total exact for every budget, floors and caps kept, monotone where declared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rarefy.core.errors import BadInput
from rarefy.core.records import Units
from rarefy.core.roles import Allocation, asks
from rarefy.testing import figures
from rarefy.testing.contract import contract

FREE = (Units("layers.0.a", (7, 13), ()), Units("layers.0.b", (4, 3, 3, 2), ()), Units("layers.1.a", (1, 1), ()), Units("layers.1.b", (10, 6), ()))
BOUNDED = tuple(Units(u.name, u.shape, (), floor=u.numel // 5, cap=u.numel - u.numel // 4) for u in FREE)


def asked(part: Allocation, units: Sequence[Units]) -> dict[str, Any]:
    """What an allocation asks for, made up."""
    made = {u.name: figures.weight(*u.shape, seed=i).abs() for i, u in enumerate(units)}
    return {name: {"scores": made, "weights": made}[name] for name in asks(part.counts)}


def _budgets(units: Sequence[Units]) -> tuple[int, ...]:
    low, high = sum(u.floor for u in units), sum(u.limit for u in units)
    return tuple(sorted({*range(low, high, 13), low, high}))


@contract(Allocation)
def totals_are_exact_within_floors_and_caps(part: Allocation) -> None:
    for units in (FREE, BOUNDED):
        given = asked(part, units)
        for budget in _budgets(units):
            counts = part.counts(units, budget, **given)
            assert sum(counts.values()) == budget, f"{part!r}: {counts} does not add up to {budget}"
            assert all(u.floor <= counts[u.name] <= u.limit for u in units), f"{part!r}: {counts} leaves floors or caps at {budget}"


@contract(Allocation)
def a_larger_budget_takes_nothing_back(part: Allocation) -> None:
    if not getattr(part, "monotone", False):
        return
    for units in (FREE, BOUNDED):
        given = asked(part, units)
        found = [part.counts(units, budget, **given) for budget in _budgets(units)]
        assert all(a[u.name] <= b[u.name] for a, b in pairwise(found) for u in units), f"{part!r} is declared monotone and is not"


@contract(Allocation)
def an_impossible_budget_is_refused(part: Allocation) -> None:
    given = asked(part, BOUNDED)
    for budget in (sum(u.floor for u in BOUNDED) - 1, sum(u.limit for u in BOUNDED) + 1):
        try:
            part.counts(BOUNDED, budget, **given)
        except BadInput:
            continue
        raise AssertionError(f"{part!r} accepts a budget of {budget}, outside floors and caps")
