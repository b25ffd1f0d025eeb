"""The operation that layers call: native where it suits, the reference elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.library import native, pointer, product, suits, usable
from rarefy.kernels.n_m import reference

FEW = 16  # rows of x up to which the kernel multiplies; above, it unpacks once and the dense product is faster


class NofMMatrix:
    """A matrix [O, I] with n slots for every m columns: values [O, ceil(I / m) n], positions uint8 [O, ceil(slots / 8) bits].

    The tensors are kept as they are, not copied.

    Raises:
        BadFile: the sizes do not fit, or a position is outside its group or past the last column.

    >>> positions = reference.pack_positions(torch.tensor([[3, 0]]), 2)
    >>> m = NofMMatrix(torch.tensor([[2.0, 5.0]]), positions, 1, 4, 6)
    >>> m.dense().tolist(), m.linear(torch.tensor([[0.0, 0.0, 0.0, 1.0, 10.0, 0.0]])).tolist()
    ([[0.0, 0.0, 0.0, 2.0, 5.0, 0.0]], [[52.0]])
    """

    def __init__(self, values: Tensor, positions: Tensor, n: int, m: int, columns: int) -> None:
        self.values, self.positions, self.n, self.m = values, positions, n, m
        self.rows, self.columns = values.shape[0], columns
        slots = -(-columns // m) * n
        if values.shape[1] != slots or positions.shape != (self.rows, -(-slots // 8) * reference.bits_of(m)):
            raise BadFile(f"a {n}:{m} matrix of {columns} columns", f"it holds values {tuple(values.shape)}, positions {tuple(positions.shape)}", "write the file again")
        self.fast = suits(values) and positions.is_contiguous() and values.numel() > 0 and 2 <= m <= 8
        if self.fast:
            self._check()

    def _check(self) -> None:
        try:
            native().n_of_m_check(pointer(self.positions), self.positions.numel(), self.rows, self.columns, self.n, self.m)  # type: ignore[union-attr]
        except ValueError as error:
            raise BadFile("an n:m matrix", str(error), "write the file again") from error

    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        if not (self.fast and usable()):
            return reference.unpack(self.values, self.positions, self.n, self.m, self.columns)
        out = torch.empty(self.rows, self.columns)
        native().n_of_m_unpack(*self.arguments(), pointer(out), torch.get_num_threads())  # type: ignore[union-attr]
        return out

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O], the dense product to rounding (float32 sums in another order)."""
        return product(self, x, bias, FEW)

    kind = "n_of_m"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        return pointer(self.values), pointer(self.positions), self.rows, self.columns, self.n, self.m
