"""GQSA: int4 in groups, whole groups missing; first the weights learn block by block, then the scales alone, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from rarefy.core.records import Paper, Recipe
from rarefy.core.roles import View
from rarefy.surgery.adapters import Adaptation
from rarefy.surgery.adapters.grid import LAST, coarse, codes, flat, grouped, half, spread, steps, straight, values
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.inverse_hessian import InverseHessian
from rarefy.weights.patterns.structured import RowBlock
from rarefy.weights.solvers.least_squares import LeastSquares

PAPER = Paper(
    "gqsa",
    "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
    "arXiv 2412.17560",
    (
        "only the abstract and summaries of the paper were at hand: they give the two stages and the storage by blocks of a row",
        "the saliency, the group size, the loss of the blocks and all rates are therefore unverified, from second-hand accounts",
        "groups of 32, the layout's, where the paper is said to use 16",
        "kept weights are updated by least squares before they are trained",
        "a group's scale and zero are learned as the share of its range that is covered, so that both end codes are used and the layout stores the result exactly",
        "the end-to-end stage may learn from a teacher besides the text",
        "rows hold equally many groups, so that the kernel splits rows, not groups, over its threads",
    ),
)
GQSA = Recipe("gqsa", LeastSquares(InverseHessian(power=2)), Uniform(), RowBlock(1, 32), PAPER)
PACE = 10.0  # how much faster the ends of the grid learn than the weights


class RoundedGroups(View):
    """A learned change of every kept weight, seen through the int4-asymmetric layout.

        ``V = W + D`` where W is not zero; per group of 32 columns ``[l, h] = mid +- (1 - 10 e) (max V - min V) / 2``, ``scale = (h - l) / 15``,
        ``zero = l``, both float16; ``W' = scale * round((V - zero) / scale) + zero``. D [O, I] and e [O, G, 2] are float32 and zero at the start;
        rounding passes gradients straight through, clipping does not. The share ``1 - 10 e`` of a half range that is
        covered is kept in [1/2, 1], so that codes 0 and 15 are always used. Zeros stay zeros, and no kept weight becomes one. In a model of
    16 bits the result is rounded once more, to its dtype, and is stored nearly: load it in float32.

        >>> w = torch.tensor([[0.0] * 32 + [-1.25, 2.5] + [0.31] * 30])  # steps of a quarter
        >>> RoundedGroups(torch.zeros(1, 64), torch.zeros(1, 2, 2))(w)[0, [0, 32, 33, 34]].tolist()
        [0.0, -1.25, 2.5, 0.25]
    """

    @classmethod
    def examples(cls) -> tuple[RoundedGroups, ...]:
        return (cls(torch.zeros(6, 8), torch.zeros(6, 1, 2)), cls(torch.arange(48.0).view(6, 8) / 48, torch.full((6, 1, 2), 0.01)))

    def __init__(self, change: Tensor, ends: Tensor) -> None:
        super().__init__()
        self.change, self.ends = nn.Parameter(change), nn.Parameter(ends)

    def forward(self, weight: Tensor) -> Tensor:
        raw = grouped(weight)
        present = (raw != 0).any(-1)
        return flat(spread(self._rounded(raw[present], grouped(self.change)[present], self.ends[present]), present), weight.shape[1]).to(weight.dtype)

    def _rounded(self, raw: Tensor, change: Tensor, ends: Tensor) -> Tensor:
        """The groups that are there, [N, 32]."""
        kept = raw != 0
        v = torch.where(kept, raw + change, 0.0)
        low, high = v.amin(-1), v.amax(-1)
        share = straight(1 - PACE * ends, (1 - PACE * ends).clamp(0.5, 1.0))
        middle, reach = (low + high) / 2, (high - low) / 2
        # exactly the least and the largest entry where all of the range is covered
        bottom = torch.where(share[:, 0] < 1, middle - share[:, 0] * reach, low + (1 - share[:, 0]) * reach)
        top = torch.where(share[:, 1] < 1, middle + share[:, 1] * reach, high - (1 - share[:, 1]) * reach)
        scale, zero = steps(bottom, top, ~kept.all(-1))
        place = torch.where(scale[:, None] > 0, (v - zero[:, None]) / torch.where(scale > 0, scale, 1.0)[:, None], 0.0).clamp(0, LAST)
        return values(straight(place, codes(v, kept, scale, zero)), kept, scale, zero)


@dataclass(frozen=True)
class Int4Weights(Adaptation):
    """Train kept weights and the ends of every group's grid through int4 rounding; the result lies on the grid.

    Block by block against the dense parent (`--course by-block`) it is the paper's BQPO. See `RoundedGroups`.

    Source: Zeng et al., GQSA, arXiv 2412.17560, stage 1, from second-hand accounts.

    >>> weight = torch.randn(2, 64) * (torch.arange(64) < 32)
    >>> (Int4Weights().view(weight, generator=torch.Generator())(weight)[0].unique().numel()) <= 17
    True
    """

    lr: float = 1e-3
    name = "int4-weights"
    paper = PAPER
    exceptions: ClassVar[Mapping[str, str]] = {"nothing_changes_at_the_start": "what it trains is the rounded matrix, and a matrix that is not rounded yet is at the start"}

    def view(self, weight: Tensor, *, generator: Generator) -> RoundedGroups:
        return RoundedGroups(torch.zeros(weight.shape, device=weight.device), torch.zeros(*grouped(weight).shape[:2], 2, device=weight.device))


class ScaledGroups(View):
    """A learned scale and zero to each group of 32 columns of a matrix whose codes stay as they are.

    ``W' = scale (1 + a) * code + zero + scale * b``, rounded to float16 scale and zero; a and b float32 [O, G], zero at the start. Where
    a group holds zeros, b is without effect: its zero stays a whole number of steps below 0, so that they stay zeros. A group
    that is on no such grid moves alike, unrounded: ``W' = W + a (W - min W) + scale * b``.

    >>> w = torch.arange(32.0)[None] % 16 - 4.5  # steps of one
    >>> ScaledGroups(torch.tensor([[1.0]]), torch.tensor([[2.0]]))(w)[0, :3].tolist()
    [-2.5, -0.5, 1.5]
    """

    @classmethod
    def examples(cls) -> tuple[ScaledGroups, ...]:
        return tuple(cls(torch.full((6, 1), a), torch.full((6, 1), b)) for a, b in ((0.0, 0.0), (0.25, -0.5)))

    def __init__(self, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.scale, self.zero = nn.Parameter(scale), nn.Parameter(zero)

    def forward(self, weight: Tensor) -> Tensor:
        raw = grouped(weight)
        present = (raw != 0).any(-1)
        return flat(spread(self._scaled(raw[present], self.scale[present], self.zero[present]), present), weight.shape[1]).to(weight.dtype)

    def _scaled(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The groups that are there, [N, 32]."""
        kept = groups != 0
        holey = ~kept.all(-1)
        step, start = steps(groups.amin(-1), groups.amax(-1), holey)
        code = codes(groups, kept, step, start).detach()
        on_grid = (values(code, kept, step, start) == groups).all(-1)
        longer, further = step * (1 + scale), start + step * zero
        thin = coarse(longer)
        at = (-start / torch.where(step > 0, step, 1.0)).round()
        there = values(code, kept, torch.where(holey, thin, half(longer)), torch.where(holey, -at * thin, half(further)))
        free = torch.where(kept, groups + scale[:, None] * (groups - start[:, None]) + (step * zero)[:, None], 0.0)
        return torch.where(on_grid[:, None], there, free)


@dataclass(frozen=True)
class Int4Scales(Adaptation):
    """Train the scale and the zero of every group, codes frozen: 1/16 of the kept weights' number. See `ScaledGroups`.

    End to end on a matrix that `Int4Weights` rounded it is the paper's E2E-OQP.

    Source: Zeng et al., GQSA, arXiv 2412.17560, stage 2, from second-hand accounts.

    >>> weight = torch.randn(2, 64)
    >>> torch.equal(Int4Scales().view(weight, generator=torch.Generator())(weight), weight)
    True
    """

    lr: float = 1e-3
    name = "int4-scales"
    paper = PAPER

    def view(self, weight: Tensor, *, generator: Generator) -> ScaledGroups:
        shape = grouped(weight).shape[:2]
        return ScaledGroups(torch.zeros(shape, device=weight.device), torch.zeros(shape, device=weight.device))
