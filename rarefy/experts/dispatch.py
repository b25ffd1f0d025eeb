"""Exact dispatch: rows to their experts and back, by back ends that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Rows
from rarefy.kernels import experts as kernel


class Experts(Protocol):
    """What dispatch asks of a bank: a function per expert, and one that takes a row's expert along."""

    experts: int

    def split(self) -> Sequence[Callable[[Tensor], Tensor]]: ...

    def each(self, x: Tensor, expert: Tensor) -> Tensor: ...


class Grouped(Protocol):
    """A bank whose experts also run all at once over their own rows, by `grouped_linear`: Rows -> [N, d]."""

    def grouped(self, rows: Rows) -> Tensor: ...


def is_grouped(bank: object) -> TypeGuard[Grouped]:
    """Whether the bank has a `grouped`; None in its place says that it has none."""
    return getattr(bank, "grouped", None) is not None


Backend = Callable[[Rows, Experts], Tensor]


def loop(rows: Rows, bank: Experts) -> Tensor:
    """Expert by expert over the non-empty ones, gathering rows inside the loop; the assigned rows, sorted by expert."""
    experts, out, start = bank.split(), [], 0
    for expert, end in enumerate(rows.offsets.tolist()):
        if end > start:
            out.append(experts[expert](rows.x[rows.item[start:end]]))
        start = end
    return torch.cat(out) if out else experts[0](rows.x[:0])


def gather(rows: Rows, bank: Experts) -> Tensor:
    """All assignments at once, each with a copy of its expert's weights; the assigned rows, sorted by expert."""
    assigned = int(rows.offsets[-1])
    return bank.each(rows.x[rows.item[:assigned]], rows.expert[:assigned])


def fused(rows: Rows, bank: Experts) -> Tensor:
    """In registered ops, without looking at the counts in Python: [N, d] sorted by expert, zeros for nobody's rows.

    What a compiled forward runs; in eager its call overhead (tens of microseconds) buys nothing. BadInput for a bank without `grouped`.
    """
    if not is_grouped(bank):
        raise BadInput(f"{type(bank).__name__} in one op", "the bank has no method grouped(rows)", "use the back end loop, outside torch.compile(fullgraph=True)")
    return bank.grouped(rows).masked_fill((rows.expert >= rows.offsets.shape[0])[:, None], 0.0)


def batched(rows: Rows, bank: Experts) -> Tensor:
    """By the bank's own `grouped`, as `fused`, but only the assigned rows, sorted by expert: natively each expert's weights are read once."""
    if not is_grouped(bank):
        raise BadInput(f"{type(bank).__name__} in one op", "the bank has no method grouped(rows)", "use the back end loop")
    return bank.grouped(rows)[: int(rows.offsets[-1])]


def _default(rows: Rows, bank: Experts) -> Backend:
    if torch.compiler.is_compiling():
        return fused if is_grouped(bank) else loop
    quick = not torch.is_grad_enabled() and kernel.few(rows.expert.shape[0], bank.experts) and kernel.plain(rows.x, rows.weight)
    return batched if quick and is_grouped(bank) else loop


def dispatch(x: Tensor, routing: Routing, bank: Experts, context: Context | None = None, backend: Backend | None = None) -> Tensor:
    """Sum each row's weighted experts: ``y_r = sum_n [item_n = r] w_n E_{expert_n}(x_r)``.

    x [R, d] -> y [R, d_out]. Assignments to nobody (expert E) cost nothing, and a row without any gets exact zeros.
    `backend` is `loop`, `gather`, `fused` or `batched`; all are exact. By default `fused` serves a compiled forward, `batched` few
    rows without gradients where it is native, and `loop` the rest (`gather` copies weights: it was faster for the narrowest experts only).
    """
    rows = _sorted(x, routing, context or Context())
    return kernel.combine((backend or _default(rows, bank))(rows, bank), rows.item, rows.weight, x)


def _sorted(x: Tensor, routing: Routing, context: Context) -> Rows:
    """All N assignments by expert, those to nobody last."""
    expert, item, weight, offsets = kernel.sort(routing.expert, routing.item, routing.weight, routing.items, routing.experts)
    return Rows(x, item, expert, weight, offsets, context=context)
