"""A balance loss that reads the router at a temperature of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Entry
from rarefy.core.roles import Balance
from rarefy.experts.balance.switch_balance import LoadBalance


@dataclass(frozen=True)
class AtTemperature(Balance):
    """Apply `inner` to logits ``select / temperature``: a learned temperature gets no gradient from it.

    An Entry of a router whose Scores carry `select` before the temperature -> scalar. Source: Chi et al., arXiv 2204.09179, eq. 8; tau_0 is 0.3 with a softmax gate and 0.07 with a sigmoid gate.

    Raises:
        BadInput: a temperature that is not positive; the routing carries no scores before their temperature.
    """

    name = "at_temperature"
    temperature: float = 0.3
    inner: Balance = field(default_factory=LoadBalance)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise BadInput(f"temperature {self.temperature}", "a temperature is positive", "pass for example 0.3")

    def even(self, experts: int) -> float:
        return self.inner.even(experts)

    def __call__(self, entry: Entry) -> Tensor:
        scores = entry.routing.scores
        if scores is None or scores.select is None:
            raise BadInput(f"balance loss of {entry.path}", "the routing must carry its scores before the temperature", "use the cosine router")
        fixed = replace(scores, logits=scores.select / self.temperature)
        return self.inner(replace(entry, routing=replace(entry.routing, scores=fixed)))
