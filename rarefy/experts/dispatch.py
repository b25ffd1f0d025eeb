"""Exact dispatch: rows to their experts and back, by two back ends that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rarefy.core.records import Context, Routing, Rows

FEW = 4  # assignments up to which gathering weights per row is tried first


class Experts(Protocol):
    """What dispatch asks of a bank: a function per expert, and one that takes a row's expert along."""

    experts: int

    def split(self) -> Sequence[Callable[[Tensor], Tensor]]: ...

    def each(self, x: Tensor, expert: Tensor) -> Tensor: ...


Backend = Callable[[Rows, Experts], Tensor]


def loop(rows: Rows, bank: Experts) -> Tensor:
    """Expert by expert over the non-empty ones, gathering rows inside the loop; [N, d] sorted by expert."""
    experts, out, start = bank.split(), [], 0
    for expert, end in zip(experts, rows.offsets.tolist(), strict=True):
        if end > start:
            out.append(expert(rows.x[rows.item[start:end]]))
        start = end
    return torch.cat(out) if out else experts[0](rows.x[:0])


def gather(rows: Rows, bank: Experts) -> Tensor:
    """All assignments at once, each with a copy of its expert's weights; [N, d] sorted by expert."""
    return bank.each(rows.x[rows.item], rows.expert)


def dispatch(x: Tensor, routing: Routing, bank: Experts, context: Context | None = None, backend: Backend | None = None) -> Tensor:
    """Sum each row's weighted experts: ``y_r = sum_n [item_n = r] w_n E_{expert_n}(x_r)``.

    x [R, d] -> y [R, d_out]. Assignments to nobody (expert E) cost nothing, and a row without any gets exact zeros.
    `backend` is `loop` or `gather`; both are exact. By default `gather` serves up to FEW assignments.
    """
    expert, order = routing.expert.sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(routing.experts, device=expert.device), right=True)
    order = order[: int((routing.expert < routing.experts).sum())]
    item, expert, weight = routing.rows()[order], expert[: order.numel()], routing.weight[order]
    rows = Rows(x, item, expert, weight, offsets, context=context or Context())
    run = backend or (gather if order.numel() <= FEW else loop)
    y = run(rows, bank)
    y = (y * weight[:, None]).to(x.dtype)
    return y.new_zeros(x.shape[0], y.shape[1]).index_add(0, item, y)
