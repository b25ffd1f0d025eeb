"""Our dense product for few rows of x, torch's for many. `torch.nn.functional.linear` is the reference."""

from __future__ import annotations

from torch import Tensor

from rarefy.kernels.library import pointer, product, suits

FEW = 8  # rows of x up to which our kernel is the faster one


class DenseMatrix:
    """A dense matrix [O, I], kept as it is.

    >>> import torch
    >>> DenseMatrix(torch.tensor([[1.0, 2.0]])).linear(torch.tensor([[3.0, 4.0]])).tolist()
    [[11.0]]
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.rows, self.columns = weight.shape
        self.fast = suits(self.weight) and self.weight.numel() > 0

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.weight

    def take(self, ids: Tensor) -> Tensor:
        """Rows [..., I] of ids [...]."""
        return self.weight[ids]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O]."""
        return product(self, x, bias, FEW)

    kind = "dense"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        return pointer(self.weight), self.rows, self.columns
