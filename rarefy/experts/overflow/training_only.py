"""An overflow rule for training alone: outside it every assignment is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from rarefy.core.records import Context, Routing
from rarefy.core.roles import Overflow
from rarefy.experts.overflow.capacity import Capacity


@dataclass(frozen=True)
class TrainingOnly(Overflow):
    """Apply `inner` in training; outside it return the routing as it is, so that no row depends on its batch.

    >>> import torch
    >>> r = Routing(torch.tensor([0, 0, 0, 1]), torch.ones(4), 4, 2, k=1)
    >>> [TrainingOnly(Capacity(1.0))(r, Context(training=t)).expert.tolist() for t in (True, False)]
    [[0, 0, 2, 1], [0, 0, 0, 1]]
    """

    name = "training_only"
    inner: Overflow = field(default_factory=Capacity)

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return self.inner(routing, context) if context.training else routing

    def bound(self, routing: Routing, context: Context) -> int | None:
        return self.inner.bound(routing, context) if context.training else None
