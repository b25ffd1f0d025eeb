"""A bank of gated feed-forward experts in the layout of transformers 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Rows
from rarefy.core.roles import Bank
from rarefy.experts.grouped import grouped_linear
from rarefy.experts.split import Expert, Split, slices


class GLU(Bank):
    """Run expert e as ``down_e (act(gate_e x) * up_e x)``, with gate and up stacked.

    gate_up_proj [E, 2I, H], down_proj [E, H, I]; rows [n, H] -> [n, H]. `dropout` is the share of inner activations that
    training sets to zero (Switch Transformers fine-tunes with 0.4 there and 0.1 elsewhere).

    >>> bank = GLU(3, 4, 8)
    >>> x = torch.ones(2, 4)
    >>> bool(torch.allclose(bank.each(x, torch.tensor([1, 1])), bank.split()[1](x), atol=1e-6))
    True
    """

    def __init__(self, experts: int, width: int, inner: int, act: Callable[[Tensor], Tensor] = F.silu, dropout: float = 0.0) -> None:
        super().__init__()
        self.experts, self.act, self.dropout = experts, act, nn.Dropout(dropout)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner) / inner**0.5)

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        inner: Tensor = self.dropout(self.act(gate) * up)
        return inner

    def split(self) -> Split:
        """One function [n, H] -> [n, H] per expert."""
        first, second = slices(self.gate_up_proj), slices(self.down_proj)

        def expert(e: int) -> Expert:
            up, down = first[e], second[e]
            return lambda x: F.linear(self._gated(F.linear(x, up)), down)

        return Split(self.experts, expert)

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]; gathers one expert's weights per row, so for few rows only."""
        inner = self._gated(torch.einsum("nh,noh->no", x, self.gate_up_proj[expert]))
        return torch.einsum("ni,nhi->nh", inner, self.down_proj[expert])

    def grouped(self, rows: Rows) -> Tensor:
        """Every assignment through its expert in two registered ops, [N, H] sorted by expert."""
        inner = self._gated(grouped_linear(rows.x, self.gate_up_proj, rows.offsets, item=rows.item))
        return grouped_linear(inner, self.down_proj, rows.offsets)
