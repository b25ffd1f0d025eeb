"""The operation that layers call: native where it suits, the reference elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.block import reference
from rarefy.kernels.library import native, pointer, product, suits, usable

PART = 128  # columns of a row that are counted apart: kPart of kernels.hpp
MOST = 256  # rows or columns of a block; rows of x above which a dense matrix is worth unpacking
DENSER = 0.5  # the share of stored weights from which many rows of x are multiplied by the unpacked matrix


class BlockMatrix:
    """A matrix [O, I] of R x C blocks: int32 counts [ceil(O / R)], uint16 block columns [K] ascending in a row, values [K, C, R].

    The tensors are kept as they are, not copied; where each part of a row begins is listed once.

    Raises:
        BadFile: the counts do not account for the blocks, or an index is out of place.

    >>> counts, index = torch.tensor([1, 1], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.uint16)
    >>> m = BlockMatrix(counts, index, torch.tensor([[[2.0]], [[3.0]]]), (2, 3))
    >>> m.linear(torch.tensor([[1.0, 10.0, 100.0]])).tolist(), m.dense().tolist()
    ([[200.0, 3.0]], [[0.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    """

    def __init__(self, counts: Tensor, index: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        stored, self.width, self.height = values.shape
        self.counts, self.index, self.values, (self.rows, self.columns) = counts, index, values, shape
        if index.shape != (stored,) or counts.shape != (-(-self.rows // self.height),):
            raise BadFile("a block matrix", f"{stored} blocks, {index.numel()} indices and {counts.numel()} rows do not fit {shape}", "write the file again")
        self.fast = suits(values) and index.is_contiguous() and counts.is_contiguous() and stored > 0 and max(self.height, self.width) <= MOST
        if self.fast:
            self._index()

    def _index(self) -> None:
        wide = -(-self.columns // self.width)
        parts = -(-wide // max(1, PART // self.width))
        self.start = torch.empty(self.counts.numel() * parts + 1, dtype=torch.int64)
        sizes = self.values.shape[0], pointer(self.start), self.rows, self.columns, self.height, self.width
        try:
            native().blocks_starts(pointer(self.counts), pointer(self.index), *sizes)  # type: ignore[union-attr]
        except ValueError as error:
            raise BadFile("a block matrix", str(error), "write the file again") from error

    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        if not (self.fast and usable()):
            return reference.unpack(self.counts, self.index, self.values, (self.rows, self.columns))
        out = torch.empty(self.rows, self.columns)
        native().blocks_unpack(*self.arguments(), pointer(out), torch.get_num_threads())  # type: ignore[union-attr]
        return out

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O], the dense product to rounding (float32 sums in another order)."""
        few = math.inf if self.values.numel() <= DENSER * self.rows * self.columns else MOST
        return product(self, x, bias, few)

    kind = "blocks"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes a matrix of this kind by."""
        matrix = pointer(self.index), pointer(self.start), pointer(self.values)
        return *matrix, self.values.shape[0], self.rows, self.columns, self.height, self.width
