"""Noisy top-k: learned noise decides near ties while training, so that every expert is tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice
from rarefy.experts.balance.importance import Importance
from rarefy.experts.balance.smooth_load import SmoothLoad
from rarefy.experts.routing import dense, need_k, per_row, ranked, row_major


class NoisyLinear(Affinity):
    """Score experts by a matrix, and say how noisy each score is: ``logits = x W'``, ``std = softplus(x V') + 0.01``.

    x [R, d] of any float type -> logits [R, E] in float32, under autocast too. In training `noise` is std and `select` the logits plus
    N(0, 1) std; outside it there is no noise. W and V start at zero: all experts are equal and the noise decides.
    Source: Shazeer et al., arXiv 1701.06538, eqs. 3-5 and appendix A; the 0.01 is tensor2tensor's `noise_epsilon`.

    >>> scores = NoisyLinear(2, 3)(torch.ones(4, 2), Context(training=True), None)
    >>> scores.logits.abs().sum().item(), scores.noise.shape, bool((scores.select != 0).all())
    (0.0, torch.Size([4, 3]), True)
    """

    def __init__(self, width: int, experts: int, *, epsilon: float = 0.01) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight, self.noise = nn.Parameter(torch.zeros(experts, width)), nn.Parameter(torch.zeros(experts, width))

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            if not context.training:
                return Scores(logits)
            std = F.softplus(F.linear(x.float(), self.noise.float())) + self.epsilon
            return Scores(logits, select=logits + torch.randn_like(logits) * std, noise=std)


@dataclass(frozen=True)
class NoisyTopK(Choice):
    """Choose the k largest noisy logits: ``w = softmax(kept)``, which sums to 1; of equals the lower index.

    Scores with logits [R, E], and `select` [R, E] where noise was added -> Routing of R*k assignments, first choice first.
    With k = 1 every weight is 1 and the router learns from its losses alone. Source: Shazeer et al., arXiv 1701.06538, eqs. 3-5.

    Raises:
        BadInput: k outside 1..E.

    >>> r = NoisyTopK(2)(Scores(torch.zeros(1, 3), select=torch.tensor([[0.0, 1.0, 1.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([1, 2], [0.5, 0.5])
    """

    name = "noisy-topk"
    paper = Paper(
        "sparsely-gated-moe",
        "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        "arXiv 1701.06538",
        (
            "the optional two-level hierarchy and the strictly balanced gating with learned thresholds are not built in",
            "the bank is of gated experts, where the paper's have one ReLU layer; equations were checked against tensor2tensor, its authors' code",
        ),
    )
    affinity = NoisyLinear
    balances = (Importance(), SmoothLoad())
    k: int = 2

    def __call__(self, scores: Scores, context: Context) -> Routing:
        noisy = scores.logits if scores.select is None else scores.select
        need_k(self.k, noisy.shape[1])
        if context.live is not None:
            noisy = noisy.masked_fill(~context.live, torch.finfo(noisy.dtype).min)
        value, expert = (t[:, : self.k] for t in ranked(noisy)[:2])
        return row_major(scores, context, expert, value.softmax(-1))

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        total, served = dense(routing).sum(-1), per_row(routing)
        return {"weights of a row sum to 1": torch.allclose(total, (served > 0).to(total)), f"at most {self.k} experts per row": bool((served <= self.k).all())}
