"""Scores between a normalised row and normalised expert vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Context, Scores
from rarefy.core.roles import Affinity


class NormedLinear(Affinity):
    """Score experts by a matrix, rows and experts normalised first: ``logits = LN(x) LN'(w)' + b``.

    x [R, d] -> logits [R, E] in float32, under autocast too. Both layer norms have a learned gain and shift; the gain of LN' starts at
    `scale`, so that all experts score alike at first. Source: Muqeeth et al., SMEAR, arXiv 2306.03745, and its code r-three/smear.

    >>> router = NormedLinear(4, 3)
    >>> x = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    >>> bool(torch.allclose(router(x, Context(), None).logits, router(10 * x, Context(), None).logits, atol=1e-5))
    True
    """

    def __init__(self, width: int, experts: int, *, scale: float = 0.01) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(experts, width) * scale), nn.Parameter(torch.zeros(experts))
        self.row_norm, self.weight_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        nn.init.constant_(self.weight_norm.weight, scale)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            return Scores(F.linear(_normed(self.row_norm, x), _normed(self.weight_norm, self.weight), self.bias.float()))


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
