"""Balance without a loss: a bias per expert that follows its load decides who is chosen, and weighs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, finfo
from torch.optim import Optimizer

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice, Controller
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routing import at_most, need_k, ranked, row_major


class Biased(Affinity):
    """Score experts by a matrix, and rank them with a bias: ``logits = x W'``, ``select = sigmoid(logits) + b``.

    x [R, d] of any float type -> float32 Scores. b [E] is a buffer, zero at first: no gradient reaches it, and `FollowLoad` moves it.
    Source: Wang et al., arXiv 2408.15664, eq. 3.

    >>> scores = Biased(2, 3)(torch.ones(4, 2), Context(), None)
    >>> torch.equal(scores.select, scores.logits.sigmoid())
    True
    """

    bias: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.inner = Linear(width, experts)
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        logits = self.inner(x, context, bank).logits
        return Scores(logits, select=logits.sigmoid() + self.bias.float())


@dataclass(frozen=True)
class FollowLoad(Controller):
    """After every step move each expert's bias towards an even load: ``b_e += rate * sign(mean(c) - c_e)``, c the step's assignments.

    Each layer on its own, over all its forwards of the step. Source: Wang et al., arXiv 2408.15664, algorithm 1, rate 0.001.

    Raises:
        BadInput: a negative rate.
    """

    name = "follow-load"
    rate: float = 0.001

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise BadInput(f"rate {self.rate}", "a bias moves towards an even load", "pass for example 0.001")

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Optimizer) -> dict[str, Any]:
        for path, layer in layers.items():
            counts = [entry.routing.counts() for entry in entries if entry.path == path]
            if counts:
                load = torch.stack(counts).sum(0).float()
                layer.affinity.bias += self.rate * (load.mean() - load).sign()
        return state


@dataclass(frozen=True)
class BiasedTopK(Choice):
    """Choose the k experts of the largest biased score and weigh each by its own: ``top-k of s + b, w = s = sigmoid(logit)``.

    Scores with logits [R, E] and `select` [R, E], which ranks -> Routing of R*k assignments, first choice first; of equals the lower index.
    Without `select` the logits rank. No balance loss: the task's gradient is the router's only one, and the bias has none.
    Source: Wang et al., arXiv 2408.15664, eq. 3.

    Raises:
        BadInput: k outside 1..E.

    >>> r = BiasedTopK(1)(Scores(torch.zeros(1, 3), select=torch.tensor([[0.5, 0.9, 0.5]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([1], [0.5])
    """

    name = "load-bias"
    paper = Paper(
        "loss-free-balancing",
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
        "arXiv 2408.15664",
        ("loads are counted over one process", "the paper's language models, with shared experts beside these, were not trained"),
    )
    affinity = Biased
    k: int = 2
    rate: float = 0.001

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return (FollowLoad(self.rate),)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        s = scores.logits.float().sigmoid()
        need_k(self.k, s.shape[1])
        seen = scores.logits.float() if scores.select is None else scores.select
        if context.live is not None:
            seen = seen.masked_fill(~context.live, finfo(seen.dtype).min)
        expert = ranked(seen)[1][:, : self.k]
        return row_major(scores, context, expert, s.gather(1, expert))

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return at_most(self.k, routing)


def violation(load: Tensor) -> float:
    """``max(c) / mean(c) - 1`` of loads c [E]: how much more than its share the busiest expert has; 0 when even or without any load.

    Source: Wang et al., arXiv 2408.15664, section 4.1 (MaxVio).

    >>> violation(torch.tensor([3, 1, 1, 3]))
    0.5
    """
    mean = float(load.float().mean())
    return float(load.max()) / mean - 1 if mean > 0 else 0.0
