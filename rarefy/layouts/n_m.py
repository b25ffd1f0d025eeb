"""n of every m columns: their values, and their positions inside the group in 1 to 3 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Layout
from rarefy.kernels.n_m import NofMMatrix
from rarefy.kernels.n_m.reference import bits_of, columns_of, pack_positions, unpack_positions
from rarefy.layouts.sections import aligned, join, split, up


@dataclass(frozen=True)
class NofM(Layout):
    """The n:m with m in `groups` that takes the fewest bytes; n is the most that a group keeps, and n and m are the file's first two bytes.

    2:4 in float32: ``(32 + 2) / 2 = 17`` bits a weight; 1:4: 8.5. A slot that a group does not need is a zero at position 0.
    Sections: n and m; positions, [O, ceil(slots / 8) bits]; values, [O, slots] with ``slots = ceil(I / m) n``.

    >>> w = torch.tensor([[0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0]])
    >>> packed = NofM().pack(w)
    >>> packed[:2].tolist(), packed[64:66].tolist()
    ([2, 4], [13, 0])
    >>> torch.equal(NofM().unpack(packed, (1, 8), torch.float32), w)
    True
    """

    groups: tuple[int, ...] = (4, 8, 2)

    name = "n_m"
    lossless = True

    def __post_init__(self) -> None:
        if not self.groups or not all(2 <= m <= 8 for m in self.groups):
            raise BadInput(f"groups of {self.groups} columns", "a group has 2 to 8 columns", "pass groups=(4,), say")

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return min(self._bytes(shape, max(1, min(kept, m)), m, dtype) for m in self.groups)

    def _bytes(self, shape: tuple[int, int], n: int, m: int, dtype: torch.dtype) -> int:
        return sum(up(size) for size in _sections(shape, n, m, dtype))

    def pack(self, weight: Tensor) -> Tensor:
        w = weight.detach()
        shape = (w.shape[0], w.shape[1])
        found = [(max(1, int(_grouped(w, m).count_nonzero(-1).max())) if w.numel() else 1, m) for m in self.groups]
        n, m = min(found, key=lambda nm: self._bytes(shape, nm[0], nm[1], w.dtype))
        groups = _grouped(w, m)
        zero = groups == 0
        chosen = zero.to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n]  # the kept ones first, in their order
        chosen = chosen.masked_fill(zero.gather(-1, chosen), 0)
        filled = torch.arange(n, device=w.device) < groups.count_nonzero(-1)[..., None]
        values = torch.where(filled, groups.gather(-1, chosen), 0).flatten(1)
        head = torch.tensor([n, m], dtype=torch.uint8, device=w.device)
        return join([head, pack_positions(chosen.flatten(1), bits_of(m)), values.contiguous()])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < 2:
            raise _broken(name, "it is not one-dimensional bytes with n and m at their head")
        n, m = packed[:2].tolist()
        if not (2 <= m <= 8 and 1 <= n <= m):
            raise _broken(name, f"n of m asks for 1 <= n <= m and m in 2 .. 8, it says {n} of {m}")
        wanted = self._bytes(shape, n, m, dtype)
        if packed.numel() != wanted:
            raise _broken(name, f"{n} of {m} of {shape[0]} x {shape[1]} asks for {wanted} bytes, it holds {packed.numel()} bytes")
        positions, slots = self._positions(packed, shape, n, m, dtype), -(-shape[1] // m) * n
        if bool((unpack_positions(positions, slots, bits_of(m)) >= m).any()) or bool((columns_of(positions, slots, n, m) >= shape[1]).any()):
            raise _broken(name, "a position is outside its group, or past the last column")

    def _positions(self, packed: Tensor, shape: tuple[int, int], n: int, m: int, dtype: torch.dtype) -> Tensor:
        return split(packed, _sections(shape, n, m, dtype))[1].view(shape[0], -1)

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> NofMMatrix:
        n, m = packed[:2].tolist()
        values = split(packed, _sections(shape, n, m, dtype))[2]
        return NofMMatrix(aligned(values, dtype).view(shape[0], -1), self._positions(packed, shape, n, m, dtype), n, m, shape[1])


def _sections(shape: tuple[int, int], n: int, m: int, dtype: torch.dtype) -> list[int]:
    slots = -(-shape[1] // m) * n
    return [2, shape[0] * -(-slots // 8) * bits_of(m), shape[0] * slots * dtype.itemsize]


def _grouped(w: Tensor, m: int) -> Tensor:
    """[O, I] -> [O, G, m], zeros past the last column."""
    return F.pad(w, (0, -w.shape[1] % m)).unflatten(1, (-1, m))


def _broken(name: str, rule: str) -> BadFile:
    return BadFile(f"packed tensor {name}", rule, "write the folder again")
