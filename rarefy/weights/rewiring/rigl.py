"""RigL: drop the smallest weights, grow where the dense gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Delta, Entries, Paper, Phase, StatePolicy, TrainRecipe
from rarefy.core.roles import Rewiring
from rarefy.weights.allocations.erdos_renyi import ERK
from rarefy.weights.criteria.random import Random
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cosine import Cosine

PAPER = Paper(
    "rigl",
    "Rigging the Lottery: Making All Tickets Winners",
    "arXiv 1911.11134",
    (
        "an entry dropped and grown at once starts from zero; the authors' code lets it keep its value",
        "ERK by default; the paper's default is uniform with the first layer dense, and ERK its better variant",
        "no update at step 0, where the paper's condition t mod dT = 0 holds",
        "runs of under 2,000 steps update every twentieth of the run instead of every 100 steps",
    ),
)


@dataclass(frozen=True)
class RigL(Rewiring):
    """Replace a fraction of the stored entries by the places of largest gradient.

    ``drop = topk(-|theta|, k), grow = topk(|grad|, k) over everything but theta minus drop, k = floor(fraction * nnz)``

    `rewire` takes entries (values [nnz], index [nnz] flat) and gradient, dense, the tensor's shape; returns flat
    positions [k] and [k + count - nnz]. Grown weights are zero and the update takes the place of the optimizer's step.

    An entry just dropped may be grown again at once, because only what is kept is excluded.

    Source: Evci et al., arXiv 1911.11134, Algorithm 1 and section 3: drop ArgTopK(-|theta|, k); grow ArgTopK(|grad|, k)
    over i not in "the set of active connections remaining after step (3)"; "newly activated connections are initialized
    to zero"; k = f_decay(t; alpha, T_end) (1 - s) N, f_decay the half cosine of section 3 (2). Section 4: alpha = 0.3,
    dT = 100, T_end "roughly 3/4 of the full training". Its networks are uniform with a dense first layer "unless
    otherwise specified"; our recipe takes the ERK distribution of section 3 (1), which the paper finds more accurate.

    >>> entries = Entries(torch.tensor([5., 1.]), torch.tensor([0, 1]), (1, 3))
    >>> delta = RigL().rewire(entries, count=2, fraction=0.5, bound=None, generator=None, gradient=torch.tensor([[9., 1., 2.]]))
    >>> delta.drop.tolist(), delta.grow.tolist()
    ([1], [2])
    """

    name = "rigl"
    paper = PAPER
    policy: ClassVar[StatePolicy] = StatePolicy(at="instead")

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator | None, gradient: Tensor) -> Delta:
        stored = len(entries.index)
        drop = entries.index[topk_mask(-entries.values.abs(), max(int(fraction * stored), stored - count))]
        free = torch.ones(gradient.numel(), dtype=torch.bool, device=gradient.device) if bound is None else bound.flatten().clone()
        free[entries.index] = False
        free[drop] = True
        grow = topk_mask(gradient.abs().flatten(), count - stored + len(drop), free)
        return Delta(drop, grow.nonzero()[:, 0])


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    every = max(1, min(100, steps // 20))
    return (Phase("rigl", density=Constant(density), criterion=Random(), rewiring=RigL(), fraction=Cosine(0.3, int(0.75 * steps)), every=every),)


RIGL = TrainRecipe("rigl", _phases, ERK(), Random(), PAPER)
