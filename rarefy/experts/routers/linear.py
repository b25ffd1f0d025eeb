"""The linear router: one logit per expert, always in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Context, Scores
from rarefy.core.roles import Affinity


class Linear(Affinity):
    """Score experts by a matrix: ``logits = (x * u) W'`` with u ~ U(1 - jitter, 1 + jitter) in training, else 1.

    x [R, d] of any float type -> logits [R, E] in float32, under autocast too. (Compiled under autocast, torch runs the router's
    backward in autocast's type, unless torch._functorch.config.backward_pass_autocast is "off".)
    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, section 2.4 (selective precision) and appendix C (jitter).

    >>> router = Linear(2, 3)
    >>> router(torch.ones(4, 2, dtype=torch.bfloat16), Context(), None).logits.dtype
    torch.float32
    """

    def __init__(self, width: int, experts: int, *, jitter: float = 0.0) -> None:
        super().__init__()
        self.jitter = jitter
        self.weight = nn.Parameter(torch.randn(experts, width) / width**0.5)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            seen = x.float()
            if self.jitter and context.training:
                seen = seen * torch.empty_like(seen).uniform_(1 - self.jitter, 1 + self.jitter)
            return Scores(F.linear(seen, self.weight.float()))
