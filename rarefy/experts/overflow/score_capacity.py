"""Capacity by score: an expert that too many rows ask for keeps those that like it most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.core.records import Context, Paper, Routing
from rarefy.core.roles import Overflow
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routing import keep, probabilities, unpadded


@dataclass(frozen=True)
class ScoreCapacity(Overflow):
    """Keep the C assignments of each expert that score highest: ``C = ceil(factor * N / E)``, N = R k; the rest go to nobody and are counted.

    The score is the expert's probability, a softmax of the row's logits (its weight, where the routing has no scores); of equals the lower row
    stays. In training and outside it alike; the latency of experts that wait for one another is that of the busiest, so a factor of 1 to 2 bounds
    it without training anew. N counts padding, which takes no place. With `renormalise` the weights that a row keeps sum to what they did
    before. A row may lose all its experts, and which ones it loses depends on the rest of its batch, later rows included.
    Source: He et al., Capacity-Aware Inference, arXiv 2503.05066, Token Drop, and its code (which renormalises where the model's weights sum to 1).

    Raises:
        BadInput: a factor that is not positive.

    >>> r = ScoreCapacity(1.0)(Routing(torch.tensor([0, 0, 0, 1]), torch.tensor([0.5, 0.9, 0.8, 0.7]), 4, 2, k=1), Context())
    >>> r.expert.tolist(), r.dropped.tolist()
    ([2, 0, 0, 1], [1, 0])
    """

    name = "score-capacity"
    paper = Paper(
        "capacity-aware",
        "Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts",
        "arXiv 2503.05066",
        (
            "the order by random numbers and the last-come order are left out; first come is `Capacity`",
            "capacities of a device and a preference for text over image tokens are left out",
        ),
    )
    factor: float = 1.5
    renormalise: bool = False

    def __post_init__(self) -> None:
        Capacity(self.factor, self.factor)

    def bound(self, routing: Routing, context: Context) -> int:
        return Capacity(self.factor, self.factor).bound(routing, context)

    def __call__(self, routing: Routing, context: Context) -> Routing:
        before = unpadded(routing, context.valid)
        found = best_first(before, score(before, context), self.bound(routing, context))
        return rescaled(found, sums(before)) if self.renormalise else found


def score(routing: Routing, context: Context) -> Tensor:
    """How much each assignment's row likes its expert, [N]: no gradient; nobody scores 0."""
    if routing.scores is None:
        return routing.weight.detach()
    p = probabilities(routing.scores.logits.detach().float(), context.live)
    return torch.cat([p, p.new_zeros(len(p), 1)], 1)[routing.rows(), routing.expert]


def best_first(routing: Routing, score: Tensor, limit: int) -> Routing:
    """Keep the `limit` assignments of each expert that score highest, of equals the earlier."""
    first = score.argsort(stable=True, descending=True)
    order = first[routing.expert[first].argsort(stable=True)]
    expert, place = routing.expert[order], torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - torch.searchsorted(expert, expert)
    return keep(routing, place < limit)


def sums(routing: Routing) -> Tensor:
    """The sum of each row's weights, [R]."""
    return routing.weight.new_zeros(routing.items).index_add(0, routing.rows(), routing.weight)


def rescaled(routing: Routing, total: Tensor) -> Routing:
    """Every row's weights times what makes them sum to `total` [R] again; a row without any stays without."""
    now = sums(routing)
    factor = total / now.where(now != 0, torch.ones_like(now))
    return replace(routing, weight=routing.weight * factor[routing.rows()])
