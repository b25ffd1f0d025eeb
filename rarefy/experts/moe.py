"""The mixture-of-experts layer; it reads like its flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Affinity
from rarefy.core.trace import Tap
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import Backend, dispatch


class MoE(nn.Module):
    """Route rows to experts: affinity, choice, overflow, tap, dispatch.

    x [..., d] -> [..., d]. The layer stores nothing: open a `Trace` around the forward for losses and counts.
    """

    def __init__(
        self,
        affinity: Affinity,
        choice: Callable[[Scores, Context], Routing],
        bank: GLU,
        overflow: Callable[[Routing, Context], Routing] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.affinity, self.bank, self.tap = affinity, bank, Tap()
        self.choice, self.overflow, self.backend = choice, overflow, backend

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        context = replace(context or Context(), training=self.training)
        rows = x.reshape(-1, x.shape[-1])
        scores = self.affinity(rows, context, self.bank)
        routing = self.choice(scores, context)
        if self.overflow is not None:
            routing = self.overflow(routing, context)
        routing = self.tap(routing, context, rows)
        y = dispatch(rows, routing, self.bank, context, self.backend)
        return y.reshape(*x.shape[:-1], y.shape[-1])
