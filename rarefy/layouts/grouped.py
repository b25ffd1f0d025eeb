"""int8 and int4 in groups of 32 input columns; a group that is all zero is not stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Layout
from rarefy.kernels.grouped import GroupedMatrix
from rarefy.kernels.grouped.reference import GROUP
from rarefy.layouts.bits import pack_bits, unpack_bits
from rarefy.layouts.sections import aligned, join, split, up

HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Grouped(Layout):
    """``w = scale * code + zero``, nearly, with a float16 scale, and zero if `asymmetric`, to each group of 32 columns of a row.

    Symmetric: ``zero = -2^(bits - 1) scale``, so that a zero stays exactly zero; the scale maps the entry that is largest in
    magnitude, with its sign, to code 0 (4 bits), or to 127 above the middle (8 bits). Asymmetric: the smallest entry is
    code 0 and the largest the last one; zeros inside a stored group come back as zeros only where a code meets them.
    A group whose 32 entries are zero is not stored and is exactly zero.

    Sections: one bit a group, [O, ceil(G / 8)]; scales; zeros; codes, 4-bit ones two in a byte (columns 0 to 15 low, 16 to 31 high).

    Raises:
        BadInput: NaN, inf, or a magnitude that float16 scales cannot hold.

    >>> w = torch.tensor([[-8.0, 7.0, 1.0, 0.0]])
    >>> Int4().unpack(Int4().pack(w), (1, 4), torch.float32).tolist()
    [[-8.0, 7.0, 1.0, 0.0]]
    >>> Int4().size((1, 64), 64, torch.float32) == 64 + 64 + 64  # bits, scales, codes
    True
    """

    bits: ClassVar[int]
    asymmetric: ClassVar[bool] = False
    lossless = False

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        groups = min(kept, shape[0] * -(-shape[1] // GROUP))
        return up(_mask_bytes(shape)) + sum(up(n) for n in self._sizes(groups))

    def _sizes(self, stored: int) -> list[int]:
        return [2 * stored, *([2 * stored] if self.asymmetric else []), stored * GROUP * self.bits // 8]

    def pack(self, weight: Tensor) -> Tensor:
        w = weight.detach().float()
        if not torch.isfinite(w).all() or (w.numel() and float(w.abs().max()) > HALF):
            raise BadInput(f"a weight of {tuple(w.shape)} with NaN, inf or entries above {HALF:.0f}", f"layout {self.name} keeps float16 scales", "store it as bitmask")
        groups = F.pad(w, (0, -w.shape[1] % GROUP)).view(w.shape[0], -(-w.shape[1] // GROUP), GROUP)
        present = (groups != 0).any(-1)
        scale, zero = self._scales(groups[present])
        codes = self._codes(groups[present], scale, zero)
        stored = codes if self.bits == 8 else codes[:, :16] | (codes[:, 16:] << 4)
        return join([pack_bits(present), scale, *([] if zero is None else [zero]), stored.contiguous()])

    def _scales(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.asymmetric:
            low, high = groups.amin(-1), groups.amax(-1)
            return ((high - low) / (2**self.bits - 1)).half(), low.half()
        extreme = groups.gather(1, groups.abs().argmax(-1, keepdim=True)).squeeze(1)
        return (extreme / -(2 ** (self.bits - 1)) if self.bits == 4 else extreme.abs() / 127).half(), None

    def _codes(self, groups: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        step = scale.float()[:, None]
        offset = -step * 2 ** (self.bits - 1) if zero is None else zero.float()[:, None]
        codes = torch.where(step == 0, 0.0 if self.asymmetric else 2.0 ** (self.bits - 1), (groups - offset) / torch.where(step == 0, 1.0, step))
        return codes.round().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < _mask_bytes(shape):
            raise BadFile(f"packed tensor {name}", f"it is too short for the groups of {shape[0]} x {shape[1]}", "write the folder again")
        present = self._present(packed, shape, name)
        sizes = self._sizes(int(present.sum()))
        wanted = up(_mask_bytes(shape)) + sum(up(n) for n in sizes)
        if packed.numel() != wanted:
            raise BadFile(f"packed tensor {name}", f"its bits ask for {wanted} bytes, it holds {packed.numel()} bytes", "write the folder again")
        for part in split(packed, [_mask_bytes(shape), *sizes])[1:-1]:
            if not torch.isfinite(aligned(part, torch.float16)).all():
                raise BadFile(f"packed tensor {name}", "a scale is NaN or inf", "write the folder again")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> GroupedMatrix:
        stored = int(self._present(packed, shape, self.name).sum())
        _, scale, *zero, codes = split(packed, [_mask_bytes(shape), *self._sizes(stored)])
        return GroupedMatrix(
            codes.view(stored, -1) if stored else codes.view(0, GROUP * self.bits // 8),
            aligned(scale, torch.float16),
            aligned(zero[0], torch.float16) if zero else None,
            _bits(packed, shape),
            shape[1],
            self.bits,
        )

    def _present(self, packed: Tensor, shape: tuple[int, int], name: str) -> Tensor:
        return unpack_bits(_bits(packed, shape), -(-shape[1] // GROUP), name)


def _mask_bytes(shape: tuple[int, int]) -> int:
    groups = -(-shape[1] // GROUP)
    return shape[0] * -(-groups // 8)


def _bits(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    return packed[: _mask_bytes(shape)].view(shape[0], -1)


@dataclass(frozen=True)
class Int8(Grouped):
    """8 bits, symmetric: 8.5 bits a stored weight."""

    name = "int8"
    bits = 8


class Int4(Grouped):
    """4 bits, symmetric: 4.5 bits a stored weight."""

    name = "int4"
    bits = 4


class Int4Asymmetric(Grouped):
    """4 bits with a zero to each group: 5 bits a stored weight; what a Q4_1 file holds comes back exactly."""

    name = "int4-asymmetric"
    bits = 4
    asymmetric = True
