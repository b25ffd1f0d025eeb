"""The load-balancing loss of first choices: what a row asks for besides does not count as load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import load_times_probability, scores_of, valid_rows
from rarefy.experts.routing import probabilities


@dataclass(frozen=True)
class FirstChoiceBalance(Balance):
    """Ask for even first choices: ``alpha * L * sum_e f_e P_e`` with f_e the fraction of rows whose likeliest expert is e.

    f is read off the scores (no gradient), so that what capacity dropped counts; L, P, padding and `live` are as in `LoadBalance`.
    An Entry of one layer -> scalar. Source: ysngki/XMoE, `l_aux` of `main_thresholdGating` (arXiv 2403.18926).

    Raises:
        BadInput: the routing carries no scores.
    """

    name = "first_choice"
    alpha: float = 0.01

    def even(self, experts: int) -> float:
        return self.alpha

    def __call__(self, entry: Entry) -> Tensor:
        logits = scores_of(entry).logits.detach().float()
        first = probabilities(logits, entry.context.live).argmax(-1)
        load = torch.zeros(logits.shape[1], device=logits.device).scatter_add(0, first, valid_rows(entry).float())
        return self.alpha * load_times_probability(entry, load)
