"""The mixture-of-experts layer; it reads like its flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from rarefy.core.ambient import Seat, aligned
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Affinity, Bank
from rarefy.core.trace import Tap
from rarefy.experts.dispatch import Backend, dispatch
from rarefy.experts.routing import unpadded_rows


class MoE(nn.Module):
    """Route rows to experts: affinity, choice, overflow, tap, dispatch; and add what `shared` gives every row that is not padding.

    x [..., d] -> [..., d]. The layer stores nothing: open a `Trace` around the forward for losses and counts. Without a
    `context` it takes the one of its model's `Ambient`; a `routing` in the context replaces the router's.

    Raises:
        BadInput: a field of the context, or its routing, is not aligned with the rows of x.
    """

    def __init__(
        self,
        affinity: Affinity,
        choice: Callable[[Scores, Context], Routing],
        bank: Bank,
        overflow: Callable[[Routing, Context], Routing] | None = None,
        backend: Backend | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.affinity, self.bank, self.seat, self.tap = affinity, bank, Seat(), Tap()
        self.choice, self.overflow, self.backend, self.shared = choice, overflow, backend, shared

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        context = replace(aligned(self.seat() if context is None else context, rows.shape[0]), training=self.training)
        routing = self._route(rows, context)
        if self.overflow is not None:
            routing = self.overflow(routing, context)
        routing = self.tap(routing, context, rows)
        y = dispatch(rows, routing, self.bank, context, self.backend)
        if self.shared is not None:
            y = y + unpadded_rows(self.shared(rows), context.valid)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _route(self, rows: Tensor, context: Context) -> Routing:
        shared = context.routing
        if not isinstance(shared, Routing):
            return self.choice(self.affinity(rows, context, self.bank), context)
        if (shared.items, shared.experts) != (rows.shape[0], self.bank.experts):
            raise BadInput(f"a routing of {shared.items} rows to {shared.experts} experts", f"the layer has {rows.shape[0]} rows and {self.bank.experts} experts")
        return shared
