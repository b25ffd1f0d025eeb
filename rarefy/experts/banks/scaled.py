"""A bank whose outputs are scaled by one learned vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.records import Rows
from rarefy.core.roles import Bank
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import is_grouped


class Scaled(Bank):
    """Run expert e of the inner bank as ``omega * E_e(x)``, omega [H] learned, ones at first and the same for all experts.

    Source: Liu et al., SparseMixer, arXiv 2310.00811: it takes up the scale that a sampled expert's weight does not have.

    >>> bank = Scaled(GLU(3, 4, 8), 4)
    >>> x = torch.ones(2, 4)
    >>> torch.equal(bank.split()[1](x), bank.inner.split()[1](x))
    True
    """

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(GLU(4, 8, 6), 8),)

    def __init__(self, inner: Bank, width: int) -> None:
        super().__init__()
        self.experts, self.inner, self.omega = inner.experts, inner, nn.Parameter(torch.ones(width))
        if not is_grouped(inner):
            self.grouped = None  # type: ignore[method-assign, assignment]  # then this bank is none either

    def split(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """One function [n, H] -> [n, H] per expert."""

        def scaled(expert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: expert(x) * self.omega

        return [scaled(expert) for expert in self.inner.split()]

    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row n [H] through expert[n]."""
        return self.inner.each(x, expert) * self.omega

    def grouped(self, rows: Rows) -> Tensor:
        """Every assignment through its expert, [N, H] sorted by expert; None where the inner bank has no such op."""
        assert is_grouped(self.inner)
        return self.inner.grouped(rows) * self.omega
