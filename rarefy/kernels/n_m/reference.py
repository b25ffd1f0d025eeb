"""The specification, in PyTorch. Slots: the G = ceil(I / m) groups of a row, n to each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bits_of(m: int) -> int:
    """Bits of a position in a group of m.

    >>> [bits_of(m) for m in (2, 3, 4, 5, 8)]
    [1, 2, 2, 3, 3]
    """
    return (m - 1).bit_length()


def pack_positions(positions: Tensor, bits: int) -> Tensor:
    """[O, slots] below 2^bits -> uint8 [O, ceil(slots / 8) * bits]: eight positions in `bits` bytes, the first in the lowest bits.

    >>> pack_positions(torch.tensor([[1, 2, 3]]), 2).tolist()
    [[57, 0]]
    """
    eights = F.pad(positions.int(), (0, -positions.shape[1] % 8)).unflatten(1, (-1, 8))
    word = (eights << torch.arange(0, 8 * bits, bits, device=eights.device)).sum(-1)
    return ((word[..., None] >> torch.arange(0, 8 * bits, 8, device=word.device)) & 255).to(torch.uint8).flatten(1)


def unpack_positions(packed: Tensor, slots: int, bits: int) -> Tensor:
    """The inverse: int64 [O, slots].

    >>> unpack_positions(torch.tensor([[57, 0]], dtype=torch.uint8), 3, 2).tolist()
    [[1, 2, 3]]
    """
    word = (packed.long().unflatten(1, (-1, bits)) << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(-1)
    return ((word[..., None] >> torch.arange(0, 8 * bits, bits, device=word.device)) & (2**bits - 1)).flatten(1)[:, :slots]


def columns_of(packed: Tensor, slots: int, n: int, m: int) -> Tensor:
    """The column of every slot: int64 [O, slots]."""
    return torch.arange(slots, device=packed.device) // n * m + unpack_positions(packed, slots, bits_of(m))


def unpack(values: Tensor, packed: Tensor, n: int, m: int, columns: int) -> Tensor:
    """The dense matrix [O, I]; slots of one column add up."""
    dense = values.new_zeros(values.shape[0], columns)
    return dense.scatter_add_(1, columns_of(packed, values.shape[1], n, m), values)


def linear(x: Tensor, values: Tensor, packed: Tensor, n: int, m: int, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b`` for x [..., I]."""
    return F.linear(x, unpack(values, packed, n, m, x.shape[-1]), bias)
