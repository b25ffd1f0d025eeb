"""The load-balancing loss of one layer: fractions of rows times mean probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.routing import probabilities


@dataclass(frozen=True)
class LoadBalance(Balance):
    """Ask for an even load: ``alpha * L * sum_e f_e P_e`` over the L live experts (all E without `context.live`).

    f_e is the fraction of the router's assignments to expert e (a count, no gradient), P_e its mean probability over rows, a
    softmax over the live experts; padding (`context.valid` False) counts in neither. Rows dropped by capacity still count in f: the router chose them.
    An Entry of one layer -> scalar; uniform routing gives alpha, collapse onto one certain expert alpha * L, no rows or nobody live 0.
    Source: Fedus et al., arXiv 2101.03961, eqs. 4-6.

    Raises:
        BadInput: the routing carries no logits.
    """

    name = "load_balance"
    alpha: float = 0.01

    def __call__(self, entry: Entry) -> Tensor:
        routing = entry.routing
        if routing.scores is None:
            raise BadInput(f"balance loss of {entry.path}", "the routing must carry its scores")
        valid, live = entry.context.valid, entry.context.live
        p = probabilities(routing.scores.logits.float(), live)
        valid = torch.ones(routing.items, dtype=torch.bool, device=p.device) if valid is None else valid.reshape(-1)
        load = routing.count(valid[routing.rows()]).to(p)
        if routing.dropped is not None:
            load = load + routing.dropped
        fraction = load / load.sum().clamp(min=1)
        mean = (p * valid[:, None]).sum(0) / valid.sum().clamp(min=1)
        experts = routing.experts if live is None else live.sum()
        return self.alpha * experts * (fraction * mean).sum()
