"""Sub-tokens: a row is cut into heads, each routed by itself, and what comes back is put together again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rarefy.core.ambient import aligned
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper
from rarefy.core.roles import Layer
from rarefy.experts.banks.glu import GLU
from rarefy.experts.layers.named_choice import NamedChoice
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.overflow.training_only import TrainingOnly
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routing import unpadded_rows


class MultiHead(nn.Module):
    """Project rows, cut each into h sub-tokens, route these, put them together in their order and project again.

    ``x' = W x + b, [R, d] seen as [R h, d / h], y = V moe(x') + c``. The routed layer takes R h rows of d / h: its capacity, balance losses and
    context are of sub-tokens, those of padding being padding. x [..., d] -> [..., d].

    Raises:
        BadInput: a width that the heads do not divide, or a context that is not aligned with the rows.
    """

    def __init__(self, width: int, heads: int, moe: MoE) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise BadInput(f"{heads} heads of a row of {width}", "heads share a row evenly", "choose a divisor of the width")
        self.heads, self.moe = heads, moe
        self.split, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.xavier_uniform_(self.split.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        context = aligned(self.moe.seat() if context is None else context, rows.shape[0])
        parts = self.split(rows).reshape(rows.shape[0] * self.heads, rows.shape[1] // self.heads)
        routed = self.moe(parts, per_head(context, self.heads)).reshape(rows.shape)
        return unpadded_rows(self.merge(routed), context.valid).to(x.dtype).reshape(x.shape)


def per_head(context: Context, heads: int) -> Context:
    """The context of a row's heads: what is given per row [R] is repeated, [R h].

    >>> import torch
    >>> per_head(Context(valid=torch.tensor([True, False])), 2).valid.tolist()
    [True, True, False, False]
    """
    given = {name: getattr(context, name) for name in ("ids", "valid", "owner", "positions", "labels")}
    return replace(context, **{name: value.reshape(-1).repeat_interleave(heads) for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class SubTokens(NamedChoice, Layer):
    """Route `heads` sub-tokens of every row by `router`, any choice by name, so that a row meets up to heads times as many experts.

    Experts have rows of d / heads and an inner width heads times as large: as many parameters, and as many multiply-adds a row, as experts on
    whole rows. `capacity` (None: unbounded) is the factor in training, over R heads sub-tokens; outside training every sub-token is served.
    Source: Wu et al., Multi-Head Mixture-of-Experts, arXiv 2404.15045, and its code (4 heads, top-2, balance loss 0.01).

    Raises:
        BadInput: heads that do not divide the width, a capacity that is not positive, no such router.

    >>> import torch
    >>> SubTokens(heads=2).make(6, 4, 5)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 6])
    """

    name = "sub-tokens"
    paper = Paper(
        "mh-moe",
        "Multi-Head Mixture-of-Experts",
        "arXiv 2404.15045",
        (
            "experts are gated, as everywhere here, where the paper's are two layers; their inner width is scaled alike",
            "a second expert is not dropped at random in training, as GShard's top-2 does",
            "outside training there is no capacity",
            "the layer's own projections are not taken out of the experts' width, so that it has 2 d (d + 1) parameters more than the layer that it replaces",
            "its language and multimodal models were not trained",
        ),
    )
    heads: int = 4
    router: str = "topk"
    capacity: float | None = 1.25

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(2), cls(4, capacity=None), cls(1, "top-p", 0.5))

    def __post_init__(self) -> None:
        if self.capacity is not None:
            Capacity(self.capacity)

    def make(self, width: int, experts: int, inner: int, /) -> nn.Module:
        choice, own = self.choice, width // max(1, self.heads)
        affinity, bank = (choice.affinity or Linear)(own, experts), (choice.bank or GLU)(experts, own, self.heads * inner)
        overflow = None if self.capacity is None else TrainingOnly(Capacity(self.capacity))
        return MultiHead(width, self.heads, MoE(affinity, choice, bank, overflow, shared=choice.shared(own, self.heads * inner)))

    def causal(self, training: bool) -> bool:
        return self.choice.causal(training) and not (training and self.capacity is not None)
