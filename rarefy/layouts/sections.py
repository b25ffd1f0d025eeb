"""Bytes in sections that begin at multiples of 64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGN = 64


def up(count: int) -> int:
    """The next multiple of 64.

    >>> up(0), up(1), up(64)
    (0, 64, 64)
    """
    return -(-count // ALIGN) * ALIGN


def join(parts: Sequence[Tensor]) -> Tensor:
    """The bytes of contiguous tensors, each padded with zeros to a multiple of 64, as uint8 [bytes]."""
    raw = [part.reshape(-1).view(torch.uint8) for part in parts]
    out = torch.zeros(sum(up(r.numel()) for r in raw), dtype=torch.uint8, device=raw[0].device)
    start = 0
    for r in raw:
        out[start : start + r.numel()] = r
        start += up(r.numel())
    return out


def split(packed: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of the sections whose lengths in bytes are `sizes`.

    >>> [part.tolist() for part in split(join([torch.tensor([7], dtype=torch.uint8), torch.tensor([8, 9], dtype=torch.uint8)]), [1, 2])]
    [[7], [8, 9]]
    """
    parts, start = [], 0
    for size in sizes:
        parts.append(packed[start : start + size])
        start += up(size)
    return parts


def aligned(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as `dtype`; copied only where a file was mapped at an address that does not suit it."""
    return (part if part.data_ptr() % dtype.itemsize == 0 and part.storage_offset() % dtype.itemsize == 0 else part.clone()).view(dtype)
