"""The specification, in PyTorch. A group is C(m, n) g rows; its slots lie by pattern, g rows to each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def patterns(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """The C(m, n) ways to keep n of m, in revolving-door order: each differs from the one before in one position.

    >>> patterns(2, 4)
    ((0, 1), (1, 2), (0, 2), (2, 3), (1, 3), (0, 3))
    """
    if n == 0 or n == m:
        return (tuple(range(n)),)
    return patterns(n, m - 1) + tuple((*each, m - 1) for each in reversed(patterns(n - 1, m - 1)))


def unpack(values: Tensor, index: Tensor, n: int, m: int, g: int, shape: tuple[int, int]) -> Tensor:
    """The dense matrix [O, I] of values [G, K, R, n] and the row inside its group of every slot, int64 [G, K, R]."""
    groups, chunks, rows, _ = values.shape
    columns = torch.tensor(patterns(n, m), device=values.device).repeat_interleave(g, 0)
    by_slot = values.new_zeros(groups, chunks, rows, m).scatter_(3, columns.expand(groups, chunks, rows, n), values)
    by_row = torch.empty_like(by_slot).scatter_(2, index[..., None].expand_as(by_slot), by_slot)
    return by_row.transpose(1, 2).reshape(groups * rows, chunks * m)[: shape[0], : shape[1]].contiguous()


def linear(x: Tensor, values: Tensor, index: Tensor, n: int, m: int, g: int, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """``y = x W^T + b`` for x [..., I]."""
    return F.linear(x, unpack(values, index, n, m, g, shape), bias)
