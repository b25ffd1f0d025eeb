"""The specification, in PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def unpack(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The dense matrix [O, I] that is `values` at the rows and columns of the masks, zero elsewhere.

    >>> import torch
    >>> unpack(torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([[2.0]])).tolist()
    [[0.0, 2.0], [0.0, 0.0]]
    """
    dense = values.new_zeros(rows.numel(), columns.numel())
    dense[rows.nonzero(), columns.nonzero().t()] = values
    return dense


def linear(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b`` for x [..., I]."""
    return F.linear(x, unpack(rows, columns, values), bias)
