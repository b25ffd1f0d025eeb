"""A bank of two-layer ReLU experts, initialised as slices of one wide dense layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Rows
from rarefy.core.roles import Bank
from rarefy.experts.grouped import grouped_linear
from rarefy.experts.split import Expert, Split, slices


class ReLU(Bank):
    """Run expert e as ``down_e relu(up_e x)``, without biases: all experts at weight 1 are one dense layer of width E*I.

    up_proj [E, I, H] with standard deviation ``c / sqrt(H)``, down_proj [E, H, I] with ``c / sqrt(E I)``: the fan-in is that of the
    dense layer, not of one expert, and ``c = sqrt(2 / layers)`` in a network of so many residual layers. Rows [n, H] -> [n, H].
    A weight on the expert's output is a weight on its inner activations, as there are no biases.
    Source: Csordas et al., arXiv 2310.10837, section 5.

    >>> bank = ReLU(3, 4, 8)
    >>> x = torch.ones(2, 4)
    >>> bool(torch.allclose(bank.each(x, torch.tensor([1, 1])), bank.split()[1](x), atol=1e-6))
    True
    """

    def __init__(self, experts: int, width: int, inner: int, layers: int = 2) -> None:
        super().__init__()
        self.experts, scale = experts, (2 / layers) ** 0.5
        self.up_proj = nn.Parameter(torch.randn(experts, inner, width) * scale / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner) * scale / (experts * inner) ** 0.5)

    def split(self) -> Split:
        """One function [n, H] -> [n, H] per expert."""
        first, second = slices(self.up_proj), slices(self.down_proj)

        def expert(e: int) -> Expert:
            up, down = first[e], second[e]
            return lambda x: F.linear(F.linear(x, up).relu(), down)

        return Split(self.experts, expert)

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]; gathers one expert's weights per row, so for few rows only."""
        return torch.einsum("ni,nhi->nh", torch.einsum("nh,nih->ni", x, self.up_proj[expert]).relu(), self.down_proj[expert])

    def grouped(self, rows: Rows) -> Tensor:
        """Every assignment through its expert in two registered ops, [N, H] sorted by expert."""
        return grouped_linear(grouped_linear(rows.x, self.up_proj, rows.offsets, item=rows.item).relu(), self.down_proj, rows.offsets)
