"""The load-balancing loss of one layer: fractions of rows times mean probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry, Scores
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

    def even(self, experts: int) -> float:
        return self.alpha

    def __call__(self, entry: Entry) -> Tensor:
        load = entry.routing.count(valid_rows(entry)[entry.routing.rows()])
        if entry.routing.dropped is not None:
            load = load + entry.routing.dropped
        return self.alpha * load_times_probability(entry, load)


def scores_of(entry: Entry) -> Scores:
    """The scores that a balance loss needs.

    Raises:
        BadInput: the routing carries none.
    """
    if entry.routing.scores is None:
        raise BadInput(f"balance loss of {entry.path}", "the routing must carry its scores")
    return entry.routing.scores


def valid_rows(entry: Entry) -> Tensor:
    """Bool [R], False at padding."""
    valid = entry.context.valid
    return torch.ones(entry.routing.items, dtype=torch.bool, device=entry.routing.expert.device) if valid is None else valid.reshape(-1)


def load_times_probability(entry: Entry, load: Tensor) -> Tensor:
    """``L * sum_e f_e P_e`` of counts [E]: f is the load's share, P the mean probability over rows that are not padding; 0 without any load."""
    live, valid = entry.context.live, valid_rows(entry)
    p = probabilities(scores_of(entry).logits.float(), live)
    fraction = load.to(p) / load.sum().clamp(min=1)
    mean = (p * valid[:, None]).sum(0) / valid.sum().clamp(min=1)
    experts = entry.routing.experts if live is None else live.sum()
    return experts * (fraction * mean).sum()
