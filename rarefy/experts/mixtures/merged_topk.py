"""Merging experts into one: the k experts that a sequence chooses are mixed in their parameters, and one is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Mix, Paper, Scores
from rarefy.core.roles import Mixture
from rarefy.experts.balance.importance import Importance
from rarefy.experts.balance.smooth_load import SmoothLoad
from rarefy.experts.banks.ffn import FFN
from rarefy.experts.pooling import Pooled
from rarefy.experts.routers.noisy_topk import NoisyLinear, NoisyTopK


class TokenBlock(nn.Module):
    """What a token adds to itself before experts are merged: ``up relu(down x + b) + c``, through width / 64, zero at first.

    x [..., d] -> [..., d]. Source: He et al., MEO, arXiv 2310.09832, and its code Shwai-He/MEO (TokenAtt).

    >>> import torch
    >>> TokenBlock(8)(torch.ones(8)).abs().sum().item()
    0.0
    """

    def __init__(self, width: int, reduction: int = 64) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, max(1, width // reduction)), nn.Linear(max(1, width // reduction), width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x).relu())
        return out


@dataclass(frozen=True)
class MergedTopK(Mixture):
    """Merge the k experts that a sequence's mean chooses, by their gates: ``W_g = sum_k g_gk W_k``, ``b_g = sum_k g_gk b_k``, each linear map by itself.

    Scores with logits [G, E] (and `select` where noise was added) -> Mix of k, weighed by the softmax over those kept, as noisy top-k
    does. A group costs one expert's forward and the merge, ``k |W|``: less than k experts' once it is longer than k tokens. With `token`
    every token first adds what a narrow block makes of it, zero at first. What a gate sees is the whole sequence, so that it is for
    encoders. For linear experts it is the sum of the experts' outputs, for others a model of its own. With k = 1 every gate is 1 and
    the router learns from its losses alone.
    Source: He et al., MEO, arXiv 2310.09832, and its code Shwai-He/MEO.

    Raises:
        BadInput: k outside 1..E.

    >>> import torch
    >>> mix = MergedTopK(2)(Scores(torch.tensor([[0.0, 1.0, 1.0]])), Context())
    >>> mix.expert.tolist(), mix.weight.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """

    name = "merged-topk"
    paper = Paper(
        "meo",
        "Merging Experts into One: Improving Computational Efficiency of Mixture of Experts",
        "arXiv 2310.09832",
        (
            "the equations were read in the authors' code alone (Shwai-He/MEO), not in the paper",
            "one gate serves both linear maps of an expert, where the authors' code gives each map a gate of its own on its own input",
            "a sequence's mean leaves padding out, and its loss counts sequences, where the code averages over padding; variance is over E, not E - 1",
            "gates from a task's description are not built in",
            "its BERT, BART and GPT-2 models were not trained",
        ),
    )
    bank = FFN
    balances = (Importance(0.01), SmoothLoad(0.01))
    k: int = 2
    token: bool = False

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(3, True))

    def __post_init__(self) -> None:
        if self.k < 1:
            raise BadInput(f"k = {self.k}", "a sequence merges one expert or more")

    def affinity(self, width: int, experts: int, /) -> nn.Module:
        return Pooled(NoisyLinear(width, experts))

    def before(self, width: int) -> nn.Module | None:
        return TokenBlock(width) if self.token else None

    def __call__(self, scores: Scores, context: Context) -> Mix:
        routing = NoisyTopK(self.k)(scores, Context(live=context.live, training=context.training))
        return Mix(routing.weight.view(-1, self.k), routing.expert.view(-1, self.k), routing)
