"""A balance loss by entropy: on average over the batch, every expert is to be as likely as any other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, finfo

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import scores_of, valid_rows


@dataclass(frozen=True)
class MeanEntropy(Balance):
    """Make the mean distribution even: ``gamma * sum_e p_e log p_e``, p the mean over all rows of a softmax over the logits.

    The softmax is taken whatever the gate is (a sigmoid has none), over the live experts, and its mean in logarithms; padding does
    not count. An Entry -> scalar, from -gamma log L when even over L live experts to 0 when one has all; no rows or nobody live 0.
    Rows that differ may each be certain: only their mean is pushed. Source: Csordas et al., arXiv 2310.10837, eqs. 20-21, gamma 1e-3 to 1e-4.

    Raises:
        BadInput: the routing carries no logits.
    """

    name = "mean_entropy"
    gamma: float = 1e-3

    def even(self, experts: int) -> float:
        return -self.gamma * math.log(experts)

    def __call__(self, entry: Entry) -> Tensor:
        z, real, live = scores_of(entry).logits.float(), valid_rows(entry), entry.context.live
        least = finfo(z.dtype).min
        if live is not None:
            z = z.masked_fill(~live, least)
        log_p = z.log_softmax(-1)
        log_p = log_p.masked_fill(~real[:, None], least)
        blank = log_p.new_full((1, log_p.shape[1]), least)  # so that an empty batch has a maximum
        mean = torch.cat([log_p, blank]).logsumexp(0) - real.sum().clamp(min=1).log()
        counted = real.any() if live is None else real.any() & live
        return self.gamma * (mean.exp() * mean).where(counted, 0.0).sum()
