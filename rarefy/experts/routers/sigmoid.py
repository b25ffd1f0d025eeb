"""Sigmoid routing: experts do not compete, a row takes the k that it likes most, each at its own weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.mean_entropy import MeanEntropy
from rarefy.experts.banks.relu import ReLU
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routing import at_most, need_k, row_major


@torch.no_grad()
def directions(width: int, experts: int, layers: int = 2) -> Linear:
    """A linear router whose rows differ in direction alone: one length, and the matrix [E, d] has standard deviation ``sqrt(2 / (d layers))``.

    Source: Csordas et al., arXiv 2310.10837, section 5: the deviation is that of the experts' first layer.

    >>> weight = directions(8, 4).weight.detach()
    >>> bool(torch.allclose(weight.norm(dim=1), weight[0].norm())), round(weight.std().item(), 3)
    (True, 0.354)
    """
    router = Linear(width, experts)
    weight = router.weight
    weight.div_(weight.norm(dim=1, keepdim=True))
    weight.mul_((2 / (width * layers)) ** 0.5 / weight.std())
    return router


@dataclass(frozen=True)
class Sigmoid(Choice):
    """Choose the k largest logits and weigh each by itself: ``w_e = sigmoid(logit_e)``, not renormalised.

    Scores with logits [R, E] -> Routing of R*k assignments, row-major, first choice first; of equals the lower index. In training
    every expert is out of a row's reach with probability `dropout`, drawn per row and expert before the choice; where fewer than k
    are left, the missing choices go to nobody. Dead experts are out of reach too.
    Source: Csordas et al., arXiv 2310.10837, eqs. 11-12 and 22, section 5 (sigma-MoE; the paper has k = 4 of 16 or 32 experts).

    Raises:
        BadInput: k outside 1..E, dropout outside [0, 1].

    >>> r = Sigmoid(2)(Scores(torch.tensor([[0.0, 0.0, -9.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 1], [0.5, 0.5])
    """

    name = "sigmoid"
    paper = Paper(
        "sigma-moe",
        "Approximating Two-Layer Feedforward Networks for Efficient Transformers",
        "arXiv 2310.10837",
        (
            "the paper's other approximations (top-k activation, product keys) and its S-BASE variant are not part of this row",
            "the entropy of the mean distribution is of one process's rows, where the released code joins those of all",
            "its size of an expert has no lower bound here, where the paper finds fewer than 128 inner units too few",
            "the paper's language models were not trained",
        ),
    )
    affinity = staticmethod(directions)
    bank = ReLU
    balances = (MeanEntropy(),)
    k: int = 2
    dropout: float = 0.05

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(1, dropout=0.0), cls(2), cls(1, dropout=0.5))

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise BadInput(f"expert dropout {self.dropout}", "a probability lies in [0, 1]", "pass for example 0.05")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        z = scores.logits
        need_k(self.k, z.shape[1])
        out = self._out_of_reach(z, context)
        # The stable sort of what is out of reach goes second: a logit may itself be as low as -inf.
        order = z.detach().argsort(dim=-1, stable=True, descending=True)
        order = order.gather(1, out.gather(1, order).int().argsort(dim=-1, stable=True))[:, : self.k]
        expert = order.masked_fill(out.gather(1, order), z.shape[1])
        return row_major(scores, context, expert, z.gather(1, order).sigmoid())

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return at_most(self.k, routing)

    def _out_of_reach(self, z: Tensor, context: Context) -> Tensor:
        """[R, E], True where an expert may not be chosen."""
        dead = torch.zeros_like(z, dtype=torch.bool) if context.live is None else ~context.live.expand_as(z)
        if not (self.dropout and context.training):
            return dead
        return dead | (torch.rand_like(z) < self.dropout)
