"""A bank of experts of one neuron each, any number of them: what is not asked for is never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.roles import Bank
from rarefy.experts.split import Expert, Split


class Singletons(Bank):
    """Run expert e as ``act(u_e . x) v_e``, rows u and v of two tables [E, d], drawn with standard deviation ``1 / sqrt(d)``.

    `summed` gives the weighted sum of m experts per row by gathering their 2 m d parameters, at a cost that does not depend on E: no
    sort, no loop, no capacity. All experts at weight 1 are a dense layer of E inner units without biases.
    Source: He, Mixture of A Million Experts, arXiv 2407.04153.

    >>> bank, x = Singletons(9, 4), torch.ones(2, 4)
    >>> y = bank.summed(x, torch.tensor([[3, 8], [8, 8]]), torch.ones(2, 2))
    >>> bool(torch.allclose(y[1], 2 * bank.split()[8](x[1:])[0], atol=1e-6))
    True
    """

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(4, 8),)

    def __init__(self, experts: int, width: int, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.experts, self.act = experts, act
        self.up = nn.Parameter(torch.randn(experts, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width) / width**0.5)

    def split(self) -> Split:
        """One function [n, d] -> [n, d] per expert."""

        def expert(e: int) -> Expert:
            return lambda x: self.act(x @ self.up[e])[:, None] * self.down[e]

        return Split(self.experts, expert)

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [d] through expert[n]."""
        return self.act((x * self.up[expert]).sum(-1))[:, None] * self.down[expert]

    def summed(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """``sum_m weight[r, m] E_{expert[r, m]}(x_r)``, x [R, d] -> [R, d]; an expert that recurs counts as often, expert E for nothing."""
        nobody = expert >= self.experts
        found = expert.masked_fill(nobody, 0)
        inner = self.act(torch.bmm(F.embedding(found, self.up), x[:, :, None])[:, :, 0])
        share = (inner * weight.to(inner.dtype)).masked_fill(nobody, 0.0)
        return torch.bmm(share[:, None], F.embedding(found, self.down))[:, 0]
