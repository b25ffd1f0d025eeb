"""The specification, in PyTorch. R x C blocks, K of them stored, column after column: values [K, C, R]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unpack(counts: Tensor, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense matrix [O, I] of blocks: `counts` [ceil(O / R)] of them a row of blocks, at the block columns `index` [K].

    >>> unpack(torch.tensor([1]), torch.tensor([1]), torch.tensor([[[1.0, 2.0]]]), (2, 3)).tolist()  # one 2 x 1 block
    [[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]
    """
    _, width, height = values.shape
    wide = -(-shape[1] // width)
    blocks = values.new_zeros(counts.numel() * wide, width, height)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts.long())
    blocks[row * wide + index.long()] = values
    dense = blocks.view(-1, wide, width, height).permute(0, 3, 1, 2).reshape(counts.numel() * height, wide * width)
    return dense[: shape[0], : shape[1]].contiguous()


def linear(x: Tensor, counts: Tensor, index: Tensor, values: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b`` for x [..., I]."""
    return F.linear(x, unpack(counts, index, values, (rows, x.shape[-1])), bias)
