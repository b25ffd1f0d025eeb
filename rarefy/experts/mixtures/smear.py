"""SMEAR: every example runs one expert, whose parameters are the mean of all experts' by the router's probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Mix, Paper, Scores
from rarefy.core.roles import Mixture
from rarefy.experts.banks.ffn import FFN
from rarefy.experts.pooling import Pooled
from rarefy.experts.routers.normed import NormedLinear
from rarefy.experts.routing import probabilities


def adapters(experts: int, width: int, inner: int) -> FFN:
    """A bank of adapters: swish between, weights drawn with standard deviation 0.01."""
    return FFN(experts, width, inner, act=F.silu, std=0.01)


@dataclass(frozen=True)
class Smear(Mixture):
    """Merge all experts by probability, once per group of tokens: ``p = softmax(LN(mean_m x_m) LN'(w)' + b)``, ``W_g = sum_e p_ge W_e``.

    Scores with logits [G, E] -> Mix of k = E. In training each p_ge is set to 0 with chance `dropout` and the rest renormalised (all to
    1 / E where every one was). No choice, no balance loss; every tensor of an expert is merged, biases too. A group costs one expert's
    forward and the merge, ``E |W|``. The mean sees the whole sequence, so that it is for encoders, or for prompts routed apart.
    Source: Muqeeth et al., SMEAR, arXiv 2306.03745, and its code r-three/smear.

    Raises:
        BadInput: a dropout outside [0, 1).

    >>> Smear()(Scores(torch.zeros(1, 4)), Context()).weight.tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """

    name = "smear"
    paper = Paper(
        "smear",
        "Soft Merging of Experts with Adaptive Routing",
        "arXiv 2306.03745",
        (
            "the equations were read in the authors' code alone (r-three/smear, its T5 part), not in the paper",
            "a group's mean leaves padding out, where the authors' code averages over it",
            "a decoder's router that reads the encoder's states, and a causal mean, are not built in",
            "the routers that it is compared with (straight-through Gumbel, REINFORCE, ensembles, AdaMix) are not among ours",
            "its T5 and ResNet models were not trained; on the digits task nothing is frozen",
        ),
    )
    bank = staticmethod(adapters)
    dropout: float = 0.1

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(0.5), cls(0.0))

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout {self.dropout}", "a chance to be left out is in [0, 1)")

    def affinity(self, width: int, experts: int, /) -> nn.Module:
        return Pooled(NormedLinear(width, experts))

    def __call__(self, scores: Scores, context: Context) -> Mix:
        p = probabilities(scores.logits, context.live)
        if self.dropout and context.training:
            p = self._dropped(p, p.new_ones(p.shape[1]) if context.live is None else context.live.to(p))
        return Mix(p, torch.arange(p.shape[1], device=p.device).expand_as(p))

    def _dropped(self, p: Tensor, live: Tensor) -> Tensor:
        kept = p * (torch.rand_like(p) >= self.dropout) + 1e-10 * live
        return kept / kept.sum(1, keepdim=True).clamp(min=1e-30)
