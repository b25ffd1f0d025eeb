"""Blocks that are not all zero, and compressed sparse rows, which are 1 x 1 blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.roles import Layout
from rarefy.kernels.block import BlockMatrix
from rarefy.layouts.sections import aligned, join, split, up

WIDE = 2**16  # blocks beside each other that 16-bit indices tell apart
MOST = 256  # rows or columns of a block

Size = tuple[int, int]  # rows and columns of a block


@dataclass(frozen=True)
class _Blocks(Layout):
    """Sections: a head, blocks a row of blocks (int32), block columns (uint16, ascending in a row), values [K, C, R]."""

    lossless = True

    @abstractmethod
    def _sizes(self) -> tuple[Size, ...]:
        """The blocks that a matrix may be cut into."""

    @abstractmethod
    def _head(self, size: Size) -> Tensor:
        """What the file says about the size: uint8."""

    @abstractmethod
    def _size_of(self, packed: Tensor) -> Size:
        """The size that the file says; (0, 0) where it says none."""

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return min(self._bytes(shape, size, min(kept, _high(shape, size) * _wide(shape, size)), dtype) for size in self._sizes())

    def _bytes(self, shape: tuple[int, int], size: Size, stored: int, dtype: torch.dtype) -> int:
        return sum(up(n) for n in self._sections(shape, size, stored, dtype))

    def _sections(self, shape: tuple[int, int], size: Size, stored: int, dtype: torch.dtype) -> list[int]:
        return [self._head(size).numel(), 4 * _high(shape, size), 2 * stored, stored * size[0] * size[1] * dtype.itemsize]

    def pack(self, weight: Tensor) -> Tensor:
        w = weight.detach()
        shape = (w.shape[0], w.shape[1])
        fitting = [size for size in self._sizes() if _wide(shape, size) <= WIDE]
        if not fitting:
            raise BadInput(f"a weight of {shape[0]} x {shape[1]}", f"layout {self.name} counts at most {WIDE} blocks beside each other", "store it as bitmask")
        size = min(fitting, key=lambda size: self._bytes(shape, size, int(_present(w, size).sum()), w.dtype))
        present = _present(w, size)
        values = _blocks(w, size)[present]
        return join([self._head(size), present.sum(1, dtype=torch.int32), present.nonzero()[:, 1].to(torch.int32).to(torch.uint16), values.contiguous()])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() % 64 or packed.numel() < 64:
            raise _broken(name, "it is not one-dimensional bytes in sections of 64")
        size = self._size_of(packed)
        if not all(1 <= side <= MOST for side in size):
            raise _broken(name, f"blocks have 1 to {MOST} rows and columns, it says {size[0]} x {size[1]}")
        if _wide(shape, size) > WIDE or packed.numel() < self._bytes(shape, size, 0, dtype):
            raise _broken(name, f"it is too short for the rows of {shape[0]} x {shape[1]} in blocks of {size[0]} x {size[1]}")
        counts = self._counts(packed, shape, size)
        if bool((counts < 0).any()) or bool((counts > _wide(shape, size)).any()):
            raise _broken(name, "a row of blocks holds more of them than there are columns of blocks")
        stored = int(counts.sum())
        wanted = self._bytes(shape, size, stored, dtype)
        if packed.numel() != wanted:
            raise _broken(name, f"its rows ask for {wanted} bytes, it holds {packed.numel()} bytes")
        index = aligned(split(packed, self._sections(shape, size, stored, dtype))[2], torch.uint16).to(torch.int32)
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts.long())
        if bool((index >= _wide(shape, size)).any()) or bool(((index[1:] <= index[:-1]) & (row[1:] == row[:-1])).any()):
            raise _broken(name, "the indices of a row do not ascend, or one is past the last column")
        values = aligned(split(packed, self._sections(shape, size, stored, dtype))[3], dtype).view(-1, size[1], size[0])
        below, beyond = values[row == counts.numel() - 1][:, :, shape[0] - (counts.numel() - 1) * size[0] :], values[index == _wide(shape, size) - 1]
        if bool((below != 0).any()) or bool((beyond[:, shape[1] - (_wide(shape, size) - 1) * size[1] :] != 0).any()):
            raise _broken(name, "a block holds a value past the last row or column")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> BlockMatrix:
        size = self._size_of(packed)
        counts = self._counts(packed, shape, size)
        _, _, index, values = split(packed, self._sections(shape, size, int(counts.sum()), dtype))
        return BlockMatrix(counts, aligned(index, torch.uint16), aligned(values, dtype).view(-1, size[1], size[0]), shape)

    def _counts(self, packed: Tensor, shape: tuple[int, int], size: Size) -> Tensor:
        return aligned(split(packed, self._sections(shape, size, 0, torch.uint8))[1], torch.int32)


@dataclass(frozen=True)
class Csr(_Blocks):
    """Compressed sparse rows: ``32 + 16`` bits a kept float32 weight, and 32 a row.

    Raises:
        BadInput: more than 65536 columns.

    >>> w = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]])
    >>> packed = Csr().pack(w)
    >>> packed[:8].view(torch.int32).tolist(), packed[64:70].view(torch.int16).tolist(), Csr().size((2, 3), 3, torch.float32)
    ([1, 2], [1, 0, 2], 192)
    >>> torch.equal(Csr().unpack(packed, (2, 3), torch.float32), w)
    True
    """

    name = "csr"

    def _sizes(self) -> tuple[Size, ...]:
        return ((1, 1),)

    def _head(self, size: Size) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def _size_of(self, packed: Tensor) -> Size:
        return (1, 1)


@dataclass(frozen=True)
class Block(_Blocks):
    """R x C blocks with one 16-bit index each, of the size in `sizes` that takes the fewest bytes; it is the file's first four bytes.

    Raises:
        BadInput: more than 65536 blocks beside each other at every size.

    >>> w = torch.zeros(4, 64)
    >>> w[:, 7] = 1.0
    >>> packed = Block().pack(w)
    >>> packed[:4].view(torch.int16).tolist(), packed.numel()
    ([4, 1], 256)
    >>> torch.equal(Block().unpack(packed, (4, 64), torch.float32), w)
    True
    """

    sizes: tuple[Size, ...] = ((4, 1), (16, 1), (1, 32), (4, 4), (16, 16), (32, 32))

    name = "block"

    def __post_init__(self) -> None:
        if not self.sizes or not all(1 <= side <= MOST for size in self.sizes for side in size):
            raise BadInput(f"blocks of {self.sizes}", f"blocks have 1 to {MOST} rows and columns", "pass sizes=((4, 1),), say")

    def _sizes(self) -> tuple[Size, ...]:
        return self.sizes

    def _head(self, size: Size) -> Tensor:
        return torch.tensor(size, dtype=torch.int16).view(torch.uint8)

    def _size_of(self, packed: Tensor) -> Size:
        height, width = aligned(packed[:4], torch.int16).tolist()
        return height, width


def _high(shape: tuple[int, int], size: Size) -> int:
    return -(-shape[0] // size[0])


def _wide(shape: tuple[int, int], size: Size) -> int:
    return -(-shape[1] // size[1])


def _blocks(w: Tensor, size: Size) -> Tensor:
    """[O, I] -> [rows of blocks, columns of blocks, C, R], zeros past the matrix."""
    height, width = size
    padded = F.pad(w, (0, -w.shape[1] % width, 0, -w.shape[0] % height))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).permute(0, 2, 3, 1)


def _present(w: Tensor, size: Size) -> Tensor:
    return (_blocks(w, size) != 0).flatten(2).any(-1)


def _broken(name: str, rule: str) -> BadFile:
    return BadFile(f"packed tensor {name}", rule, "write the folder again")
