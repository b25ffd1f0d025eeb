"""The load-balancing loss of the rows that one expert serves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import load_times_probability, valid_rows
from rarefy.experts.routing import per_row


@dataclass(frozen=True)
class LoneChoiceBalance(Balance):
    """Ask for an even load by rows with one expert: ``alpha * L * sum_e f_e P_e``, f_e the fraction of such rows that go to e.

    P_e is the mean probability over all rows; L, padding and `live` are as in `LoadBalance`; 0 where every row has several experts.
    The layer should bound nothing: a row whose second expert was dropped looks like one with one.
    An Entry of one layer -> scalar. Source: Li et al., Adaptive Gating, EMNLP 2023, the balance loss on top-1 decisions.

    Raises:
        BadInput: the routing carries no scores.
    """

    name = "lone_choice"
    alpha: float = 0.01

    def even(self, experts: int) -> float:
        return self.alpha

    def __call__(self, entry: Entry) -> Tensor:
        routing = entry.routing
        lone = valid_rows(entry) & (per_row(routing) == 1)
        return self.alpha * load_times_probability(entry, routing.count(lone[routing.rows()]))
