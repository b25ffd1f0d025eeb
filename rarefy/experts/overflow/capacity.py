"""Capacity: an expert takes so many rows, first come first served."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import torch

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing
from rarefy.core.roles import Overflow
from rarefy.experts.routing import keep, unpadded


@dataclass(frozen=True)
class Capacity(Overflow):
    """Keep the first C assignments of each expert: ``C = ceil(factor * N / E)``; the rest go to nobody and are counted.

    First choices come before second ones, then rows in order. N counts all assignments (rows times k, padding too, so that
    C does not depend on the data). Padding goes to nobody first: it takes no place and is not counted as dropped.
    `evaluation` is the factor outside training: there too a row may lose its place to rows before it, so what a row gets depends
    on its batch. `TrainingOnly(Capacity(...))` bounds nothing outside training, and each row is then on its own. Source: Fedus et al., arXiv 2101.03961, section 2.2, eq. 3.

    Raises:
        BadInput: a factor that is not positive.

    >>> r = Capacity(1.0)(Routing(torch.tensor([0, 0, 0, 1]), torch.ones(4), 4, 2, k=1), Context(training=True))
    >>> r.expert.tolist(), r.dropped.tolist()
    ([0, 0, 2, 1], [1, 0])
    """

    name = "capacity"
    factor: float = 1.25
    evaluation: float = 2.0
    _ratios: tuple[tuple[int, int], ...] = field(default=(), init=False, repr=False, compare=False)  # by training; integers, for the compiler

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.evaluation > 0):
            raise BadInput(f"capacity factors {self.factor}, {self.evaluation}", "a capacity factor is positive", "pass for example 1.25")
        object.__setattr__(self, "_ratios", tuple(Fraction(str(f)).as_integer_ratio() for f in (self.evaluation, self.factor)))

    def limit(self, assignments: int, experts: int, training: bool) -> int:
        """C, exact in decimal: 1.1 * 10 / 11 is 1, not a hair more."""
        above, below = self._ratios[training]
        return -(-above * assignments // (below * experts))

    def bound(self, routing: Routing, context: Context) -> int:
        return self.limit(routing.expert.numel(), routing.experts, context.training)

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return first_come(routing, context, self.bound(routing, context))


def first_come(routing: Routing, context: Context, limit: int) -> Routing:
    """Keep the first `limit` assignments of each expert, first choices before second ones, then rows in order; padding takes no place."""
    routing = unpadded(routing, context.valid)
    first = routing.ranks().argsort(stable=True)
    order = first[routing.expert[first].argsort(stable=True)]
    expert = routing.expert[order]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - torch.searchsorted(expert, expert)
    return keep(routing, place < limit)
