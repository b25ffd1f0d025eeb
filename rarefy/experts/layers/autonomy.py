"""Experts without a router: each makes a small first step on every row, and those that it moves most go on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.core.ambient import Seat, aligned
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice, Layer
from rarefy.core.trace import Tap
from rarefy.experts.layers.named_choice import NamedChoice
from rarefy.experts.split import slices


class Autonomous(nn.Module):
    """Gated experts with a factored gate ``B_e A_e``, chosen by ``||A_e x||_2``; x [..., d] -> [..., d].

    ``c_e = A_e x`` [r] of all experts in one product, logits ``||c_e||`` in float32, then for the chosen ``y = sum_e w_e D_e (silu(B_e c_e) * U_e x)``
    from the c that was made. probe [E r, d] holds all A, gate [E, I, r] B, up [E, I, d] U, down [E, d, I] D. Gradient reaches A through
    the weights and through the experts. No parameter belongs to a router: exchange two experts, and their rows follow them.
    """

    def __init__(self, width: int, experts: int, inner: int, rank: int, choice: Choice) -> None:
        super().__init__()
        self.experts, self.choice, self.seat, self.tap = experts, choice, Seat(), Tap()
        self.probe = nn.Parameter(torch.randn(experts * rank, width) / width**0.5)
        self.gate = nn.Parameter(torch.randn(experts, inner, rank) / rank**0.5)
        self.up = nn.Parameter(torch.randn(experts, inner, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, inner) / inner**0.5)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        context = replace(aligned(self.seat() if context is None else context, rows.shape[0]), training=self.training)
        first = F.linear(rows, self.probe).view(rows.shape[0], self.experts, self.gate.shape[-1])
        routing = self.tap(self.choice(Scores(loudness(first)), context), context, rows)
        return self._finished(rows, first, routing).to(x.dtype).reshape(x.shape)

    def _finished(self, rows: Tensor, first: Tensor, routing: Routing) -> Tensor:
        """What the chosen experts make of their rows, from the first step that they made, [R, d]."""
        expert, order = routing.expert.sort(stable=True)
        item, weight = routing.rows()[order], routing.weight[order]
        ends = torch.searchsorted(expert, torch.arange(self.experts, device=expert.device), right=True).tolist()
        gates, ups, downs = slices(self.gate), slices(self.up), slices(self.down)
        y = rows.new_zeros(rows.shape[0], self.down.shape[1])
        for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                who = item[start:end]
                inner = F.silu(F.linear(first[who, e], gates[e])) * F.linear(rows[who], ups[e])
                y = y.index_add(0, who, (F.linear(inner, downs[e]) * weight[start:end, None]).to(y.dtype))
        return y


def loudness(first: Tensor) -> Tensor:
    """The length of every expert's first step, float32 [R, E] of [R, E, r].

    >>> loudness(torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])).tolist()
    [[5.0, 1.0]]
    """
    return torch.linalg.vector_norm(first.float(), dim=-1)


@dataclass(frozen=True)
class Autonomy(NamedChoice, Layer):
    """Let experts choose themselves by the length of their first step of `rank` numbers; `router` is any choice by name, over these lengths.

    Top-k weighs by a softmax over the k lengths (``topk:renormalise=False`` by one over all E, as the released code does). Experts are as
    large as gated ones of width `inner`: theirs is ``(3 d inner - r d) / (2 d + r)``, rounded. `rank` None is a quarter of the row's width.
    A layer costs E r d multiply-adds a row for the first step, and no other product with A. Dropless, with the choice's balance losses.
    Source: Lv et al., Autonomy-of-Experts Models, arXiv 2501.13074, and its code trestad/Autonomy-of-Experts.

    Raises:
        BadInput: a rank below 1 or too large for `inner`; a choice that needs scores of its own, or no such one.

    >>> Autonomy(rank=2).make(6, 4, 5)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 6])
    """

    name = "autonomy"
    paper = Paper(
        "aoe",
        "Autonomy-of-Experts Models",
        "arXiv 2501.13074",
        (
            "weights are a softmax over the chosen experts' lengths, as a summary of the paper has it; its code's softmax over all is given by name",
            "the rank that suits a model is the user's to find; ours by default is a quarter of the width",
            "the training-free probe of pretrained mixtures by their experts' activations is left out",
            "its language models were not trained",
            "on our character model its loss is 0.02 above that of a linear router over experts of the same size",
        ),
    )
    router: str = "topk"
    rank: int | None = None

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(rank=2), cls("topk:k=1,renormalise=False"), cls("top-p"))

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"rank {self.rank}", "a first step has at least one number", "pass for example rank=16")

    def make(self, width: int, experts: int, inner: int, /) -> nn.Module:
        choice, rank = self.choice, self.rank or max(1, width // 4)
        if choice.affinity is not None:
            raise BadInput(f"autonomy by {self.router}", "it scores rows in its own way", "name a choice over plain logits, such as topk or top-p")
        own = round((3 * width * inner - rank * width) / (2 * width + rank))
        if own < 1:
            raise BadInput(f"rank {rank} for experts of width {inner}", "the first step alone is larger than a gated expert", "choose a smaller rank")
        return Autonomous(width, experts, own, rank, choice)

    def causal(self, training: bool) -> bool:
        return self.choice.causal(training)
