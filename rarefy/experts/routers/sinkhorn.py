"""Sinkhorn routing: in training a few rounds of matrix scaling make every expert nearly as wanted as any other; outside it the best expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.routing import at_most, need_k, ranked, real_rows, row_major


def prices(logits: Tensor, real: Tensor, rounds: int) -> Tensor:
    """What to add to each expert's logits [E]: ``exp(x_re + a_e + b_r)`` has rows that add up to 1 and, nearly, columns that add up to R/E.

    Alternating normalisation from a = 0; of rows [R] that are real; a column without any mass keeps the price 0. Their mean is 0.

    >>> x = torch.tensor([[0.0, -1.0], [0.0, -2.0], [0.0, -3.0]])
    >>> mass = (x + prices(x, torch.ones(3, dtype=torch.bool), 50)).softmax(1).sum(0)
    >>> [round(m, 3) for m in mass.tolist()]
    [1.5, 1.5]
    """
    x = logits.detach().double()
    x = torch.cat([x.masked_fill(~real[:, None], -torch.inf), x.new_full((1, x.shape[1]), -torch.inf)])
    a = x.new_zeros(x.shape[1])
    for _ in range(rounds):
        b = -torch.where(x.isfinite(), x + a, -torch.inf).logsumexp(1, keepdim=True).nan_to_num(posinf=0.0, neginf=0.0)
        mass = (x + b).logsumexp(0)
        a = torch.where(mass.isfinite(), -mass, 0.0)
    return (a - a.mean()).to(logits.dtype)


@dataclass(frozen=True)
class Sinkhorn(Choice):
    """Choose k experts by logits plus Sinkhorn's prices in training, by logits outside it; weight ``sigmoid(logit)`` either way.

    Scores with logits [R, E] -> Routing of R*k assignments, first choice first; of equals the lower index. The prices pass no gradient; the
    weight does, and it is the router's only one. The load is even to the extent that rows differ: unlike an exact assignment this is a
    choice per row, and it needs no solver. Padding and dead experts take no part.
    Not causal in training: a row's expert depends on all rows. Source: Clark et al., Unified Scaling Laws for Routed Language Models,
    arXiv 2202.01169 (S-BASE), as used for k > 1 and with 3 rounds by arXiv 2310.10837.

    Raises:
        BadInput: k outside 1..E, no round.

    >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    >>> [Sinkhorn(1)(Scores(logits), Context(training=t)).expert.tolist() for t in (True, False)]
    [[1, 0, 1, 0], [0, 0, 0, 0]]
    """

    name = "sinkhorn"
    paper = Paper(
        "s-base",
        "Unified Scaling Laws for Routed Language Models (S-BASE)",
        "arXiv 2202.01169",
        ("read in the account and the code of arXiv 2310.10837, not in the paper itself", "its scaling study was not run"),
    )
    k: int = 1
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BadInput(f"{self.rounds} rounds", "prices take at least one round", "pass for example 3")

    def causal(self, training: bool) -> bool:
        return not training

    def __call__(self, scores: Scores, context: Context) -> Routing:
        z = scores.logits.float()
        need_k(self.k, z.shape[1])
        seen = z.detach() if context.live is None else z.detach().masked_fill(~context.live, -torch.inf)
        if context.training:
            seen = seen + prices(seen, real_rows(seen, context.valid), self.rounds)
        expert = ranked(seen)[1][:, : self.k]
        return row_major(scores, context, expert, z.gather(1, expert).sigmoid())

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return at_most(self.k, routing)
