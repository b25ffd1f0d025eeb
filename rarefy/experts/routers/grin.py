"""GRIN: k experts per row, sampled one after the other in training, and a gradient for the router that is exact on cubic losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.routers.sparse_mixer import near_best
from rarefy.experts.routing import at_most, need_k, probabilities, row_major


def heun(p: Tensor, whole: Tensor, gain: float) -> Tensor:
    """The weight of a sampled expert: forward p where `whole`, else p / 3; backward `gain` times what comes from above, either way.

    The part of the gradient of ``sum_D p_D L(p_D E_D)`` that is through the sampling is ``sum_D L(p_D E_D) dp_D``, and with f(t) = L(t p E)
    by Heun's rule of third order ``f(1) - f(0) = f'(1) / 4 + 3 f'(1/3) / 4``: whole by a chance of 1/4 and gain 1. With 5/8 and gain 2 the
    part through the weight, f'(1), is in it too. Both are exact on losses that are cubic in the output, on average over samples and coins.
    Source: Liu et al., GRIN, arXiv 2409.12136, and its code microsoft/SparseMixer.

    >>> p = torch.tensor([0.6, 0.6], requires_grad=True)
    >>> w = heun(p, torch.tensor([True, False]), 1.0)
    >>> w.sum().backward(); [round(x, 6) for x in w.tolist()], p.grad.tolist()
    ([0.6, 0.2], [1.0, 1.0])
    """
    held = p.detach()
    return held * (1 + 2 * whole) / 3 + gain * (p - held)


@dataclass(frozen=True)
class Grin(Choice):
    """Sample k experts one after the other in training, ``D ~ p``, and take the likeliest outside it; ``y = sum_j w_j E_j(x)``.

    Scores with logits z [R, E] -> Routing of R*k assignments, first choice first. Each time p is a softmax of ``z / temperature`` over the
    experts that are left and near the best of them (`epsilon`, see `near_best`); a row of which nothing is left has fewer. The weight is
    `heun(p_D, whole, gain)`: whole for the likeliest of those left, for others by `chance`; weights of a row are not renormalised.
    Without a capacity. The defaults estimate the gradient through the sampling; chance 0.625, gain 2 and temperature 2 the whole of it.
    Source: Liu et al., GRIN, arXiv 2409.12136, and its code microsoft/SparseMixer; transformers' Phi-3.5-MoE has the same.

    Raises:
        BadInput: k outside 1..E, a negative epsilon, a chance outside [0, 1], a gain or temperature that is not positive.

    >>> r = Grin(2)(Scores(torch.tensor([[1.0, 1.0, 0.0]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 1], [0.5, 1.0])
    """

    name = "grin"
    paper = Paper(
        "grin",
        "GRIN: GRadient-INformed MoE",
        "arXiv 2409.12136",
        (
            "the equations rest on notes of the paper and its code, compared with transformers' Phi-3.5-MoE; whole chance 0.625 with gain 2 on the notes and its exactness alone",
            "an expert's gradient has the scale of the forward, as in the code; the paper's formula leaves it unscaled",
            "the balance loss sees the load of one process, where the paper sums it over all; the placement over devices is left to the host",
            "its language models were not trained",
        ),
    )
    balances = (LoadBalance(0.01),)
    k: int = 2
    epsilon: float = 0.1
    chance: float = 0.25
    gain: float = 1.0
    temperature: float = 1.0

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(1), cls(2, chance=0.625, gain=2.0, temperature=2.0))

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and 0 <= self.chance <= 1 and self.gain > 0 and self.temperature > 0):
            raise BadInput(f"{self!r}", "jitter is not negative, a chance lies in [0, 1], gain and temperature are positive")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        z = scores.logits.float()
        need_k(self.k, z.shape[1])
        left = torch.ones_like(z, dtype=torch.bool) if context.live is None else context.live.expand_as(z)
        experts, weights = [], []
        for _ in range(self.k):
            expert, weight = self._one(z, left, context.training)
            some = left.any(-1, keepdim=True)
            experts.append(expert.where(some, z.shape[1]))
            weights.append(weight)
            left = left.scatter(1, expert, False)
        return row_major(scores, context, torch.cat(experts, 1), torch.cat(weights, 1))

    def _one(self, z: Tensor, left: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """One of the experts left [R, E] for each row and its weight, two of [R, 1]."""
        seen = near_best(z, left, self.epsilon)
        p, best = probabilities(seen / self.temperature, left), seen.detach().max(-1, keepdim=True).indices
        if not training:
            return best, p.gather(1, best)
        noisy = seen.detach() / self.temperature - torch.empty_like(z).exponential_().log()
        sampled = noisy.masked_fill(p.detach() == 0, -torch.inf).max(-1, keepdim=True).indices
        chosen = p.gather(1, sampled)
        return sampled, heun(chosen, (sampled == best) | (torch.rand_like(chosen) < self.chance), self.gain)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return at_most(self.k, routing)
