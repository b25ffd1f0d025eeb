"""The parameter penalty: what an expert's rows cost is its width, so that wide experts are for rows that need them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import scores_of, valid_rows
from rarefy.experts.routing import probabilities


@dataclass(frozen=True)
class ParameterPenalty(Balance):
    """Ask for few active parameters: ``alpha * L * sum_e M_e P_e`` with ``M_e = n_e / R * D_e / mean(D)`` over the L live experts.

    n_e of the R rows that are not padding go to expert e of inner width D_e (a count, no gradient; widths are the bank's `widths`, and
    equal where it has none), P_e is its mean probability. Equal widths give the load-balancing loss times the mean number of experts
    per row. Source: Wang et al., HMoE, arXiv 2408.10681; widths are taken over their mean, so that alpha does not depend on the scale.

    Raises:
        BadInput: the routing carries no scores.
    """

    name = "parameter_penalty"
    alpha: float = 0.1

    def even(self, experts: int) -> float:
        return self.alpha

    def __call__(self, entry: Entry) -> Tensor:
        live, valid = entry.context.live, valid_rows(entry)
        p = probabilities(scores_of(entry).logits.float(), live)
        rows = valid.sum().clamp(min=1)
        load = entry.routing.count(valid[entry.routing.rows()]).to(p)
        if entry.routing.dropped is not None:
            load = load + entry.routing.dropped
        experts = entry.routing.experts if live is None else live.sum()
        return self.alpha * experts * (load / rows * sizes(entry).to(p) * (p * valid[:, None]).sum(0) / rows).sum()


def sizes(entry: Entry) -> Tensor:
    """Each expert's inner width over their mean [E]; ones where the layer's bank does not say."""
    widths: Tensor | None = getattr(getattr(entry.layer, "bank", None), "widths", None)
    if widths is None:
        return scores_of(entry).logits.new_ones(entry.routing.experts)
    return widths / widths.float().mean()
