"""The operation that layers call: native where it suits, the reference elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.bitmask import reference
from rarefy.kernels.library import native, pointer, product, suits, usable

FEW = 16  # rows of x up to which the kernel multiplies; above, it unpacks once and the dense product is faster


class BitmaskMatrix:
    """A matrix [O, I] as bits uint8 [O, ceil(I / 8)] (low bit first) and its values [nnz] in row order.

    The tensors are kept as they are, not copied; what the kernel needs beside them (where each row begins) is made once.

    Raises:
        BadFile: the bits do not account for the values, or one is set past the last column.

    >>> m = BitmaskMatrix(torch.tensor([[5], [2]], dtype=torch.uint8), torch.tensor([1.0, 2.0, 3.0]), 3)
    >>> m.linear(torch.tensor([[1.0, 10.0, 100.0]])).tolist(), m.dense().tolist()
    ([[201.0, 30.0]], [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    """

    def __init__(self, bits: Tensor, values: Tensor, columns: int) -> None:
        self.bits, self.values, self.rows, self.columns = bits, values, bits.shape[0], columns
        self.start = torch.empty(0, dtype=torch.int64)
        self.fast = suits(values) and bits.is_contiguous() and bits.shape[1] == -(-columns // 8) and values.numel() > 0
        if self.fast:
            self._index()

    def _index(self) -> None:
        self.start = torch.empty(self.rows + 1, dtype=torch.int64)
        try:
            count = native().bitmask_starts(pointer(self.bits), self.bits.numel(), pointer(self.start), self.rows, self.columns)  # type: ignore[union-attr]
        except ValueError as error:
            raise BadFile("a bitmask matrix", str(error), "write the file again") from error
        if count != self.values.numel():
            raise BadFile("a bitmask matrix", f"its bits ask for {count} values and it holds {self.values.numel()}", "write the file again")

    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        if not (self.fast and usable()):
            return reference.unpack(self.bits, self.values, self.columns)
        out = torch.empty(self.rows, self.columns)
        native().bitmask_unpack(*self.arguments(), pointer(out), torch.get_num_threads())  # type: ignore[union-attr]
        return out

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O], the dense product to rounding (float32 sums in another order)."""
        return product(self, x, bias, FEW)

    kind = "bitmask"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        return pointer(self.bits), pointer(self.start), pointer(self.values), self.values.numel(), self.rows, self.columns
