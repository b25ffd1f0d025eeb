"""The operation that layers call: native where it suits, the dense product elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.library import native, pointer, suits

FEW = 16  # rows of x up to which the kernel multiplies; above, few columns are zero in all of them and torch's product is faster


class ColumnsMatrix:
    """A matrix [O, I] as `values` [I, O], kept as they are: columns one after the other.

    >>> m = ColumnsMatrix(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> m.linear(torch.tensor([[0.0, 10.0]])).tolist(), m.dense().tolist()
    ([[30.0, 40.0]], [[1.0, 3.0], [2.0, 4.0]])
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach()
        self.columns, self.rows = values.shape
        self.fast = suits(self.values)

    def dense(self) -> Tensor:
        """The matrix [O, I], a view."""
        return self.values.t()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O]; few rows of x never read a column that is zero in all of them."""
        batch = x.numel() // self.columns
        if not (self.fast and batch <= FEW and suits(x, bias)):
            return F.linear(x, self.dense().to(x.dtype), bias)
        y = torch.empty(*x.shape[:-1], self.rows)
        native().columns_linear(*self.arguments(), pointer(x), pointer(bias), pointer(y), batch, torch.get_num_threads())  # type: ignore[union-attr]
        return y

    kind = "columns"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        return pointer(self.values), self.rows, self.columns
