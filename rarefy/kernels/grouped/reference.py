"""The specification, in PyTorch. G groups of 32 input columns; the last is filled up with columns where x is 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels.bitmask.reference import mask_of

GROUP = 32
TINY = 2.0**-120  # a group of x whose entries are all smaller is zero: 127 / m is beyond float32


def codes_of(stored: Tensor, bits: int) -> Tensor:
    """uint8 [stored groups, 32] of codes: 4-bit ones lie two in a byte, columns 0 to 15 in the low halves, 16 to 31 in the high ones.

    >>> codes_of(torch.tensor([[0x21] + [0] * 15], dtype=torch.uint8), 4)[0, [0, 16]].tolist()
    [1, 2]
    """
    return stored if bits == 8 else torch.cat([stored & 15, stored >> 4], 1)


def values_of(stored: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``w = scale * code + zero``, float32 [stored groups, 32]; without zeros they are minus half the codes' range, scaled."""
    codes = codes_of(stored, bits).float()
    if zero is None:
        return scale.float()[:, None] * (codes - 2 ** (bits - 1))
    return scale.float()[:, None] * codes + zero.float()[:, None]


def unpack(stored: Tensor, scale: Tensor, zero: Tensor | None, present: Tensor, columns: int, bits: int) -> Tensor:
    """The dense float32 matrix [O, I]; `present` uint8 [O, ceil(G / 8)] says which groups are stored, in row order."""
    mask = mask_of(present, -(-columns // GROUP))
    groups = torch.zeros(*mask.shape, GROUP, device=stored.device)
    groups[mask] = values_of(stored, scale, zero, bits)
    return groups.flatten(1)[:, :columns]


def rounded(x: Tensor) -> Tensor:
    """x [B, I] as the kernel sees it: ``rint(x * 127 / m) * m / 127`` with m = max|x| over each group; one with a NaN or an infinity is NaN.

    >>> rounded(torch.tensor([[127.0, 0.4, 0.6]])).tolist()
    [[127.0, 0.0, 1.0]]
    """
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).view(x.shape[0], -(-x.shape[1] // GROUP), GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(most < TINY, 0.0, groups * (127 / most)).round()
    return (codes * torch.where(most.isfinite(), most / 127, torch.nan)).flatten(1)[:, : x.shape[1]]


def linear(x: Tensor, stored: Tensor, scale: Tensor, zero: Tensor | None, present: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """``y = rounded(x) W^T + b`` for x [B, I]."""
    return F.linear(rounded(x), unpack(stored, scale, zero, present, x.shape[1], bits), bias)
