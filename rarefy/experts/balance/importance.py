"""The importance loss: the weights that the experts are given in all should be equal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import valid_rows
from rarefy.experts.routing import dense


@dataclass(frozen=True)
class Importance(Balance):
    """Ask for equal sums of weights: ``w * CV(sum_r G_r)^2``, G [R, E] the combine weights of rows that are not padding.

    CV^2 is the population variance over the squared mean, over the live experts. An Entry of one layer -> scalar; equal sums give 0,
    all on one of E experts w (E - 1). Source: Shazeer et al., arXiv 1701.06538, eqs. 6-7; tensor2tensor's `cv_squared`.
    """

    name = "importance"
    weight: float = 0.1

    def even(self, experts: int) -> float:
        return 0.0

    def __call__(self, entry: Entry) -> Tensor:
        given = (dense(entry.routing).float() * valid_rows(entry)[:, None]).sum(0)
        return self.weight * cv_squared(given, entry.context.live)


def cv_squared(x: Tensor, live: Tensor | None = None) -> Tensor:
    """The squared coefficient of variation of x [E] over the live experts: variance / (mean^2 + 1e-10); 0 for one or none.

    >>> import torch
    >>> cv_squared(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([True, True, False])).item()
    1.0
    """
    counted = x.new_ones(x.shape) if live is None else live.to(x)
    number = counted.sum().clamp(min=1)
    mean = (x * counted).sum() / number
    variance = ((x - mean).square() * counted).sum() / number
    return variance / (mean.square() + 1e-10)
