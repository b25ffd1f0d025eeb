"""Unstructured patterns: any weight may go, compared within a matrix or within an output row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.exact import topk_mask, topk_mask_rows
from rarefy.core.roles import Pattern


@dataclass(frozen=True)
class PerMatrix(Pattern):
    """The `count` best weights of the matrix.

    >>> PerMatrix().mask(torch.tensor([[3., 2.], [1., 0.]]), 2).tolist()
    [[True, True], [False, False]]
    """

    name = "matrix"

    @property
    def span(self) -> int:
        return 1

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return topk_mask(scores, count, bound)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        return min(max(count, 0), math.prod(shape))


@dataclass(frozen=True)
class PerRow(Pattern):
    """The best weights of every output row, the same number in each; the remainder goes to the earlier rows.

    >>> PerRow().mask(torch.tensor([[3., 2.], [1., 0.]]), 3).tolist()
    [[True, True], [True, False]]
    """

    name = "row"

    @property
    def span(self) -> int:
        return 1

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        rows = scores.shape[0]
        counts = torch.full((rows,), count // rows, device=scores.device)
        counts[: count % rows] += 1
        flat_bound = None if bound is None else bound.reshape(rows, -1)
        return topk_mask_rows(scores.reshape(rows, -1), counts, flat_bound).view(scores.shape)

    def nearest(self, shape: Sequence[int], count: int) -> int:
        return min(max(count, 0), math.prod(shape))
