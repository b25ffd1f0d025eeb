"""The entropy of each row's probabilities: ask every row for few experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import scores_of, valid_rows
from rarefy.experts.routing import probabilities

_OTHERWISE = "it asks each row to be sure, whichever expert it is sure of; it is used beside a balance of loads"


@dataclass(frozen=True)
class RowEntropy(Balance):
    """Ask each row to be sure: ``beta * mean_r -sum_e p_re ln p_re`` over rows that are not padding, in nats.

    p is a softmax over the live experts. Without it a router that chooses by probability mass may flatten p and have every expert.
    An Entry of one layer -> scalar; equal logits give beta ln L, no rows 0.
    Source: Huang et al., Harder Tasks Need More Experts, arXiv 2403.07652, the dynamic loss.

    Raises:
        BadInput: the routing carries no scores.
    """

    name = "row_entropy"
    exceptions: ClassVar[dict[str, str]] = {"a_collapsed_layer_costs_more": _OTHERWISE, "two_layers_collapsed_on_different_experts_are_both_seen": _OTHERWISE}
    beta: float = 1e-4

    def even(self, experts: int) -> float:
        return self.beta * math.log(experts)

    def __call__(self, entry: Entry) -> Tensor:
        valid, p = valid_rows(entry), probabilities(scores_of(entry).logits.float(), entry.context.live)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
        return self.beta * (entropy * valid).sum() / valid.sum().clamp(min=1)
