"""A bank of residual stacks: what each expert adds to its input, zero at initialisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Rows
from rarefy.core.roles import Bank
from rarefy.experts.grouped import grouped_linear
from rarefy.experts.split import Expert, Split


class ResidualStack(Bank):
    """Run expert e as ``f_e(x) - x``, f_e a stack of `depth` blocks ``x + W2 relu(W1 norm(x) + b1) + b2``, W2 and b2 zero at first.

    norm [depth, 2, E, H] (gain, shift), up [depth, E, I, H], up_bias [depth, E, I], down [depth, E, H, I], down_bias [depth, E, H];
    rows [n, H] -> [n, H]. The layer's host adds x, and then ``x + w (f(x) - x)`` lies between the row and the expert's output.
    Source: Lewis et al., arXiv 2103.16716, section 4.1 (the blocks) and fairseq's base_layer.py.

    >>> bank = ResidualStack(3, 4, 8, depth=2)
    >>> bank.split()[1](torch.ones(2, 4)).abs().max().item()
    0.0
    """

    def __init__(self, experts: int, width: int, inner: int, depth: int = 1) -> None:
        super().__init__()
        self.experts = experts
        self.norm = nn.Parameter(torch.stack([torch.ones(depth, experts, width), torch.zeros(depth, experts, width)], 1))
        self.up = nn.Parameter(torch.randn(depth, experts, inner, width) / width**0.5)
        self.up_bias = nn.Parameter(torch.zeros(depth, experts, inner))
        self.down = nn.Parameter(torch.zeros(depth, experts, width, inner))
        self.down_bias = nn.Parameter(torch.zeros(depth, experts, width))

    def split(self) -> Split:
        """One function [n, H] -> [n, H] per expert."""

        def expert(e: int) -> Expert:
            return lambda x: self._stack(x, e)

        return Split(self.experts, expert)

    def _stack(self, x: Tensor, e: int) -> Tensor:
        h = x
        for norm, up, up_bias, down, down_bias in self._blocks():
            seen = F.layer_norm(h, h.shape[-1:], norm[0, e], norm[1, e])
            h = h + F.linear(F.linear(seen, up[e], up_bias[e]).relu(), down[e], down_bias[e])
        return h - x

    def _blocks(self) -> list[tuple[Tensor, ...]]:
        return list(zip(*(p.unbind(0) for p in (self.norm, self.up, self.up_bias, self.down, self.down_bias)), strict=True))

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]; gathers one expert's weights per row, so for few rows only."""
        h = x
        for norm, up, up_bias, down, down_bias in self._blocks():
            seen = F.layer_norm(h, h.shape[-1:]) * norm[0][expert] + norm[1][expert]
            inner = (torch.einsum("nh,nih->ni", seen, up[expert]) + up_bias[expert]).relu()
            h = h + torch.einsum("ni,nhi->nh", inner, down[expert]) + down_bias[expert]
        return h - x

    def grouped(self, rows: Rows) -> Tensor:
        """Every assignment through its expert in registered ops, [N, H] sorted by expert."""
        x = rows.x[rows.item]
        expert, h = rows.expert.clamp(max=self.experts - 1), x
        for norm, up, up_bias, down, down_bias in self._blocks():
            seen = F.layer_norm(h, h.shape[-1:]) * norm[0][expert] + norm[1][expert]
            inner = grouped_linear(seen, up, rows.offsets, bias=up_bias).relu()
            h = h + grouped_linear(inner, down, rows.offsets, bias=down_bias)
        return h - x
