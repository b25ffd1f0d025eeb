"""Fine-grained experts: many narrow ones, many of them per row, beside shared ones that serve every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.routing import need_k, per_row, probabilities, ranked, row_major
from rarefy.experts.shared import Shared


class Segments(NamedTuple):
    """How many experts are routed, how many of them a row gets, how many are shared, and how wide each is."""

    experts: int
    k: int
    shared: int
    inner: int


def segmented(experts: int, k: int, inner: int, *, m: int, shared: int = 0) -> Segments:
    """Split each of `experts` experts of width `inner` into m, and make `shared` of the parts shared: as many parameters, as much compute.

    ``m N - K_s`` experts are routed, ``m K - K_s`` of them per row, each 1/m as wide. Source: Dai et al., arXiv 2401.06066, sections 3.1-3.2.

    Raises:
        BadInput: m does not divide the width, or nothing would be left to route.

    >>> segmented(16, 2, 512, m=4, shared=1)
    Segments(experts=63, k=7, shared=1, inner=128)
    """
    if m < 1 or inner % m:
        raise BadInput(f"{m} parts of an expert of width {inner}", "the parts are equally wide", "choose an m that divides the width")
    if not 0 <= shared < m * k:
        raise BadInput(f"{shared} shared of {m * k} active experts", "at least one active expert is routed", f"share at most {m * k - 1}")
    return Segments(m * experts - shared, m * k - shared, shared, inner // m)


@dataclass(frozen=True)
class FineGrained(Choice):
    """Choose the k likeliest experts at their own probability, beside `n_shared` shared ones at weight 1: ``y = sum_shared E(x) + sum_top p_i E_i(x)``.

    Scores with logits [R, E] of the routed experts -> Routing of R*k assignments, first choice first; ranked by `select` where the
    scores carry one, weighed by p = softmax(logits) always, not renormalised; of equals the lower index. The shared experts have no
    logit. `segmented` turns a usual layer's sizes into those of narrow experts at equal parameters and compute.
    Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.

    Raises:
        BadInput: k outside 1..E, a negative number of shared experts.

    >>> r = FineGrained(2)(Scores(torch.tensor([[0.5, 0.25, 0.25]]).log()), Context())
    >>> r.expert.tolist(), [round(w, 2) for w in r.weight.tolist()]
    ([0, 1], [0.5, 0.25])
    """

    name = "fine-grained"
    paper = Paper(
        "deepseekmoe",
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        "arXiv 2401.06066",
        (
            "the equations were read in the paper (sections 3 and 4.5), and the layer compared with transformers' DeepSeek-V2",
            "the device-level loss is a part of its own (grouped_load), as in the paper's smaller models off by default",
            "experts are drawn by their own width, where the paper draws every weight with deviation 0.006",
            "that finer and shared experts lose less at equal budgets did not reproduce on a character model of 8 experts in 1,200 steps (three seeds)",
            "its language models were not trained, and the dense first layer of its larger ones is left to the host",
        ),
    )
    balances = (LoadBalance(0.01),)
    k: int = 2
    n_shared: int = 1

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (cls(), cls(1, 0))

    def __post_init__(self) -> None:
        if self.n_shared < 0:
            raise BadInput(f"{self.n_shared} shared experts", "there are none or some")

    def shared(self, width: int, inner: int) -> nn.Module | None:
        return Shared(GLU(self.n_shared, width, inner)) if self.n_shared else None

    def __call__(self, scores: Scores, context: Context) -> Routing:
        p = probabilities(scores.logits.float(), context.live)
        need_k(self.k, p.shape[1])
        seen = p if scores.select is None else scores.select
        if context.live is not None:
            seen = seen.masked_fill(~context.live, -torch.inf)
        expert = ranked(seen)[1][:, : self.k]
        return row_major(scores, context, expert, p.gather(1, expert))

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {f"at most {self.k} routed experts per row": bool((per_row(routing) <= self.k).all())}
