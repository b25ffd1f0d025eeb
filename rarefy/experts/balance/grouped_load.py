"""The load-balancing loss over groups of experts, as on devices: within a group the load may be uneven."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import scores_of, valid_rows
from rarefy.experts.routing import probabilities


@dataclass(frozen=True)
class GroupedLoad(Balance):
    """Ask for an even load over D groups of experts: ``alpha * sum_d f'_d P'_d``, f' the mean over the group of ``f_i = L share_i``, P' the sum of P_i.

    share_i is expert i's part of all assignments (a count, no gradient), P_i its mean probability over rows that are not padding, L the
    live experts; groups are equally many, neighbouring experts, and a dead expert is in no group. An Entry of one layer -> scalar; even
    gives alpha, collapse onto one certain expert alpha * D (for groups of one size), no rows or nobody live 0.
    Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.3, device-level balance loss.

    Raises:
        BadInput: the groups do not divide the experts; the routing carries no logits.
    """

    name = "grouped_load"
    alpha: float = 0.05
    groups: int = 2

    def even(self, experts: int) -> float:
        return self.alpha

    def __call__(self, entry: Entry) -> Tensor:
        experts, live = entry.routing.experts, entry.context.live
        if self.groups < 1 or experts % self.groups:
            raise BadInput(f"{self.groups} groups of {experts} experts", "the groups of experts are equally large", "choose a number of groups that divides the experts")
        real = valid_rows(entry)
        load = entry.routing.count(real[entry.routing.rows()])
        if entry.routing.dropped is not None:
            load = load + entry.routing.dropped
        p = (probabilities(scores_of(entry).logits.float(), live) * real[:, None]).sum(0) / real.sum().clamp(min=1)
        alive = p.new_ones(experts) if live is None else live.to(p)
        share = load.to(p) / load.sum().clamp(min=1) * alive.sum()
        members = alive.view(self.groups, -1).sum(1).clamp(min=1)
        return self.alpha * (share.view(self.groups, -1).sum(1) / members * p.view(self.groups, -1).sum(1)).sum()
