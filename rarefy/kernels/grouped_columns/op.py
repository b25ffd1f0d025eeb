"""The operation that layers call: native where it suits, the dense product elsewhere."""

from __future__ import annotations

from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.bitmask.reference import mask_of
from rarefy.kernels.grouped import GroupedMatrix
from rarefy.kernels.grouped.reference import GROUP
from rarefy.kernels.grouped.reference import codes_of as codes_by_rows
from rarefy.kernels.grouped_columns import reference
from rarefy.kernels.grouped_columns.reference import HEIGHT, strips
from rarefy.kernels.library import native, pointer, product

FEW = 16  # rows of x up to which the kernel multiplies, one after the other; above, the weights are unpacked once and the dense product is faster


class GroupedColumnsMatrix:
    """A matrix [O, I] by columns: codes uint8 [G, strips * 1024] (`reference.columns_of`); scale and zero float16 [G, strips * height].

    Raises:
        BadFile: codes, scales and zeros are not those of one matrix.

    >>> import torch
    >>> first = torch.tensor([[1]], dtype=torch.uint8)
    >>> by_rows = GroupedMatrix(torch.full((1, 32), 129, dtype=torch.uint8), torch.tensor([0.5]).half(), None, first, 3, 8)
    >>> m = GroupedColumnsMatrix.of(by_rows)
    >>> m.linear(torch.tensor([[127.0, 0.0, 1.0]])).tolist(), m.dense().tolist()
    ([[64.0]], [[0.5, 0.5, 0.5]])
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, int], bits: int) -> None:
        groups, high = -(-shape[1] // GROUP), strips(shape[0], bits)
        scales = (groups, high * HEIGHT[bits])
        if codes.shape != (groups, high * GROUP * 32) or scale.shape != scales or (zero is not None and zero.shape != scales):
            raise BadFile(f"{shape[0]} x {shape[1]} by columns", f"it takes {groups} groups of {high} strips, not codes of {tuple(codes.shape)}", "write the file again")
        self.codes, self.scale, self.zero, self.bits = codes, scale, zero, bits
        self.rows, self.columns = shape
        self.fast = native() is not None and codes.device.type == "cpu" and all(t.is_contiguous() for t in (codes, scale))

    @staticmethod
    def of(matrix: GroupedMatrix) -> GroupedColumnsMatrix:
        """The same values, bit for bit; a group that is not stored has scale 0."""
        present = mask_of(matrix.present, -(-matrix.columns // GROUP))
        high = strips(matrix.rows, matrix.bits) * HEIGHT[matrix.bits]
        codes = matrix.codes.new_zeros(high, present.shape[1], GROUP)
        codes[: matrix.rows][present] = codes_by_rows(matrix.codes, matrix.bits)
        turned = [None if t is None else _turned(t, present, high) for t in (matrix.scale, matrix.zero)]
        assert turned[0] is not None
        return GroupedColumnsMatrix(reference.columns_of(codes.flatten(1), matrix.bits), turned[0], turned[1], (matrix.rows, matrix.columns), matrix.bits)

    def dense(self) -> Tensor:
        """The matrix [O, I] as float32."""
        return reference.unpack(self.codes, self.scale, self.zero, (self.rows, self.columns), self.bits)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O].

        Few rows of x are rounded to 8 bits as by `GroupedMatrix`; columns whose code of x is 0 are not read, row of x by row.
        """
        return product(self, x, bias, FEW)

    kind = "grouped_columns"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        scales = (pointer(self.scale), pointer(self.zero), self.scale.numel())
        return pointer(self.codes), self.codes.numel(), *scales, self.rows, self.columns, self.bits


def _turned(figures: Tensor, present: Tensor, high: int) -> Tensor:
    """Scales or zeros [stored] in row order, to [G, high]."""
    out = figures.new_zeros(high, present.shape[1])
    out[: present.shape[0]][present] = figures
    return out.t().contiguous()
