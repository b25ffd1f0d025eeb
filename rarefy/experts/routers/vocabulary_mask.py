"""A routing mask by vocabulary: a rare word always meets the same expert, a frequent one keeps a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, finfo

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import per_row


class Masked(Affinity):
    """Score experts by a matrix, those that the row's token may not see by the least float: ``logits = x W'`` where ``visible[id]``.

    x [R, d] and `context.ids` [R] -> logits [R, E] in float32. visible [V, E] is a buffer, drawn once per layer and saved with it; the
    default lets every one of V = 16 tokens see all. Source: Su et al., MaskMoE, arXiv 2407.09816.

    Raises:
        BadInput: at the call, no ids. An id that is not below V is an index error.

    >>> router = Masked(4, 3, torch.tensor([[True, False, False]] * 2))
    >>> router(torch.randn(2, 4), Context(ids=torch.tensor([1, 0])), None).logits.argmax(1).tolist()
    [0, 0]
    """

    visible: Tensor

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return (cls(8, 4), cls(8, 4, drawn(torch.arange(16), 4, few=1, many=3)))

    def __init__(self, width: int, experts: int, visible: Tensor | None = None) -> None:
        super().__init__()
        self.inner = Linear(width, experts)
        self.register_buffer("visible", torch.ones(16, experts, dtype=torch.bool) if visible is None else visible)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        if context.ids is None:
            raise BadInput("a routing mask without token ids", "which experts a row may see depends on its token", "attach an Ambient to the model, or pass a context with ids")
        logits = self.inner(x, context, bank).logits
        return Scores(logits.masked_fill(~self.visible[context.ids.reshape(-1)], finfo(logits.dtype).min))


def drawn(counts: Tensor, experts: int, *, share: float = 0.9, few: int = 1, many: int = 8) -> Tensor:
    """Which experts each token sees, bool [V, E]: `many` for the fewest tokens that make `share` of counts [V], `few` for the others, by chance.

    `many` and `few` are at most all experts; tokens of equal counts are taken by lower id. Draws from torch's generator.

    >>> drawn(torch.tensor([90, 5, 5]), 4, few=1, many=3).sum(1).tolist()
    [3, 1, 1]
    """
    order = counts.argsort(stable=True, descending=True)
    before = counts[order].double().cumsum(0) - counts[order]
    frequent = torch.zeros_like(counts, dtype=torch.bool)
    frequent[order] = before < share * float(counts.sum())
    rank = torch.rand(len(counts), experts).argsort(1).argsort(1)
    return rank < torch.where(frequent, min(many, experts), min(few, experts))[:, None]


@dataclass(frozen=True)
class VocabularyMask(Choice):
    """Choose the k likeliest of the experts that a row's token sees: ``p = softmax(x W' + M[id])``, ``w = p_i``, top-1 by default.

    `counts` names a text file of how often each token occurs, a number a line, the first line being token 0's; without one every token sees
    every expert and this is plain top-k. Tokens that make `share` of the text see `many` experts, each other token `few`. A token of one
    expert has weight 1, and teaches the router nothing. Where k is more than a token sees, its other choices go to nobody. The balance loss
    sees the masked probabilities. Source: Su et al., MaskMoE, arXiv 2407.09816.

    Raises:
        BadInput: numbers out of range, k outside 1..E; from `affinity`, no file of counts.

    >>> r = VocabularyMask()(Scores(torch.tensor([[0.0, 0.0, torch.finfo(torch.float32).min]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0], [0.5])
    """

    name = "vocabulary-mask"
    paper = Paper(
        "maskmoe",
        "MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
        "arXiv 2407.09816",
        (
            "the equations rest on the abstract and on summaries alone: no code was found, and the paper was not read",
            "the share of the text that frequent tokens make, and how many experts they see, are defaults of ours",
            "an expert for all rows beside the routed ones is left to the layer",
            "its language models were not trained",
        ),
    )
    balances = (LoadBalance(0.01),)
    k: int = 1
    counts: str | None = None
    share: float = 0.9
    few: int = 1
    many: int = 8

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(2))

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 1 <= self.few <= self.many):
            raise BadInput(f"{self!r}", "a share lies in [0, 1], and a token sees at least one expert, a frequent one no fewer", "pass for example few=1, many=8")

    def affinity(self, width: int, experts: int, /) -> Affinity:
        if self.counts is None:
            return Linear(width, experts)
        return Masked(width, experts, drawn(_read(self.counts), experts, share=self.share, few=self.few, many=self.many))

    def __call__(self, scores: Scores, context: Context) -> Routing:
        routing = TopK(self.k, renormalise=False)(scores, context)
        seen = torch.cat([scores.logits != finfo(scores.logits.dtype).min, scores.logits.new_zeros(len(scores.logits), 1).bool()], 1)
        may = seen[routing.rows(), routing.expert]
        return replace(routing, expert=routing.expert.where(may, routing.experts), weight=routing.weight.masked_fill(~may, 0.0))

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {f"at most {self.k} experts per row": bool((per_row(routing) <= self.k).all())}


def _read(path: str) -> Tensor:
    try:
        counts = torch.tensor([int(line) for line in Path(path).read_text().split()])
    except (OSError, ValueError) as error:
        raise BadInput(f"counts {path}", f"a file of whole numbers, one a token, and reading raised {type(error).__name__}") from error
    if not len(counts) or int(counts.min()) < 0 or not int(counts.sum()):
        raise BadInput(f"counts {path}", "how often a token occurs is not negative, and some token occurs")
    return counts
