"""The contract of a Schedule: a pure function of progress, exact at its end points, moving one way between them."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from rarefy.core.records import Progress
from rarefy.core.roles import Schedule
from rarefy.testing.contract import contract

LAST = 10**7  # a step beyond every horizon
STEPS = (*range(300), *range(300, 5000, 37), LAST)
FIRST_FIELDS, LAST_FIELDS = ("initial", "start"), ("final",)


def _at(part: Schedule, step: int) -> Any:
    return part(Progress(step=step, total=LAST, phase_step=step))


@contract(Schedule)
def progress_alone_decides(part: Schedule) -> None:
    resumed = copy.deepcopy(part)
    forward = [_at(part, step) for step in STEPS]
    assert forward == [_at(part, step) for step in STEPS[::-1]][::-1], f"{part!r} depends on the order in which steps are asked for"
    assert forward == [_at(resumed, step) for step in STEPS], f"{part!r}: a copy of it gives other values"


@contract(Schedule)
def end_points_are_exact(part: Schedule) -> None:
    """A field named initial or start is the first value, one named final the last; at the end the value stays."""
    first, last = _at(part, 0), _at(part, LAST)
    assert last == _at(part, LAST - 1) == _at(part, LAST + 1), f"{part!r} does not come to rest"
    for names, value, where in ((FIRST_FIELDS, first, "begins"), (LAST_FIELDS, last, "ends")):
        for name in names:
            wanted = getattr(part, name, value)
            assert wanted == value, f"{part!r} {where} at {value}, not at its {name} {wanted}"


@contract(Schedule)
def values_move_one_way(part: Schedule) -> None:
    values = [_at(part, step) for step in STEPS]
    if not all(isinstance(value, (int, float)) for value in values):
        return
    up = values[-1] >= values[0]
    turns = [(a, b) for a, b in pairwise(values) if (b < a if up else b > a)]
    assert not turns, f"{part!r} goes from {values[0]} to {values[-1]} and turns back from {turns[0][0]} to {turns[0][1]}"
