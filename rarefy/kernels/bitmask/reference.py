"""The specification, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_of(bits: Tensor, columns: int) -> Tensor:
    """uint8 [O, ceil(I / 8)], low bit first -> bool [O, I].

    >>> mask_of(torch.tensor([[5]], dtype=torch.uint8), 3).tolist()
    [[True, False, True]]
    """
    spread = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.bool().flatten(1)[:, :columns]


def unpack(bits: Tensor, values: Tensor, columns: int) -> Tensor:
    """The dense matrix [O, I]: the values in row order where the bits are set, zeros elsewhere."""
    mask = mask_of(bits, columns)
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense[mask] = values
    return dense


def linear(x: Tensor, bits: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b`` for x [..., I]."""
    return F.linear(x, unpack(bits, values, x.shape[-1]), bias)
