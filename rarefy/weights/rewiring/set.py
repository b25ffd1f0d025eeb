"""SET: drop the smallest weights, grow at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Delta, Entries, Paper, Phase, StatePolicy, TrainRecipe
from rarefy.core.roles import Rewiring
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.random import Random
from rarefy.weights.schedules.constant import Constant

PAPER = Paper(
    "set", "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity", "arXiv 1707.04780", ("smallest magnitudes are dropped, not smallest of each sign",)
)


@dataclass(frozen=True)
class SET(Rewiring):
    """Replace a fraction of the stored entries by random empty places.

    ``drop = topk(-|theta|, k), grow ~ U(empty places)``; an entry just dropped is not grown.

    Source: Mocanu et al., arXiv 1707.04780, Algorithm 1.

    >>> entries = Entries(torch.tensor([5., 1.]), torch.tensor([0, 1]), (1, 3))
    >>> SET().rewire(entries, count=2, fraction=0.5, bound=None, generator=torch.Generator()).grow.tolist()
    [2]
    """

    name = "set"
    paper = PAPER
    policy: ClassVar[StatePolicy] = StatePolicy()

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator) -> Delta:
        free = torch.ones(entries.shape, dtype=torch.bool, device=entries.values.device).flatten() if bound is None else bound.flatten().clone()
        free[entries.index] = False
        size = min(int(fraction * len(entries.index)), int(free.sum()) - count + len(entries.index))
        drop = entries.index[topk_mask(-entries.values.abs(), size)]
        chance = torch.rand(free.shape, generator=generator).to(free.device)
        return Delta(drop, topk_mask(chance, count - len(entries.index) + len(drop), free).nonzero()[:, 0])


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    return (Phase("set", density=Constant(density), criterion=Random(), allocation=Uniform(), rewiring=SET(), fraction=Constant(0.3), every=max(1, steps // 20)),)


SET_RECIPE = TrainRecipe("set", _phases, Uniform(), Random(), PAPER)
