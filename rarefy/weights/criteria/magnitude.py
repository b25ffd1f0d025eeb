"""Magnitude: small weights go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from rarefy.core.records import Paper, Recipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.solvers.keep import Keep


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Rate a weight by its absolute value.

    ``s = |w|``

    `scores` takes weight [O, ..., I] of any real dtype and returns float32 scores of the same shape.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626, section 3.

    >>> import torch
    >>> Magnitude().scores(torch.tensor([[-2.0, 1.0]])).tolist()
    [[2.0, 1.0]]
    """

    name = "magnitude"
    paper = Paper("magnitude", "Learning both Weights and Connections for Efficient Neural Networks", "arXiv 1506.02626")

    def scores(self, weight: Tensor, *, generator: Generator | None = None) -> Tensor:
        return weight.detach().abs().float()


MAGNITUDE = Recipe("magnitude", Keep(Magnitude()), Uniform(), PerMatrix())
