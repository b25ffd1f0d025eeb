"""Columns: every value, one column after the other, for a matrix whose inputs are often exactly zero."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.roles import Layout
from rarefy.kernels.columns import ColumnsMatrix
from rarefy.layouts.flat import Flat
from rarefy.layouts.sections import aligned


class ByColumns(Layout):
    """A layout whose matrices do not read a column that meets a zero. `rows` names the layout that holds the same values by rows."""

    rows: ClassVar[str]

    @abstractmethod
    def turn(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The bytes that hold, by columns, every value of bytes in the layout `rows`."""


@dataclass(frozen=True)
class Columns(ByColumns):
    """``up64(O * I * itemsize)`` bytes, whatever is zero: the layout `flat` of the transposed matrix [I, O].

    It is what a gate before the matrix makes faster: a column that meets a zero is not read.

    >>> Columns().pack(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[:16].view(torch.float32).tolist()
    [1.0, 3.0, 2.0, 4.0]
    """

    name = "columns"
    rows = Flat.name
    lossless = True

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return Flat().size(shape, kept, dtype)

    def pack(self, weight: Tensor) -> Tensor:
        return Flat().pack(weight.t())

    def turn(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.pack(Flat().unpack(packed, shape, dtype))

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        Flat().check(packed, shape, dtype, name)

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> ColumnsMatrix:
        return ColumnsMatrix(aligned(packed[: shape[0] * shape[1] * dtype.itemsize], dtype).view(shape[1], shape[0]))
