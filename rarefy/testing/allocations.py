"""The contract of an Allocation: the total exact for every budget, floors and caps kept, monotone where declared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

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
def splitting_is_pure(part: Allocation) -> None:
    given, untouched = asked(part, FREE), asked(part, FREE)
    first, again = part.counts(FREE, 60, **given), part.counts(FREE, 60, **given)
    assert first == again, f"{part!r}: the same budget gives {first} and then {again}"
    same = all(torch.equal(given[name][unit], value) for name, made in untouched.items() for unit, value in made.items())
    assert same, f"{part!r} changed what it was given"


@contract(Allocation)
def a_larger_budget_takes_nothing_back(part: Allocation) -> None:
    """Of a part that is not declared `monotone`, rounding by largest remainder may take one entry back from a unit."""
    slack = 0 if getattr(part, "monotone", False) else 1
    for units in (FREE, BOUNDED):
        given = asked(part, units)
        low, high = sum(u.floor for u in units), sum(u.limit for u in units)
        found = [part.counts(units, budget, **given) for budget in sorted({*range(low, high, 5), high})]
        for name in (u.name for u in units):
            counts = [counts[name] for counts in found]
            back = max((a - b for a, b in pairwise(counts)), default=0)
            assert back <= slack, f"{part!r}: a larger budget takes {back} back from {name}, at most {slack} may go"


@contract(Allocation)
def an_impossible_budget_is_refused(part: Allocation) -> None:
    given = asked(part, BOUNDED)
    for budget in (sum(u.floor for u in BOUNDED) - 1, sum(u.limit for u in BOUNDED) + 1):
        try:
            part.counts(BOUNDED, budget, **given)
        except BadInput:
            continue
        raise AssertionError(f"{part!r} accepts a budget of {budget}, outside floors and caps")
