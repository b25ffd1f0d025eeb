"""Rows of bits in bytes, low bit first, each row padded to a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile


def pack_bits(mask: Tensor) -> Tensor:
    """bool [O, N] -> uint8 [O, ceil(N / 8)].

    >>> pack_bits(torch.tensor([[True, False, True]])).tolist()
    [[5]]
    """
    rows, columns = mask.shape
    spread = F.pad(mask, (0, -columns % 8)).view(rows, -(-columns // 8), 8).to(torch.uint8)
    return (spread * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int, name: str = "a bit mask") -> Tensor:
    """uint8 [O, ceil(columns / 8)] -> bool [O, columns]. Raises BadFile where a bit past the last column is set."""
    spread = ((bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).bool().flatten(1)
    if bool(spread[:, columns:].any()):
        raise BadFile(f"packed tensor {name}", f"a bit is set past column {columns}", "write the folder again")
    return spread[:, :columns]
