"""Adaptive gating: a second expert only where the first is not clearly ahead."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.lone_choice import LoneChoiceBalance
from rarefy.experts.routing import per_row, probabilities, ranked, row_major


@dataclass(frozen=True)
class Gap(Choice):
    """Choose the likeliest expert, and the second where ``p_1 - p_2 <= threshold``; the weights are the probabilities.

    Scores with logits [R, E] -> Routing of R*2 assignments (R with one expert), first choice first, a second not taken to nobody.
    A threshold of 1 is `TopK(2, renormalise=False)`, one below every gap `Switch`. Nothing bounds an expert's load.
    Source: Li et al., Adaptive Gating in Mixture-of-Experts based Language Models, EMNLP 2023.

    Raises:
        BadInput: a threshold outside 0..1.

    >>> import torch
    >>> Gap(0.1)(Scores(torch.tensor([[0.5, 0.45, 0.05], [0.6, 0.3, 0.1]]).log()), Context()).expert.tolist()
    [0, 1, 0, 3]
    """

    name = "gap"
    paper = Paper(
        "adaptive-gating",
        "Adaptive Gating in Mixture-of-Experts based Language Models",
        "EMNLP 2023",
        (
            "the curriculum is an order of the samples (`rarefy.experts.curriculum`), which no command applies",
            "one expert is weighted by its probability, as in top-1 gating, and two by theirs; the paper's text was read in a summary that leaves their scale open",
        ),
    )
    balances = (LoneChoiceBalance(),)
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise BadInput(f"threshold {self.threshold}", "a gap between probabilities lies in [0, 1]", "pass for example 0.1")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        weight, expert = (t[:, :2] for t in ranked(probabilities(scores.logits, context.live))[:2])
        chosen = weight[:, :1] - weight <= self.threshold
        chosen[:, :1] = True
        return row_major(scores, context, expert.where(chosen, scores.logits.shape[1]), weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {"at most two experts per row": bool((per_row(routing) <= 2).all())}
