"""Shared experts: they serve every row, beside those that a router chooses."""

from __future__ import annotations

from torch import Tensor, nn

from rarefy.core.roles import Bank


class Shared(nn.Module):
    """Add up all experts of a bank, each at weight 1: ``y = sum_e E_e(x)``, x [R, H] -> [R, H].

    They take no part in the router's softmax, in its balance losses or in a capacity.
    Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.2.

    >>> import torch
    >>> from rarefy.experts.banks.relu import ReLU
    >>> bank, x = ReLU(2, 4, 8), torch.ones(3, 4)
    >>> bool(torch.allclose(Shared(bank)(x), bank.split()[0](x) + bank.split()[1](x)))
    True
    """

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(())
        for expert in self.bank.split():
            y = y + expert(x)
        return y
