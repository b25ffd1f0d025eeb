"""The load loss: how many rows each expert expects under its noise, an estimate with a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.importance import cv_squared
from rarefy.experts.balance.switch_balance import scores_of, valid_rows

_OUT = -1e9  # below any logit, and finite: its quotient by a standard deviation has a gradient of 0


@dataclass(frozen=True)
class SmoothLoad(Balance):
    """Ask for equal expected loads: ``w * CV(sum_r P_r)^2`` with ``P_re = Phi((logit_re - t_re) / std_re)``.

    t_re is the k-th largest noisy logit of row r without expert e: P is the chance that e is chosen were its own noise drawn anew.
    `Scores.select` holds the noisy logits and `Scores.noise` their standard deviations; without noise (evaluation) the load is
    counted and has no gradient. Padding and dead experts do not count. An Entry of one layer -> scalar; equal loads give 0.
    Source: Shazeer et al., arXiv 1701.06538, appendix A, eqs. 8-10.

    Raises:
        BadInput: the routing carries no scores, or no k.
    """

    name = "smooth_load"
    weight: float = 0.1

    def even(self, experts: int) -> float:
        return 0.0

    def __call__(self, entry: Entry) -> Tensor:
        scores, valid = scores_of(entry), valid_rows(entry)
        if scores.noise is None or scores.select is None:
            load = entry.routing.count(valid[entry.routing.rows()]).float()
        else:
            if entry.routing.k is None:
                raise BadInput(f"smooth load of {entry.path}", "the routing must say how many experts a row has (k)")
            chance = chances(scores.logits, scores.select, scores.noise, entry.routing.k, entry.context.live)
            load = (chance * valid[:, None]).sum(0)
        return self.weight * cv_squared(load, entry.context.live)


def chances(logits: Tensor, noisy: Tensor, std: Tensor, k: int, live: Tensor | None = None) -> Tensor:
    """[R, E]: the chance that an expert is among the k largest when its noise alone is drawn anew; 0 for a dead one.

    >>> chances(torch.zeros(1, 2), torch.tensor([[3.0, 0.0]]), torch.ones(1, 2), 1)[0, 0].item()
    0.5
    """
    if live is not None:
        noisy = noisy.masked_fill(~live, _OUT)
    padded = torch.cat([noisy, noisy.new_full((noisy.shape[0], 1), _OUT)], 1)
    top = padded.topk(min(k + 1, padded.shape[1]), dim=-1).values
    inside, outside = top[:, -1:], top[:, -2:-1]  # without a chosen expert the k-th largest is the next one
    chance = torch.special.ndtr((logits - torch.where(noisy > inside, inside, outside)) / std)
    return chance if live is None else chance * live
