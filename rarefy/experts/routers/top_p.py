"""Top-p: as many experts as it takes for their probability to exceed p."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Paper, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.row_entropy import RowEntropy
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.routing import per_row, probabilities, ranked, row_major


@dataclass(frozen=True)
class TopP(Choice):
    """Choose the fewest likeliest experts whose mass exceeds p: expert i joins while the mass before it is at most p, ``w = p_i``.

    Scores with logits [R, E] -> Routing of R*E assignments, likeliest first, those not chosen to nobody (which costs no expert). The
    expert that crosses p is chosen; p = 1 chooses all. Weights are not renormalised: that would reward asking for more.
    Source: Huang et al., Harder Tasks Need More Experts, arXiv 2403.07652, and its code ZhenweiAn/Dynamic_MoE (the mass must exceed p).

    Raises:
        BadInput: p outside 0..1.

    >>> import torch
    >>> r = TopP(0.5)(Scores(torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]).log()), Context())
    >>> r.expert.tolist()
    [0, 3, 3, 0, 1, 3]
    """

    name = "top-p"
    paper = Paper(
        "top-p-moe",
        "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
        "arXiv 2403.07652",
        (
            "the load in the balance loss is the share of assignments, where the paper's is the share of rows: they differ by the mean number of experts per row",
            "the losses and their weights were read in accounts of the paper; its published code is for inference",
        ),
    )
    balances = (LoadBalance(0.01), RowEntropy(1e-4))
    p: float = 0.4

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise BadInput(f"p = {self.p}", "a probability mass lies in [0, 1]", "pass for example 0.4")

    def __call__(self, scores: Scores, context: Context) -> Routing:
        weight, expert, before = ranked(probabilities(scores.logits, context.live).float())
        chosen = (before <= self.p) | (self.p >= 1)  # a sum may round to 1 before the last expert
        return row_major(scores, context, expert.where(chosen, scores.logits.shape[1]), weight)

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        served = per_row(routing)
        return {"a row that has an expert at all has its likeliest": bool(((routing.expert.view(served.numel(), -1)[:, 0] < routing.experts) | (served == 0)).all())}
