"""Experts of different widths, chosen by probability mass, with a penalty on what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.parameter_penalty import ParameterPenalty
from rarefy.experts.balance.row_entropy import RowEntropy
from rarefy.experts.banks.ragged import ragged
from rarefy.experts.routers.top_p import TopP


@dataclass(frozen=True)
class BySize(Choice):
    """Choose as top-p does, among experts of different widths: ``w = p_i``, the fewest likeliest whose mass exceeds p.

    Scores with logits [R, E] -> Routing of R*E assignments, as of `TopP`. What is new is with it: a bank of widths in equal steps
    (`Ragged`), a penalty on active parameters in place of a balance of loads, and the entropy of rows, minimised.
    Source: Wang et al., HMoE, arXiv 2408.10681.

    Raises:
        BadInput: p outside 0..1.

    >>> import torch
    >>> BySize(0.5)(Scores(torch.tensor([[0.6, 0.3, 0.1]]).log()), Context()).expert.tolist()
    [0, 3, 3]
    """

    name = "by-size"
    paper = Paper(
        "hmoe",
        "HMoE: Heterogeneous Mixture of Experts for Language Modeling",
        "arXiv 2408.10681",
        (
            "the equations rest on a summary of the paper alone: no code was found, and the paper was not read",
            "the penalty takes widths over their mean, where the summary has them as they are; entropy is minimised, whatever the sign in print",
            "without any loss on loads our character model collapses onto one wide expert a row, so that the penalty makes experts narrower and not active parameters fewer in all",
            "other progressions of widths are given to the bank; transformers' fused experts cannot hold them",
            "its language models were not trained",
        ),
    )
    bank = staticmethod(ragged)
    balances = (ParameterPenalty(0.1), RowEntropy(3e-2))
    p: float = 0.6

    def __post_init__(self) -> None:
        TopP(self.p)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return TopP(self.p)(scores, context)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return TopP(self.p).invariants(routing, scores, context)
