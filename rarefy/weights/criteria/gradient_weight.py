"""Gradient times weight: what the loss changes, to first order, when a weight goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from rarefy.core.records import Paper, Recipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.solvers.keep import Keep


@dataclass(frozen=True)
class GradientWeight(Criterion):
    """Rate a weight by the first-order change of the loss when it is set to zero.

    ``s = |w * g|``

    `scores` takes weight [O, ..., I] and gradient of the same shape (mean over batches, loss units per weight unit);
    returns float32 scores of the weight's shape, in loss units.

    Source: Mozer and Smolensky, Skeletonization, NIPS 1988 (the first-order term); Molchanov et al., Importance
    Estimation for Neural Network Pruning, arXiv 1906.10771, eq. 8. We take the modulus instead of the square, which
    ranks alike, and rate single weights instead of channels.

    >>> import torch
    >>> GradientWeight().scores(torch.tensor([[-2.0, 1.0]]), gradient=torch.tensor([[0.5, -3.0]])).tolist()
    [[1.0, 3.0]]
    """

    name = "gradient"
    paper = Paper(
        "gradient",
        "Importance Estimation for Neural Network Pruning",
        "arXiv 1906.10771",
        ("the modulus instead of the square, which ranks alike", "single weights instead of channels"),
    )

    def scores(self, weight: Tensor, *, generator: Generator | None = None, gradient: Tensor) -> Tensor:
        return (weight.detach().float() * gradient.float()).abs()


GRADIENT = Recipe("gradient", Keep(GradientWeight()), Global(), PerMatrix())
