"""Threshold routing of narrow experts: one more while the mass before it is below p."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.first_choice import FirstChoiceBalance
from rarefy.experts.overflow.row_capacity import RowCapacity
from rarefy.experts.routing import per_row, probabilities, ranked, row_major


@dataclass(frozen=True)
class MassBefore(Choice):
    """Choose the fewest likeliest experts whose mass reaches p: expert i joins while the mass before it is below p, ``w = p_i``.

    Scores with logits [R, E] -> Routing of R*E assignments, likeliest first (their rank is what `RowCapacity` serves by), those not
    chosen to nobody (which costs no expert). At least one is chosen; p = 1 chooses all. Weights are not renormalised.
    Source: Yang et al., arXiv 2403.18926, and its code ysngki/XMoE, `main_thresholdGating`.

    Raises:
        BadInput: p outside 0..1.

    >>> import torch
    >>> MassBefore(0.5)(Scores(torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.5, 0.1]]).log()), Context()).expert.tolist()
    [0, 3, 3, 1, 3, 3]
    """

    name = "mass-before"
    paper = Paper(
        "xmoe-threshold",
        "Enhancing Efficiency in Sparse Models with Sparser Selection",
        "arXiv 2403.18926",
        (
            "a trained dense layer is not split by a command",
            "of equal rank an expert keeps the earlier rows, where the authors' code leaves it to topk",
        ),
    )
    balances = (FirstChoiceBalance(),)
    overflow = RowCapacity(8.0)
    p: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise BadInput(f"p = {self.p}", "a probability mass lies in [0, 1]", "pass for example 0.9")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        weight, expert, before = ranked(probabilities(scores.logits, context.live).float())
        chosen = (before < self.p) | (self.p >= 1)  # a sum may round to 1 before the last expert
        chosen[:, :1] = True
        return row_major(scores, context, expert.where(chosen, scores.logits.shape[1]), weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        served = per_row(routing)
        return {"a row that has an expert at all has its likeliest": bool(((routing.expert.view(served.numel(), -1)[:, 0] < routing.experts) | (served == 0)).all())}
