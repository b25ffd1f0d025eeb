"""Capacity by rows: what an expert takes does not grow with how many experts a row may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing
from rarefy.core.roles import Overflow
from rarefy.experts.overflow.capacity import first_come


@dataclass(frozen=True)
class RowCapacity(Overflow):
    """Keep the first C assignments of each expert: ``C = ceil(factor * R / E)`` of R rows, padding too; first choices before second ones.

    For routers whose rows ask for a varying number of experts: `Capacity` counts every assignment that might have been made, and of
    E choices per row would bound nothing. Source: ysngki/XMoE, `_capacity` and the importance by rank in `main_thresholdGating`
    (arXiv 2403.18926); of equal rank we keep the earlier rows, where that code leaves it to topk.

    Raises:
        BadInput: a factor that is not positive.

    >>> import torch
    >>> r = RowCapacity(1.0)(Routing(torch.tensor([0, 1, 0, 1]), torch.ones(4), 2, 2, k=2), Context())
    >>> r.expert.tolist(), r.dropped.tolist()
    ([0, 1, 2, 2], [1, 1])
    """

    name = "row_capacity"
    factor: float = 8.0
    _ratio: tuple[int, int] = field(default=(1, 1), init=False, repr=False, compare=False)  # integers, for the compiler

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise BadInput(f"capacity factor {self.factor}", "a capacity factor is positive", "pass for example 8.0")
        object.__setattr__(self, "_ratio", Fraction(str(self.factor)).as_integer_ratio())

    def bound(self, routing: Routing, context: Context) -> int:
        above, below = self._ratio
        return -(-above * routing.items // (below * routing.experts))

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return first_come(routing, context, self.bound(routing, context))
