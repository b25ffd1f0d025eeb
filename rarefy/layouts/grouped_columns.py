"""int8 and int4 in groups of 32 input columns, one column after the other, for a matrix whose inputs are often exactly zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.kernels.grouped.reference import GROUP
from rarefy.kernels.grouped_columns import GroupedColumnsMatrix
from rarefy.kernels.grouped_columns.reference import HEIGHT, strips
from rarefy.layouts.columns import ByColumns
from rarefy.layouts.grouped import Grouped, Int4, Int4Asymmetric, Int8
from rarefy.layouts.sections import aligned, join, split, up


@dataclass(frozen=True)
class GroupedByColumns(ByColumns):
    """The values of `int8`, `int4` or `int4-asymmetric`, bit for bit, so stored that a column that meets a zero is not read.

    Rows are cut into strips of 64 (4 bits) or 32 (8 bits), the last one filled up, which are 32 bytes a column. Every group of 32 columns is stored.

    Sections: scales [G, strips * height] float16, all rows of one group of columns after the other; zeros likewise; codes [G, strips * 1024], as
    `rarefy.kernels.grouped_columns.reference.columns_of` lays them.

    Raises:
        BadInput: as the layout by rows.

    >>> w = torch.tensor([[-8.0, 7.0, 1.0, 0.0]])
    >>> Int4Columns().unpack(Int4Columns().pack(w), (1, 4), torch.float32).tolist()
    [[-8.0, 7.0, 1.0, 0.0]]
    >>> Int4Columns().size((64, 64), 0, torch.float32) == 2 * 64 * 2 + 64 * 32  # scales, codes
    True
    """

    of: ClassVar[Grouped]
    lossless = False

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return sum(up(n) for n in self._sizes(shape))

    def _sizes(self, shape: tuple[int, int]) -> list[int]:
        high = strips(shape[0], self.of.bits)
        groups = -(-shape[1] // GROUP)
        scales = 2 * groups * high * HEIGHT[self.of.bits]
        return [scales, *([scales] if self.of.asymmetric else []), groups * high * GROUP * 32]

    def pack(self, weight: Tensor) -> Tensor:
        return self.turn(self.of.pack(weight), (weight.shape[0], weight.shape[1]), weight.dtype)

    def turn(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        found = GroupedColumnsMatrix.of(self.of.matrix(packed, shape, dtype))
        return join([found.scale, *([] if found.zero is None else [found.zero]), found.codes])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        wanted = self.size(shape, 0, dtype)
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != wanted:
            raise BadFile(f"packed tensor {name}", f"{self.name} of {shape[0]} x {shape[1]} takes {wanted} bytes, it holds {packed.numel()}", "write the folder again")
        for part in split(packed, self._sizes(shape))[:-1]:
            if not torch.isfinite(aligned(part, torch.float16)).all():
                raise BadFile(f"packed tensor {name}", "a scale is NaN or inf", "write the folder again")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> GroupedColumnsMatrix:
        scale, *zero, codes = split(packed, self._sizes(shape))
        high = strips(shape[0], self.of.bits)
        figures = [aligned(part, torch.float16).view(-1, high * HEIGHT[self.of.bits]) for part in (scale, *zero)]
        return GroupedColumnsMatrix(codes.view(-1, high * GROUP * 32), figures[0], figures[1] if zero else None, shape, self.of.bits)


@dataclass(frozen=True)
class Int8Columns(GroupedByColumns):
    """`int8`, by columns."""

    name = "int8-columns"
    rows = "int8"
    of = Int8()


@dataclass(frozen=True)
class Int4Columns(GroupedByColumns):
    """`int4`, by columns."""

    name = "int4-columns"
    rows = "int4"
    of = Int4()


@dataclass(frozen=True)
class Int4AsymmetricColumns(GroupedByColumns):
    """`int4-asymmetric`, by columns."""

    name = "int4-asymmetric-columns"
    rows = "int4-asymmetric"
    of = Int4Asymmetric()
