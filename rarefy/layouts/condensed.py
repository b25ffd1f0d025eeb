"""The same number of weights in every row that has any, as sparse training with a constant fan-in leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Layout
from rarefy.kernels.block import BlockMatrix
from rarefy.layouts.bits import pack_bits, unpack_bits
from rarefy.layouts.sections import aligned, join, split, up

WIDE = 2**16  # columns that 16-bit indices tell apart


@dataclass(frozen=True)
class Condensed(Layout):
    """K columns and K values a row that is not all zero: ``48 K`` bits in float32. K is the most that a row keeps; others store zeros too.

    Sections: K (int32); one bit a row; columns uint16 [rows kept, K], ascending; values [rows kept, K]. Computed with as sparse rows.
    Source: constant fan-in with ablated neurons and its condensed form, SRigL, arXiv 2305.02299. There indices have 32 bits.

    Raises:
        BadInput: more than 65536 columns.

    >>> w = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    >>> packed = Condensed().pack(w)
    >>> packed[:4].view(torch.int32).item(), packed[64].item(), packed[128:132].view(torch.int16).tolist()
    (1, 5, [1, 0])
    >>> torch.equal(Condensed().unpack(packed, (3, 3), torch.float32), w)
    True
    """

    name = "condensed"
    lossless = True

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return sum(up(n) for n in _sections(shape, min(kept, shape[0]), min(kept, shape[1]), dtype))

    def pack(self, weight: Tensor) -> Tensor:
        if weight.shape[1] > WIDE:
            raise BadInput(f"a weight of {weight.shape[0]} x {weight.shape[1]}", f"layout {self.name} counts at most {WIDE} columns", "store it as bitmask")
        rows = (weight.detach() != 0).any(1)
        w = weight.detach()[rows]
        fan_in = int(w.count_nonzero(1).max()) if w.numel() else 0
        kept_first = (w == 0).to(torch.uint8).sort(dim=1, stable=True).indices
        column = kept_first[:, :fan_in].sort(1).values
        head = torch.tensor([fan_in], dtype=torch.int32, device=w.device)
        return join([head, pack_bits(rows[None]), column.to(torch.int32).to(torch.uint16), (w.gather(1, column) + 0.0).contiguous()])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < sum(up(n) for n in _sections(shape, 0, 0, dtype)):
            raise _broken(name, f"it is too short for the bits of {shape[0]} rows")
        fan_in = _fan_in(packed)
        if shape[1] > WIDE:
            raise _broken(name, f"at most {WIDE} columns are counted, the plan says {shape[1]}")
        if not 0 <= fan_in <= shape[1]:
            raise _broken(name, f"{fan_in} weights a row of {shape[1]} columns")
        rows = int(_rows(packed, shape, name).sum())
        wanted = sum(up(n) for n in _sections(shape, rows, fan_in, dtype))
        if packed.numel() != wanted:
            raise _broken(name, f"{rows} rows of {fan_in} weights ask for {wanted} bytes, it holds {packed.numel()} bytes")
        column = aligned(split(packed, _sections(shape, rows, fan_in, dtype))[2], torch.uint16).to(torch.int32).view(rows, fan_in)
        if bool((column >= shape[1]).any()) or bool((column[:, 1:] <= column[:, :-1]).any()):
            raise _broken(name, "the columns of a row do not ascend, or one is past the last")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> BlockMatrix:
        fan_in, rows = _fan_in(packed), _rows(packed, shape, self.name)
        _, _, column, values = split(packed, _sections(shape, int(rows.sum()), fan_in, dtype))
        return BlockMatrix(rows.to(torch.int32) * fan_in, aligned(column, torch.uint16), aligned(values, dtype).view(-1, 1, 1), shape)


def _fan_in(packed: Tensor) -> int:
    return int(aligned(packed[:4], torch.int32))


def _rows(packed: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    return unpack_bits(split(packed, _sections(shape, 0, 0, torch.uint8))[1][None], shape[0], name)[0]


def _sections(shape: tuple[int, int], rows: int, fan_in: int, dtype: torch.dtype) -> list[int]:
    return [4, -(-shape[0] // 8), 2 * rows * fan_in, rows * fan_in * dtype.itemsize]


def _broken(name: str, rule: str) -> BadFile:
    return BadFile(f"packed tensor {name}", rule, "write the folder again")
