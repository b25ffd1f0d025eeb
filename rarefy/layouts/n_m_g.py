"""n of every m columns, each pattern of n in m exactly g times in a group of rows, in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Layout
from rarefy.kernels.n_m_g import NofMofGMatrix
from rarefy.kernels.n_m_g.assign import assign, kept, kinds, tally
from rarefy.kernels.n_m_g.reference import patterns
from rarefy.layouts.registry import STEN
from rarefy.layouts.sections import aligned, join, split, up

MOST = 2**16  # rows of a group

Form = tuple[int, int, int]  # n, m, g


@dataclass(frozen=True)
class NofMofG(Layout):
    """The n:m:g with m in `groups` and g in `repeats` that holds the matrix in the fewest bytes; n = m holds any.

    Sections: n, m and g (two bytes, one byte each for n and m, two for g); the row of each slot inside its group of
    R = C(m, n) g rows, [G, K, R], a byte where R <= 256 and two elsewhere; values [G, K, R, n]. Slots lie by pattern, in
    the order of `rarefy.kernels.n_m_g.reference.patterns`, so that columns are not stored.

    >>> w = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    >>> packed = NofMofG(groups=(2,)).pack(w)
    >>> packed[:3].tolist(), packed[64:66].tolist(), packed[128:136].view(torch.float32).tolist()
    ([1, 2, 1], [1, 0], [2.0, 3.0])
    >>> torch.equal(NofMofG().unpack(packed, (2, 2), torch.float32), w)
    True
    """

    groups: tuple[int, ...] = (4, 8, 2)
    repeats: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

    name = "n_m_g"
    paper = STEN
    lossless = True

    def __post_init__(self) -> None:
        if not self.groups or not self.repeats or not all(2 <= m <= 8 for m in self.groups) or not all(1 <= g <= MOST for g in self.repeats):
            raise BadInput(f"chunks of {self.groups} columns, patterns {self.repeats} times", "a chunk has 2 to 8 columns, a pattern comes at least once", "pass groups=(4,), say")

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return min(_bytes(shape, (m, m, 1), dtype) for m in self.groups)

    def pack(self, weight: Tensor) -> Tensor:
        w = weight.detach()
        form, chosen = self._found(w)
        n, m, g = form
        size = math.comb(m, n) * g
        by_row = F.pad(_chunks(w, m), (0, 0, 0, 0, 0, -w.shape[0] % size)).unflatten(0, (-1, size)).transpose(1, 2)  # [G, K, R, m]
        index = _filled(chosen, size, g).argsort(dim=-1, stable=True)  # the row of each slot
        columns = torch.tensor(patterns(n, m), device=w.device).repeat_interleave(g, 0)
        values = by_row.gather(2, index[..., None].expand_as(by_row)).gather(3, columns.expand(*index.shape, n))
        head = torch.tensor([n, m, g % 256, g // 256], dtype=torch.uint8, device=w.device)
        return join([head, index.to(torch.int32).to(_index_type(size)), values.contiguous()])

    def _found(self, w: Tensor) -> tuple[Form, Tensor]:
        """The form of the fewest bytes that holds the matrix, and each row's pattern in each chunk."""
        shape = (w.shape[0], w.shape[1])
        best = min(((m, m, 1) for m in self.groups), key=lambda form: _bytes(shape, form, w.dtype))
        chosen = w.new_zeros(shape[0], -(-shape[1] // best[1]), dtype=torch.long)
        for m in self.groups:
            present = _chunks(w, m) != 0
            for form, found in self._forms(present):
                if (_bytes(shape, form, w.dtype), form[0]) < (_bytes(shape, best, w.dtype), best[0]):
                    held = _held(present, form, found)
                    best, chosen = (best, chosen) if held is None else (form, held)
        return best, chosen

    def _forms(self, present: Tensor) -> Iterator[tuple[Form, Tensor]]:
        """Those with n < m that may hold [O, K, m], and its `kinds`: n is the most that a chunk keeps, and half the slots would be used."""
        counts, m = present.sum(-1), present.shape[2]
        n = max(1, int(counts.max())) if counts.numel() else 1
        if n < m and 2 * int(counts.sum()) >= n * counts.numel():
            found = kinds(present, n)
            yield from (((n, m, g), found) for g in self.repeats if math.comb(m, n) * g <= MOST)

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < 64:
            raise _broken(name, "it is not one-dimensional bytes with n, m and g at their head")
        n, m, g = form = _form(packed)
        if not (2 <= m <= 8 and 1 <= n <= m and g >= 1 and math.comb(m, n) * g <= MOST):
            raise _broken(name, f"n:m:g asks for 1 <= n <= m, m in 2 .. 8 and groups of at most {MOST} rows, it says {n}:{m}:{g}")
        wanted = _bytes(shape, form, dtype)
        if packed.numel() != wanted:
            raise _broken(name, f"{n}:{m}:{g} of {shape[0]} x {shape[1]} asks for {wanted} bytes, it holds {packed.numel()} bytes")
        index = _index(packed, shape, form, dtype).to(torch.int32)
        if not bool((index.sort(dim=-1).values == torch.arange(index.shape[-1], device=index.device)).all()):
            raise _broken(name, "the slots of a group do not hold each of its rows once")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> NofMofGMatrix:
        n, m, g = form = _form(packed)
        index = _index(packed, shape, form, dtype)
        values = aligned(split(packed, _sections(shape, form, dtype))[2], dtype)
        return NofMofGMatrix(values.view(*index.shape, n), index, n, m, g, shape)


def _held(present: Tensor, form: Form, found: Tensor) -> Tensor | None:
    """Each row's pattern in each chunk of [O, K, m], or None where none is found that covers what is there."""
    n, m, g = form
    if bool((tally(found, math.comb(m, n), g) > g).any()):
        return None
    chosen = found if bool((found >= 0).all()) else assign(present.double(), n, g)
    return None if bool((present & ~kept(present, chosen, n)).any()) else chosen


def _filled(chosen: Tensor, size: int, g: int) -> Tensor:
    """[O, K] -> [G, K, R]: the rows past the last one take the patterns that are left."""
    rows, chunks = chosen.shape
    missing = -rows % size
    if missing:
        last = chosen[rows - (rows % size) :]
        counts = torch.stack([(last == kind).sum(0) for kind in range(size // g)], -1)  # [K, C]
        left = torch.stack([torch.repeat_interleave(torch.arange(size // g, device=chosen.device), g - each) for each in counts], -1)
        chosen = torch.cat([chosen, left.view(missing, chunks)])
    return chosen.unflatten(0, (-1, size)).transpose(1, 2)


def _chunks(w: Tensor, m: int) -> Tensor:
    """[O, I] -> [O, K, m], zeros past the last column."""
    return F.pad(w, (0, -w.shape[1] % m)).unflatten(1, (-1, m))


def _form(packed: Tensor) -> Form:
    n, m, low, high = packed[:4].tolist()
    return n, m, low + 256 * high


def _index_type(size: int) -> torch.dtype:
    return torch.uint8 if size <= 256 else torch.uint16


def _index(packed: Tensor, shape: tuple[int, int], form: Form, dtype: torch.dtype) -> Tensor:
    n, m, g = form
    size = math.comb(m, n) * g
    return aligned(split(packed, _sections(shape, form, dtype))[1], _index_type(size)).view(-(-shape[0] // size), -(-shape[1] // m), size)


def _sections(shape: tuple[int, int], form: Form, dtype: torch.dtype) -> list[int]:
    n, m, g = form
    size = math.comb(m, n) * g
    slots = -(-shape[0] // size) * size * -(-shape[1] // m)
    return [4, slots * _index_type(size).itemsize, slots * n * dtype.itemsize]


def _bytes(shape: tuple[int, int], form: Form, dtype: torch.dtype) -> int:
    return sum(up(section) for section in _sections(shape, form, dtype))


def _broken(name: str, rule: str) -> BadFile:
    return BadFile(f"packed tensor {name}", rule, "write the folder again")
