"""Global: one ranking over the whole model, and a layer keeps what it wins there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import topk_mask
from rarefy.core.records import Paper, Recipe, Units
from rarefy.core.roles import Allocation
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.solvers.keep import Keep


@dataclass(frozen=True)
class Global(Allocation):
    """The counts of the `budget` best scores of the whole model.

    ``maximise the sum of kept scores subject to floor_i <= c_i <= cap_i, sum c_i = budget``

    `counts` takes units, the total and `scores` {units name: tensor of the units' shape}, comparable between units;
    returns how many each unit keeps. Ties go to the earlier unit. A unit that would fall below its floor keeps its
    best `floor`, and the deficit is taken from the others' weakest, so that the total stays exact.

    Raises:
        BadInput: NaN scores, no scores for a unit, or a budget outside the sum of floors and the sum of caps.

    Source: Gupta et al., Is Complexity Required for Neural Network Pruning?, arXiv 2209.14624, section 3 (the floors
    are its minimum threshold). We keep an exact count where the threshold's `>=` keeps every tie.

    >>> scores = {"a": torch.tensor([5., 4., 3.]), "b": torch.tensor([2., 1.])}
    >>> Global().counts([Units("a", (3,), ()), Units("b", (2,), ())], 3, scores=scores)
    {'a': 3, 'b': 0}
    >>> Global().counts([Units("a", (3,), ()), Units("b", (2,), (), floor=1)], 3, scores=scores)
    {'a': 2, 'b': 1}
    """

    name = "global"
    monotone: ClassVar[bool] = True

    def counts(self, units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
        free = budget - sum(u.floor for u in units)
        room = sum(u.limit - u.floor for u in units)
        if not 0 <= free <= room:
            low = sum(u.floor for u in units)
            raise BadInput(f"budget {budget}", f"floors add up to {low} and caps to {low + room}, and the budget lies between", "change the density, the floors or the caps")
        candidates = [_between(scores_of(u, scores), u.floor, u.limit) for u in units]
        won = torch.split(topk_mask(torch.cat(candidates), free), [c.numel() for c in candidates]) if candidates else ()
        return {u.name: u.floor + int(mask.sum()) for u, mask in zip(units, won, strict=True)}


def scores_of(unit: Units, scores: Mapping[str, Tensor]) -> Tensor:
    """The flat scores of one unit, or BadInput where they are absent or of another size."""
    if unit.name not in scores or scores[unit.name].numel() != unit.numel:
        known = tuple(scores[unit.name].shape) if unit.name in scores else "absent"
        raise BadInput(f"scores of {unit.name} ({known})", f"an allocation by scores needs one score for each of the {unit.numel} entries of every unit")
    return scores[unit.name].detach().float().flatten()


def _between(flat: Tensor, floor: int, cap: int) -> Tensor:
    """The entries that compete: beyond the `floor` best, which are kept anyway, and within the `cap` best."""
    if floor == 0 and cap >= flat.numel():
        return flat
    return flat[topk_mask(flat, cap) & ~topk_mask(flat, floor)]


GLOBAL_MP = Recipe(
    "global-mp",
    Keep(Magnitude()),
    Global(),
    PerMatrix(),
    paper=Paper(
        "global-mp",
        "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
        "arXiv 2209.14624",
        ("exact counts: ties at the threshold go to the lower index", "the minimum count is a floor of each unit instead of a fraction of the model"),
    ),
)
