"""PST: the weight is frozen, and both its update and the importance of its entries are learned, by thin factors.

Axis legend: O outputs, I inputs (all axes after the first together), K rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rarefy.core.attach import PREFIX, attach_view
from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count, topk_mask
from rarefy.core.records import Paper, Phase, Pruned, TrainRecipe
from rarefy.core.roles import View, asks
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.schedules.cubic import Cubic
from rarefy.weights.schedules.linear import Linear

PAPER = Paper(
    "pst",
    "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning",
    "arXiv 2205.11005",
    (
        "the dense model is trained first, by the first half of the steps, where the paper begins with a pretrained one",
        "the last layer is like the others; the paper trains a classifier of its own as usual",
        "the optimizer is the task's, where the paper uses AdamW at 3e-5 and 5e-5: factors of standard normals take steps much larger than a weight's own",
        "pruning takes the middle 7/10 of its phase, at every step",
    ),
)


class PST(View):
    """A frozen weight, a low-rank update, and the entries of least learned importance at zero.

    ``W' = W + U V,  S = |W'| + A B + r 1^T + 1 c^T,  w_eff = W' * top_k(S)``; straight through, ``dL/dS := dL/dw_eff * W'``

    W [O, I] (or [O, ..., I], its axes after the first taken together), U and A [O, K] of standard normals, V and B [K, I],
    r [O] and c [I] of zeros: at the start the mask is that of magnitudes. U and V learn by both ways, the weight and |W'|; W, where
    it is trained, by the first alone.
    The knob `pruned` in [0, 1] says how much of what goes in the end is gone: ``k = O I - round(pruned (O I - kept))``.

    Raises:
        BadInput: a rank below one, or a weight of another shape.

    Source: Li et al., PST, arXiv 2205.11005, and the authors' code: K = 8, weights of the three parts 1.

    >>> view = PST(2, 2, kept=1); view.knobs["pruned"] = 1.0
    >>> view(torch.tensor([[2., -3.], [1., 0.5]])).tolist()
    [[0.0, -3.0], [0.0, 0.0]]
    """

    paper = PAPER

    @classmethod
    def examples(cls) -> tuple[PST, ...]:
        halved = cls(6, 8, kept=20, rank=2, generator=torch.Generator().manual_seed(0))
        halved.knobs["pruned"] = 1.0
        return (cls(6, 8, kept=20, generator=torch.Generator().manual_seed(1)), halved)

    def __init__(self, outputs: int, inputs: int, kept: int, rank: int = 8, generator: Generator | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise BadInput(f"rank {rank}", "factors have a rank of one or more")
        self.kept = kept
        self.knobs["pruned"] = 0.0
        self.u, self.a = (nn.Parameter(torch.randn(outputs, rank, generator=generator)) for _ in range(2))
        self.v, self.b = (nn.Parameter(torch.zeros(rank, inputs)) for _ in range(2))
        self.r, self.c = nn.Parameter(torch.zeros(outputs)), nn.Parameter(torch.zeros(inputs))

    def updated(self, weight_OI: Tensor) -> Tensor:
        """``W + U V`` [O, I]."""
        if weight_OI.shape != (len(self.r), len(self.c)):
            raise BadInput(f"a weight of shape {tuple(weight_OI.shape)}", f"these factors are of one of shape {(len(self.r), len(self.c))}")
        return weight_OI + self.u @ self.v

    def scores(self, updated_OI: Tensor) -> Tensor:
        """``|W'| + A B + r 1^T + 1 c^T`` [O, I]."""
        return updated_OI.abs() + self.a @ self.b + self.r[:, None] + self.c

    def mask(self, scores_OI: Tensor) -> Tensor:
        size = scores_OI.numel()
        return topk_mask(scores_OI.detach(), size - round(self.knobs["pruned"] * (size - self.kept)))

    def forward(self, weight: Tensor) -> Tensor:
        raw = weight.flatten(1).float()
        updated, scores = self.updated(raw), self.scores(self.updated(raw.detach()))
        seen: Tensor = _Straight.apply(updated, scores, self.mask(scores))
        return seen.view(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def export(self, weight: Tensor) -> Pruned:
        updated = self.updated(weight.flatten(1).float())
        mask = self.mask(self.scores(updated))
        return Pruned(torch.where(mask, updated, 0.0).view(weight.shape).to(weight.dtype), mask.view(weight.shape))


class _Straight(torch.autograd.Function):
    """What the mask keeps; the scores get the gradient that the mask would get."""

    @staticmethod
    def forward(ctx: Any, updated: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(updated, mask)
        return torch.where(mask, updated, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        updated, mask = ctx.saved_tensors
        return torch.where(mask, grads[0], 0.0), grads[0] * updated, None


@dataclass(frozen=True)
class AttachPST:
    """An action on entering a phase: every site gets its factors; the phase's allocation says how much each keeps of `density` in the end.

    Raises:
        BadInput: an allocation that looks at more than shapes: what it would see changes until the end.
    """

    density: float
    rank: int = 8

    def __call__(self, sparsifier: Any) -> None:
        units, allocation = sparsifier.support.units(), sparsifier.phase.allocation or Uniform()
        if asks(allocation.counts):
            raise BadInput(
                f"allocation {allocation!r}",
                f"it asks for {', '.join(asks(allocation.counts))}, and here counts are fixed before training",
                "use uniform, erk or another of shapes",
            )
        counts = allocation.counts(units, keep_count(sum(u.numel for u in units), self.density))
        for key, weight in sparsifier.weights.items():
            attach_view(sparsifier.model, key, PST(weight.shape[0], weight[0].numel(), counts[key], self.rank, sparsifier.generator))


def is_factor(name: str) -> bool:
    """Whether a parameter belongs to a view.

    >>> is_factor("0.rarefy_weight.u"), is_factor("0.weight")
    (True, False)
    """
    return name.startswith(PREFIX) or f".{PREFIX}" in name


def _is_own(name: str) -> bool:
    return not is_factor(name)


@dataclass(frozen=True)
class Tuned:
    """Train densely by half of the steps; then freeze the model and learn factors, while what goes, goes along a cubic.

    ``w_eff = (W + U V) * top_k(|W + U V| + A B + r 1^T + 1 c^T)``, W frozen, all else learned straight through the mask

    Source: Li et al., PST, arXiv 2205.11005, and the authors' code, see `PST`.
    """

    rank: int = 8

    def __call__(self, density: float, steps: int) -> tuple[Phase, ...]:
        dense = steps // 2
        tuned = steps - dense
        pruned = Cubic(1.0, begin=tuned // 10, every=1, updates=max(1, 7 * tuned // 10), initial=0.0)
        return (
            Phase("attach", until=0, enter=(AttachPST(density, self.rank),)),
            Phase("dense", until=dense, rate=Linear(1.0, 0.0, dense), trainable=_is_own),
            Phase("pst", trainable=is_factor, knobs={"pruned": pruned}, rate=Linear(0.1, 0.0, tuned)),
        )


PST_RECIPE = TrainRecipe("pst", Tuned(), Uniform(), Magnitude(), PAPER)
