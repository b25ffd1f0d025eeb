"""Top-k: every row takes its k likeliest experts."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routing import per_row, probabilities, ranked, row_major


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
        if not 1 <= self.k <= p.shape[1]:
            raise BadInput(f"k = {self.k} with {p.shape[1]} experts", "a row takes between one and all of the experts", "choose k in 1..E")
        weight, expert = (t[:, : self.k] for t in ranked(p)[:2])
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
        return row_major(scores, context, expert, weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {f"at most {self.k} experts per row": bool((per_row(routing) <= self.k).all())}
