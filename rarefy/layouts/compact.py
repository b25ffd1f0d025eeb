"""Whole rows and columns removed; what is left is dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.core.roles import Layout
from rarefy.kernels.compact import CompactMatrix
from rarefy.layouts.bits import pack_bits, unpack_bits
from rarefy.layouts.sections import aligned, join, split, up


@dataclass(frozen=True)
class Compact(Layout):
    """Sections: one bit a row, one bit a column, and the values [rows kept, columns kept] of those that are not all zero.

    >>> w = torch.tensor([[0.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    >>> packed = Compact().pack(w)
    >>> packed[0].item(), packed[64].item(), packed[128:136].view(torch.float32).tolist()
    (1, 6, [2.0, 3.0])
    >>> torch.equal(Compact().unpack(packed, (2, 3), torch.float32), w)
    True
    """

    name = "compact"
    lossless = True

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return sum(up(n) for n in _sections(shape, min(kept, shape[0]), min(kept, shape[1]), dtype))

    def pack(self, weight: Tensor) -> Tensor:
        kept = weight.detach() != 0
        rows, columns = kept.any(1), kept.any(0)
        return join([pack_bits(rows[None]), pack_bits(columns[None]), weight.detach()[rows][:, columns].contiguous()])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < sum(up(n) for n in _sections(shape, 0, 0, dtype)):
            raise BadFile(f"packed tensor {name}", f"it is too short for the bits of {shape[0]} rows and {shape[1]} columns", "write the folder again")
        rows, columns = _masks(packed, shape, name)
        wanted = sum(up(n) for n in _sections(shape, int(rows.sum()), int(columns.sum()), dtype))
        if packed.numel() != wanted:
            raise BadFile(f"packed tensor {name}", f"its bits ask for {wanted} bytes, it holds {packed.numel()} bytes", "write the folder again")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> CompactMatrix:
        rows, columns = _masks(packed, shape, self.name)
        kept = int(rows.sum()), int(columns.sum())
        values = split(packed, _sections(shape, *kept, dtype))[2]
        return CompactMatrix(rows, columns, aligned(values, dtype).view(kept))


def _sections(shape: tuple[int, int], rows: int, columns: int, dtype: torch.dtype) -> list[int]:
    return [-(-shape[0] // 8), -(-shape[1] // 8), rows * columns * dtype.itemsize]


def _masks(packed: Tensor, shape: tuple[int, int], name: str) -> tuple[Tensor, Tensor]:
    bits = split(packed, _sections(shape, 0, 0, torch.uint8))
    return unpack_bits(bits[0][None], shape[0], name)[0], unpack_bits(bits[1][None], shape[1], name)[0]
