"""SRigL: RigL with the same number of inputs for every neuron, and neurons that go when little of them is salient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rarefy.core.exact import topk_mask, topk_mask_rows
from rarefy.core.records import Delta, Entries, Paper, Phase, StatePolicy, TrainRecipe
from rarefy.core.roles import Rewiring
from rarefy.weights.actions import ScaleToFanIn
from rarefy.weights.allocations.erdos_renyi import ERK
from rarefy.weights.criteria.random import Random
from rarefy.weights.patterns.unstructured import PerRow
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cosine import Cosine

PAPER = Paper(
    "srigl",
    "Dynamic Sparse Training with Structured Sparsity",
    "arXiv 2305.02299",
    (
        "a row with more kept weights than its fan-in loses the smallest; the authors' code loses arbitrary ones",
        "the gradient of one batch ranks what grows, as in the paper's CIFAR runs; its larger runs accumulate eight",
        "where the budget holds fewer weights than there are salient neurons, the most salient keep one each; the authors' code stops",
        "runs of under 2,000 steps update every twentieth of the run instead of every 100 steps",
    ),
)


@dataclass(frozen=True)
class SRigL(Rewiring):
    """Drop and grow as RigL does, over the layer, then give every neuron that has enough salient weights the same fan-in.

    ``salient = topk(|theta|, n - k) or topk(|grad|, k), k = floor(fraction n)``; a neuron with fewer than
    ``max(1, floor(gamma count / neurons))`` salient weights is ablated, and ``fan_in = floor(count / active neurons)``

    `rewire` takes entries (values [nnz], index [nnz] flat) of a matrix [O, ..., I], its dense gradient and whether it is
    the model's last, of which no neuron is ablated. Of the weights kept over the layer a row loses the smallest beyond
    its fan-in, and grows the places of largest gradient up to it. Between ``ceil(count / columns)`` and all neurons stay,
    so that the fan-in fits; the count is met up to fewer entries than there are active neurons. An ablated neuron comes
    back when it is salient again. Grown weights are zero; a weight dropped and grown at once keeps its value.

    Source: Lasby et al., arXiv 2305.02299, section 3, and the authors' code: gamma = 0.3 of the sparse fan-in (0.95 for
    vision transformers), alpha = 0.3, updates until 3/4 of the training.

    >>> entries = Entries(torch.tensor([5., 4., 3., 1.]), torch.tensor([0, 1, 2, 4]), (2, 4))
    >>> gradient = torch.tensor([[0., 0., 0., 1.], [0., 9., 8., 0.]])
    >>> delta = SRigL().rewire(entries, count=4, fraction=0.25, bound=None, generator=None, gradient=gradient, final=False)
    >>> delta.drop.tolist(), delta.grow.tolist()
    ([2, 4], [5, 6])
    """

    gamma: float = 0.3
    name = "srigl"
    paper = PAPER
    policy: ClassVar[StatePolicy] = StatePolicy(at="instead")
    exceptions: ClassVar[dict[str, str]] = {"without_a_fraction_nothing_is_dropped": "rows of unequal fan-in are evened out whatever the fraction"}

    def short(self, mask: Tensor) -> int:
        """Fewer than the rows that are active are missing; under a bound a row may also lack places."""
        return max(0, int(mask.any(1).sum()) - 1)

    def rewire(self, entries: Entries, *, count: int, fraction: float, bound: Tensor | None, generator: Generator | None, gradient: Tensor, final: bool) -> Delta:
        rows = entries.shape[0]
        magnitude, stored = _dense(entries, rows)
        steepness = gradient.abs().view(rows, -1)
        allowed = torch.ones_like(stored) if bound is None else bound.view(rows, -1)
        keep_count, grow_count = _numbers(entries, fraction)
        kept = topk_mask(magnitude, keep_count, stored)
        salient = (kept | topk_mask(steepness, min(grow_count, int(allowed.sum())), allowed)).sum(1)
        active, fan_in = self._active(salient, allowed.sum(1), count, final)
        kept = topk_mask(magnitude, min(keep_count, int((stored & active[:, None]).sum())), stored & active[:, None])
        kept = topk_mask_rows(magnitude, kept.sum(1).clamp(max=fan_in), kept)
        grown = topk_mask_rows(steepness, torch.where(active, fan_in - kept.sum(1), 0), allowed & ~kept & active[:, None])
        mask = kept | grown
        return Delta((stored & ~mask).flatten().nonzero()[:, 0], (mask & ~stored).flatten().nonzero()[:, 0])

    def _active(self, salient: Tensor, room: Tensor, count: int, final: bool) -> tuple[Tensor, int]:
        """Which rows [O] stay, and how many weights each of them has."""
        width = max(1, int(room[room > 0].min())) if bool((room > 0).any()) else 1
        ranked = torch.where(room > 0, salient, -1).sort(descending=True, stable=True)
        at_least, at_most = -(-count // width), max(1, min(count, int((room > 0).sum())))
        wanted = 0 if final else max(1, int(self.gamma * (count // len(salient))))
        wanted = min(wanted, int(ranked.values[max(at_least, 1) - 1]))
        number = min(int((ranked.values >= max(wanted, 0)).sum()), at_most)
        active = torch.zeros_like(room, dtype=torch.bool)
        active[ranked.indices[:number]] = True
        return active, min(count // max(number, 1), width)


def _dense(entries: Entries, rows: int) -> tuple[Tensor, Tensor]:
    """The moduli of the stored values [O, C], zero elsewhere, and where they are stored."""
    numel = rows * (torch.Size(entries.shape).numel() // rows)
    magnitude = entries.values.new_zeros(numel).float()
    stored = torch.zeros(numel, dtype=torch.bool, device=magnitude.device)
    magnitude[entries.index], stored[entries.index] = entries.values.abs().float(), True
    return magnitude.view(rows, -1), stored.view(rows, -1)


def _numbers(entries: Entries, fraction: float) -> tuple[int, int]:
    """How many stored weights stay by magnitude, and how many places are salient by gradient; a stored zero does not stay."""
    stored = len(entries.index)
    keep = min(stored - int(fraction * stored), int(entries.values.count_nonzero()))
    return keep, stored - keep


def _phases(density: float, steps: int) -> tuple[Phase, ...]:
    every = max(1, min(100, steps // 20))
    fraction: Any = Cosine(0.3, int(0.75 * steps))
    return (
        Phase("draw", until=0, density=Constant(density), criterion=Random(), pattern=PerRow()),
        Phase("srigl", density=Constant(density), enter=(ScaleToFanIn(),), rewiring=SRigL(), fraction=fraction, every=every),
    )


SRIGL = TrainRecipe("srigl", _phases, ERK(), Random(), PAPER)
