"""Bitmask: one bit per weight, then the kept values in row order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.core.roles import Layout
from rarefy.kernels.bitmask import BitmaskMatrix
from rarefy.layouts.bits import pack_bits, unpack_bits
from rarefy.layouts.sections import aligned, join, split, up


@dataclass(frozen=True)
class Bitmask(Layout):
    """``up64(O * ceil(I / 8)) + up64(kept * itemsize)`` bytes; a negative zero is stored as a zero, NaN is kept.

    >>> w = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    >>> packed = Bitmask().pack(w)
    >>> packed[:2].tolist(), packed.numel(), Bitmask().size((2, 3), 2, torch.float32)
    ([2, 1], 128, 128)
    >>> torch.equal(Bitmask().unpack(packed, (2, 3), torch.float32), w)
    True
    """

    name = "bitmask"
    lossless = True

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return up(_mask_bytes(shape)) + up(kept * dtype.itemsize)

    def pack(self, weight: Tensor) -> Tensor:
        mask = weight != 0
        return join([pack_bits(mask), weight.detach()[mask].contiguous()])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < _mask_bytes(shape):
            raise BadFile(f"packed tensor {name}", f"it is too short for the bit mask of {shape[0]} x {shape[1]}", "write the folder again")
        wanted = self.size(shape, int(unpack_bits(_bits(packed, shape), shape[1], name).sum()), dtype)
        if packed.numel() != wanted:
            raise BadFile(f"packed tensor {name}", f"its bits ask for {wanted} bytes, it holds {packed.numel()} bytes", "write the folder again")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> BitmaskMatrix:
        bits = _bits(packed, shape)
        count = int(unpack_bits(bits, shape[1]).sum())
        values = split(packed, [_mask_bytes(shape), count * dtype.itemsize])[1]
        return BitmaskMatrix(bits, aligned(values, dtype), shape[1])


def _mask_bytes(shape: tuple[int, int]) -> int:
    return shape[0] * -(-shape[1] // 8)


def _bits(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    return packed[: _mask_bytes(shape)].view(shape[0], -1)
