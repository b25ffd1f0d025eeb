"""Optimal Brain Damage: the second-order change of the loss, with a diagonal Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from rarefy.core.records import Paper, Recipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.solvers.keep import Keep


@dataclass(frozen=True)
class OptimalBrainDamage(Criterion):
    """Rate a weight by the second-order change of the loss when it is set to zero.

    ``s = w^2 h / 2``, h the diagonal of the Hessian

    `scores` takes weight [O, ..., I] and gradient_square of the same shape (mean squared gradient of the batch loss);
    returns float32 scores of the weight's shape, in loss units for a log-likelihood loss.

    Source: LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989, eq. 5. Approximation: they back-propagate the
    exact diagonal; we put the empirical Fisher diagonal, the mean squared gradient, in its place. The two agree at a
    minimum of a log-likelihood, in expectation, and differ elsewhere; ours is never negative.

    >>> import torch
    >>> OptimalBrainDamage().scores(torch.tensor([[-2.0, 1.0]]), gradient_square=torch.tensor([[0.5, 4.0]])).tolist()
    [[1.0, 2.0]]
    """

    name = "obd"
    paper = Paper("obd", "Optimal Brain Damage", "NIPS 1989", ("empirical Fisher diagonal in place of the back-propagated second derivative",))

    def scores(self, weight: Tensor, *, generator: Generator | None = None, gradient_square: Tensor) -> Tensor:
        return weight.detach().float().square() * gradient_square.float() / 2


OBD = Recipe("obd", Keep(OptimalBrainDamage()), Global(), PerMatrix())
