"""The operation that layers call: native where it suits, the dense product elsewhere."""

from __future__ import annotations

from torch import Tensor

from rarefy.kernels.library import pointer, product, suits

FEW = 16  # rows of x up to which the kernel multiplies; above, few columns are zero in all of them and torch's product is faster


class ColumnsMatrix:
    """A matrix [O, I] as `values` [I, O], kept as they are: columns one after the other.

    >>> import torch
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
        return product(self, x, bias, FEW)

    kind = "columns"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        return pointer(self.values), self.rows, self.columns
