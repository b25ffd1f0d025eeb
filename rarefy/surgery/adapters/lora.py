"""Masked LoRA: the plain baseline, a low-rank change under the mask, differentiated by autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rarefy.core.records import Paper
from rarefy.core.roles import View
from rarefy.surgery.adapters import Adaptation, added


class MaskedLowRank(View):
    """A low-rank change on the kept weights.

    ``W' = W + s B A`` where W is not zero; A [r, I], B [O, r]. Autograd keeps the product and the mask, both [O, I], for backward.

    >>> view = MaskedLowRank(torch.ones(1, 2), torch.ones(1, 1), 2.0); view(torch.tensor([[0.0, 1.0]])).tolist()
    [[0.0, 3.0]]
    """

    @classmethod
    def examples(cls) -> tuple[MaskedLowRank, ...]:
        g = torch.Generator().manual_seed(0)
        return tuple(cls(torch.randn(r, 8, generator=g), torch.randn(6, r, generator=g), 0.5) for r in (1, 3))

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, weight: Tensor) -> Tensor:
        return added(weight, self.scale * (self.b @ self.a))


@dataclass(frozen=True)
class MaskedLora(Adaptation):
    """LoRA whose product is masked by the pattern, so that it can be folded in.

    A is Kaiming-uniform, B zero, ``s = alpha / r``.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; the mask is ours, since
    folding the plain product in would fill the zeros.
    """

    rank: int = 16
    alpha: float = 32.0
    lr: float = 3e-4
    name = "masked-lora"
    paper = Paper("masked-lora", "LoRA under the mask of a sparse matrix", "arXiv 2106.09685", ("the product is masked by the pattern of the frozen weight",))

    def view(self, weight: Tensor, *, generator: Generator) -> MaskedLowRank:
        rank = min(self.rank, *weight.shape)
        a = nn.init.kaiming_uniform_(torch.empty(rank, weight.shape[1]), a=math.sqrt(5), generator=generator)
        return MaskedLowRank(a.to(weight.device), torch.zeros(weight.shape[0], rank, device=weight.device), self.alpha / rank)
