"""Masked: the forward sees zeros, the raw values stay and may return."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.records import Pruned
from rarefy.core.roles import View


class Masked(View):
    """A hard mask that keeps the values under it.

    ``w_eff = w * mask``; masked entries get no gradient. `mask` is bool, the shape of the weight, and lives in the
    sparsifier's state: the buffer adds no key to the model's state dict.

    >>> view = Masked(torch.tensor([True, False])); view(torch.tensor([2., 3.])).tolist()
    [2.0, 0.0]
    """

    mask: Tensor

    @classmethod
    def examples(cls) -> tuple[Masked, ...]:
        return (cls(torch.arange(48).view(6, 8) % 3 != 0), cls(torch.ones(6, 8, dtype=torch.bool)))

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)

    def export(self, weight: Tensor) -> Pruned:
        return Pruned(torch.where(self.mask, weight.detach(), 0.0), self.mask)
