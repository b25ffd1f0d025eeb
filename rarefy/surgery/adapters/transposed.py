"""A view of a matrix that its host stores as [I, O]."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.roles import View
from rarefy.surgery.adapters.lora import MaskedLowRank


class Transposed(View):
    """``W'^T = inner(W)^T``: the tensor is [I, O] (a transformers Conv1D), the inner view sees [O, I].

    >>> view = Transposed(MaskedLowRank(torch.ones(1, 2), torch.ones(1, 1), 2.0)); view(torch.tensor([[0.0], [1.0]])).tolist()
    [[0.0], [3.0]]
    """

    @classmethod
    def examples(cls) -> tuple[Transposed, ...]:
        g = torch.Generator().manual_seed(0)
        return (cls(MaskedLowRank(torch.randn(2, 6, generator=g), torch.randn(8, 2, generator=g), 0.5)),)

    def __init__(self, inner: View) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, weight: Tensor) -> Tensor:
        seen: Tensor = self.inner(weight.T)
        return seen.T
