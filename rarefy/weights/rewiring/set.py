"""SET: drop the weights nearest to zero on either side, grow at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Delta, Entries, Paper, Phase, StatePolicy, TrainRecipe
from rarefy.core.roles import Rewiring
from rarefy.weights.allocations.erdos_renyi import ER
from rarefy.weights.criteria.random import Random
from rarefy.weights.schedules.constant import Constant

PAPER = Paper(
    "set",
    "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity",
    "arXiv 1707.04780",
    (
        "a grown weight starts from zero, as in the authors' masked code; their sparse code draws it from a normal",
        "a stored weight that is exactly zero counts as the smallest positive one",
        "an entry just dropped is not grown in the same update",
        "the last update grows as the others do; the paper keeps the topology after its last removal",
        "exact counts instead of an Erdos-Renyi draw, and updates every twentieth of the run instead of every epoch",
    ),
)


@dataclass(frozen=True)
class SET(Rewiring):
    """Replace a fraction of the stored entries by random empty places.

    ``drop = floor(zeta P) smallest of the P positive + floor(zeta N) largest of the N negative, grow ~ U(empty places)``

    `rewire` takes entries (values [nnz], index [nnz] flat); returns flat positions. Fewer are dropped where there is
    not enough room to grow.

    Source: Mocanu et al., arXiv 1707.04780 (Nature Communications 2018), results, the SET procedure: "a fraction zeta of
    the smallest positive weights and of the largest negative weights of SC^k is removed", then "an amount of new random
    connections, equal to the amount of weights removed previously, is added"; zeta = 0.3 in their experiments.

    >>> entries = Entries(torch.tensor([5., 1., -3., -9.]), torch.arange(4), (1, 7))
    >>> SET().rewire(entries, count=4, fraction=0.5, bound=None, generator=torch.Generator()).drop.tolist()
    [1, 2]
    """

    name = "set"
    paper = PAPER
    policy: ClassVar[StatePolicy] = StatePolicy()

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator) -> Delta:
        free = torch.ones(entries.shape, dtype=torch.bool, device=entries.values.device).flatten() if bound is None else bound.flatten().clone()
        free[entries.index] = False
        stored = len(entries.index)
        fraction = min(fraction, (int(free.sum()) - count + stored) / max(stored, 1))
        positive = entries.values >= 0
        gone = _nearest_zero(entries.values, positive, fraction) | _nearest_zero(entries.values, ~positive, fraction)
        gone |= topk_mask(-entries.values.abs(), max(0, stored - count - int(gone.sum())), ~gone)
        drop = entries.index[gone]
        chance = torch.rand(free.shape, generator=generator).to(free.device)
        return Delta(drop, topk_mask(chance, count - stored + len(drop), free).nonzero()[:, 0])


def _nearest_zero(values: Tensor, side: Tensor, fraction: float) -> Tensor:
    """The given fraction, rounded down, of the values of one side that lie nearest to zero."""
    return topk_mask(-values.abs(), int(fraction * int(side.sum())), side)


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    return (Phase("set", density=Constant(density), criterion=Random(), rewiring=SET(), fraction=Constant(0.3), every=max(1, steps // 20)),)


SET_RECIPE = TrainRecipe("set", _phases, ER(), Random(), PAPER)
