"""Random pruning: chance decides where, good layer ratios decide how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rarefy.core.records import Paper, Recipe
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.erdos_renyi import ERK
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.solvers.keep import Keep


@dataclass(frozen=True)
class Random(Criterion):
    """Rate every weight by a uniform random number.

    ``s ~ U[0, 1)``

    `scores` takes weight [O, ..., I], of which only shape and device matter, and returns float32 scores of its shape;
    the same generator state gives the same scores on every device that holds the generator.

    Source: Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv 2202.02643, section 3.1. The paper
    draws each weight on its own (Bernoulli), so that its realised density is off by chance; the best `count` of
    uniform scores is a uniform draw of exactly `count` weights.

    >>> draw = lambda: Random().scores(torch.zeros(1, 3), generator=torch.Generator().manual_seed(0))
    >>> torch.equal(draw(), draw())
    True
    """

    name = "random"
    exceptions: ClassVar[Mapping[str, str]] = {"zero_weights_are_rated_least": "chance does not look at the weight"}

    def scores(self, weight: Tensor, *, generator: Generator | None = None) -> Tensor:
        device = weight.device if generator is None else generator.device
        return torch.rand(weight.shape, generator=generator, device=device).to(weight.device)


RANDOM_PRUNING = Recipe(
    "random-pruning",
    Keep(Random()),
    ERK(),
    PerMatrix(),
    paper=Paper(
        "random-pruning",
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
        "arXiv 2202.02643",
        ("exact counts instead of Bernoulli draws",),
    ),
)
