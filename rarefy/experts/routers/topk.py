"""Top-k: every row takes its k likeliest experts."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routing import at_most, need_k, probabilities, ranked, row_major


@dataclass(frozen=True)
class TopK(Choice):
    """Choose the k largest probabilities: ``w = p_i / sum_top p`` when `renormalise`, else ``w = p_i``.

    Scores with logits [R, E] -> Routing of R*k assignments, row-major, first choice first; of equals the lower index.

    Raises:
        BadInput: k outside 1..E.

    >>> import torch
    >>> r = TopK(2)(Scores(torch.tensor([[0.0, 0.0, -9.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 1], [0.5, 0.5])
    """

    name = "topk"
    k: int = 2
    renormalise: bool = True
    balances = (LoadBalance(),)
    overflow = Capacity()

    def __call__(self, scores: Scores, context: Context) -> Routing:
        p = probabilities(scores.logits, context.live)
        need_k(self.k, p.shape[1])
        weight, expert = (t[:, : self.k] for t in ranked(p)[:2])
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
        return row_major(scores, context, expert, weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return at_most(self.k, routing)
