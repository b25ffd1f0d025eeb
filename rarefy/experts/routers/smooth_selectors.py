"""DSelect-k: a gate that is smooth everywhere and comes to use at most k experts by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Affinity, Choice
from rarefy.experts.routing import dense, positive, real_rows


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    """``S(t) = -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2`` within gamma/2 of zero, exactly 0 below and exactly 1 above: once differentiable.

    Source: Hazimeh et al., DSelect-k, arXiv 2106.03760, from arXiv 2002.07772.

    >>> smooth_step(torch.tensor([-0.5, 0.0, 0.25, 0.5])).tolist()
    [0.0, 0.5, 0.84375, 1.0]
    """
    t = t.clamp(-gamma / 2, gamma / 2)
    inside: Tensor = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    return inside.clamp(0.0, 1.0)


def bits(experts: int) -> int:
    """How many bits tell so many experts apart: ``ceil(log2 E)``."""
    return (experts - 1).bit_length()


def selections(z: Tensor, experts: int, gamma: float) -> Tensor:
    """z [..., k, m] -> r [..., k, E]: ``r_i[e] = prod_b S(z_ib)`` where bit b of e (the highest first) is 1, ``1 - S(z_ib)`` where it is 0.

    A selector's r adds up to 1 over all 2^m codes: to less where there are fewer experts.

    >>> selections(torch.tensor([[0.5, -0.5]]), 4, 1.0).tolist()
    [[0.0, 0.0, 1.0, 0.0]]
    """
    on = smooth_step(z, gamma)[..., None, :]
    shift = torch.arange(bits(experts) - 1, -1, -1, device=z.device)
    code = (torch.arange(experts, device=z.device)[:, None] >> shift & 1).bool()
    return torch.where(code, on, 1 - on).prod(-1)


class _Gate(nn.Module):
    """What the two gates share: from z [..., k, m] and w [..., k] to scores."""

    def __init__(self, experts: int, selectors: int, gamma: float, entropy: float) -> None:
        super().__init__()
        if selectors < 1 or not gamma > 0:
            raise BadInput(f"{selectors} selectors, gamma {gamma}", "there is at least one selector, and gamma is positive", "pass for example selectors=2, gamma=1.0")
        self.experts, self.selectors, self.gamma, self.entropy = experts, selectors, gamma, entropy

    def _scores(self, z: Tensor, w: Tensor, rows: int, context: Context) -> Scores:
        r = selections(z, self.experts, self.gamma)
        q = (w.softmax(-1)[..., None] * r).sum(-2)
        return Scores(q.expand(rows, -1), losses=self._losses(r.expand(rows, -1, -1), context.valid) if context.training else {})

    def _losses(self, r: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """Means over the rows that are not padding, sums over selectors."""
        real = real_rows(r, valid)

        def mean(each: Tensor) -> Tensor:
            return (each.sum(-1) * real).sum() / real.sum().clamp(min=1)

        losses = {"entropy": self.entropy * mean(-(r * (r + 1e-6).log()).sum(-1))}
        if self.experts < 2 ** bits(self.experts):
            losses["reach"] = mean(1 / (r.sum(-1) + 1e-6))
        return losses


class Selectors(_Gate, Affinity):
    """Score experts per row: ``q = sum_i softmax(w)_i r_i``, k selectors r_i of one expert each, z and w linear in the row.

    x [R, d] of any float type -> float32 Scores with logits q [R, E] >= 0 that add up to at most 1: choose with `DSelect`. Every bit
    starts near one half, so that q is nearly even and dense; a bit that has reached 0 or 1 gets no gradient from its row, and where all
    have, a row has at most k experts. In training the scores carry two losses, means over rows: `entropy` times the selectors' entropies,
    which drives the bits apart, and, for a number of experts that is no power of 2, ``sum_i 1 / sum_e r_i[e]``, which keeps selectors off codes without
    an expert. Source: Hazimeh et al., arXiv 2106.03760, and its code google-research/dselect_k_moe, which sums over rows.

    Raises:
        BadInput: no selector, gamma not positive.

    >>> scores = Selectors(8, 4)(torch.randn(3, 8), Context(), None)
    >>> torch.allclose(scores.logits.sum(1), torch.ones(3)), bool((scores.logits > 0).all())
    (True, True)
    """

    def __init__(self, width: int, experts: int, *, selectors: int = 2, gamma: float = 1.0, entropy: float = 0.1) -> None:
        super().__init__(experts, selectors, gamma, entropy)
        self.z, self.w = nn.Linear(width, selectors * bits(experts)), nn.Linear(width, selectors)
        for layer, bound in ((self.z, gamma / 100), (self.w, 0.05)):
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            seen = x.float()
            z = nn.functional.linear(seen, self.z.weight.float(), self.z.bias.float()).unflatten(1, (self.selectors, -1))
            return self._scores(z, nn.functional.linear(seen, self.w.weight.float(), self.w.bias.float()), len(x), context)


class StaticSelectors(_Gate, Affinity):
    """Score experts alike for every row: as `Selectors`, z [k, m] and w [k] being parameters. One per task over one bank is multi-task learning.

    >>> gate = StaticSelectors(8, 4)
    >>> gate(torch.randn(3, 8), Context(), None).logits.shape
    torch.Size([3, 4])
    """

    def __init__(self, width: int, experts: int, *, selectors: int = 2, gamma: float = 1.0, entropy: float = 0.1) -> None:
        super().__init__(experts, selectors, gamma, entropy)
        self.z = nn.Parameter(torch.empty(selectors, bits(experts)).uniform_(-gamma / 100, gamma / 100))
        self.w = nn.Parameter(torch.empty(selectors).uniform_(-0.05, 0.05))

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            return self._scores(self.z.float(), self.w.float(), len(x), context)

    def settled(self) -> bool:
        """Whether every bit is exactly 0 or 1, so that every row has at most k experts."""
        on = smooth_step(self.z.detach(), self.gamma)
        return bool(((on == 0) | (on == 1)).all())


@dataclass(frozen=True)
class DSelect(Choice):
    """Serve each row by every expert that its gate does not rule out, at the gate's weight: ``y = sum_e q_e E_e(x)``, ``q_e > 0``.

    Scores with logits q [R, E], of `Selectors` -> Routing of R*E assignments, those with q = 0 to nobody (which costs no expert). At
    first q is dense, and it costs what a dense mixture does; `selectors` bounds the experts of a row once its bits are 0 or 1.
    Source: Hazimeh et al., arXiv 2106.03760.

    >>> r = DSelect()(Scores(torch.tensor([[0.25, 0.0, 0.75]])), Context())
    >>> r.expert.tolist(), r.weight.tolist()
    ([0, 3, 2], [0.25, 0.0, 0.75])
    """

    name = "dselect"
    paper = Paper(
        "dselect-k",
        "DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning",
        "arXiv 2106.03760",
        (
            "the equations were read in the authors' code alone, not in the paper; it sums its losses over rows where we take means",
            "the weight of the entropy is a constant, where the code lets it follow the step",
            "nothing is rounded at export: a row whose bits have not settled keeps more than k experts",
            "the recommender and vision experiments were not run",
        ),
    )
    selectors: int = 2
    gamma: float = 1.0
    entropy: float = 0.1

    def affinity(self, width: int, experts: int, /) -> Affinity:
        return Selectors(width, experts, selectors=self.selectors, gamma=self.gamma, entropy=self.entropy)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return positive(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        weight = dense(routing)
        return {"an expert's weight is its score, or it serves no row": bool(((weight == scores.logits) | (weight == 0)).all())}
