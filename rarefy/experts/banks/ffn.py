"""A bank of two-layer experts with biases, whose parameters may also be merged: the feed-forward block of BERT, or an adapter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Mix, Rows
from rarefy.core.roles import Bank
from rarefy.experts.grouped import grouped_linear
from rarefy.experts.mixing import merged_linear
from rarefy.experts.split import Expert, Split, slices


class FFN(Bank):
    """Run expert e as ``down_e act(up_e x + b_e) + c_e``; or, for a group of tokens, one expert of merged up, b, down and c.

    up_proj [E, I, H], up_bias [E, I], down_proj [E, H, I], down_bias [E, H]; weights are drawn with standard deviation `std` (None: one
    over the root of the fan-in), biases are zero at first. Rows [n, H] -> [n, H]; groups [G, M, H] -> [G, M, H].

    >>> bank, x = FFN(3, 4, 8), torch.ones(2, 5, 4)
    >>> bool(torch.allclose(bank.merged(x, Mix(torch.ones(2, 1), torch.tensor([[1], [1]]))), bank.split()[1](x), atol=1e-6))
    True
    """

    def __init__(self, experts: int, width: int, inner: int, act: Callable[[Tensor], Tensor] = F.gelu, std: float | None = None) -> None:
        super().__init__()
        self.experts, self.act = experts, act
        self.up_proj = nn.Parameter(torch.randn(experts, inner, width) * (width**-0.5 if std is None else std))
        self.up_bias = nn.Parameter(torch.zeros(experts, inner))
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner) * (inner**-0.5 if std is None else std))
        self.down_bias = nn.Parameter(torch.zeros(experts, width))

    def split(self) -> Split:
        """One function [n, H] -> [n, H] per expert."""
        parts = [slices(p) for p in (self.up_proj, self.up_bias, self.down_proj, self.down_bias)]

        def expert(e: int) -> Expert:
            up, up_bias, down, down_bias = (part[e] for part in parts)
            return lambda x: F.linear(self.act(F.linear(x, up, up_bias)), down, down_bias)

        return Split(self.experts, expert)

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]; gathers one expert's weights per row, so for few rows only."""
        inner = self.act(torch.einsum("nh,nih->ni", x, self.up_proj[expert]) + self.up_bias[expert])
        return torch.einsum("ni,nhi->nh", inner, self.down_proj[expert]) + self.down_bias[expert]

    def grouped(self, rows: Rows) -> Tensor:
        """Every assignment through its expert in two registered ops, [N, H] sorted by expert."""
        inner = self.act(grouped_linear(rows.x, self.up_proj, rows.offsets, item=rows.item, bias=self.up_bias))
        return grouped_linear(inner, self.down_proj, rows.offsets, bias=self.down_bias)

    def merged(self, x: Tensor, mix: Mix) -> Tensor:
        """Each group [M, H] of x through one expert of its own; every tensor is merged by itself, the activation between."""
        return merged_linear(self.act(merged_linear(x, self.up_proj, self.up_bias, mix)), self.down_proj, self.down_bias, mix)
