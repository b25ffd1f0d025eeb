"""Wanda: a weight counts for its size times the size of what it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from rarefy.core.records import Paper, Recipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.patterns.unstructured import PerRow
from rarefy.weights.solvers.keep import Keep


@dataclass(frozen=True)
class Wanda(Criterion):
    """Rate a weight by its magnitude times the norm of its input feature.

    ``s_ij = |w_ij| * ||x_j||_2``

    `scores` takes weight [O, ..., I] and input_norm [..., I], the l2 norm over calibration rows of the input that
    meets each weight of an output row, in the unit of the activations; returns float32 scores of the weight's shape.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, eq. 1.
    The paper compares scores within one output row: use it with the `row` pattern.

    >>> import torch
    >>> Wanda().scores(torch.tensor([[-2.0, 1.0]]), input_norm=torch.tensor([1.0, 3.0])).tolist()
    [[2.0, 3.0]]
    """

    name = "wanda"
    paper = Paper("wanda", "A Simple and Effective Pruning Approach for Large Language Models", "arXiv 2306.11695")

    def scores(self, weight: Tensor, *, generator: Generator | None = None, input_norm: Tensor) -> Tensor:
        return weight.detach().abs().float() * input_norm.float().reshape(weight.shape[1:])


WANDA = Recipe("wanda", Keep(Wanda()), Uniform(), PerRow())
