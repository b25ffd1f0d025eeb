"""LAMP: a weight counts relative to those of its layer that would still be there when it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.records import Paper, Recipe, Units
from rarefy.core.roles import Allocation
from rarefy.weights.allocations.global_scores import Global, scores_of
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.solvers.keep import Keep


def lamp_scores(scores: Tensor) -> Tensor:
    """A layer's scores, rescaled so that layers compare.

    ``lamp_j = s_j^2 / sum_{i >= j} s_i^2`` in ascending order of s, the sum including j itself

    Args:
        scores: magnitudes of one layer, any shape, non-negative; among equals the lower index counts as larger.

    Returns:
        float64 of the same shape, in [0, 1]; the largest entry has 1, an entry of 0 has 0.

    >>> lamp_scores(torch.tensor([1., 2., 2.])).tolist()
    [0.1111111111111111, 1.0, 0.5]
    """
    flat = scores.detach().flatten().double()
    descending = flat.sort(descending=True, stable=True)
    square = descending.values.square()
    # Summed from the largest down: the sum of what survives, without the cancellation of total minus prefix.
    ratio = square / square.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(flat).scatter_(0, descending.indices, ratio).view(scores.shape)


@dataclass(frozen=True)
class Lamp(Allocation):
    """The counts of the best LAMP scores of the whole model: every layer keeps at least its best weight.

    ``lamp_j = s_j^2 / sum_{i >= j} s_i^2`` per layer, then one ranking over all layers

    `counts` takes units, the total and `scores` {units name: magnitudes of the units' shape}; returns how many each
    unit keeps, the total exact. Multiplying a layer by a constant changes nothing. Scores other than magnitudes are
    rescaled in the same way, which the paper does not do.

    Raises:
        BadInput: NaN scores, no scores for a unit, or a budget outside the sum of floors and the sum of caps.

    Source: Lee et al., Layer-adaptive sparsity for the Magnitude-based Pruning, arXiv 2010.07611, eq. 6. Ties at the
    threshold are cut at the exact count; the sums are float64.

    >>> scores = {"a": torch.tensor([1000., 100.]), "b": torch.tensor([1., 1.])}
    >>> Lamp().counts([Units("a", (2,), ()), Units("b", (2,), ())], 3, scores=scores)
    {'a': 1, 'b': 2}
    """

    name = "lamp"
    monotone: ClassVar[bool] = True

    def counts(self, units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
        return Global().counts(units, budget, scores={u.name: lamp_scores(scores_of(u, scores)) for u in units})


LAMP = Recipe(
    "lamp",
    Keep(Magnitude()),
    Lamp(),
    PerMatrix(),
    paper=Paper(
        "lamp",
        "Layer-adaptive sparsity for the Magnitude-based Pruning",
        "arXiv 2010.07611",
        ("exact counts: ties at the threshold go to the earlier layer",),
    ),
)
