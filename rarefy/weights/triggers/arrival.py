"""Arrival: a phase ends when new data is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Event
from rarefy.core.roles import Trigger


@dataclass(frozen=True)
class Arrival(Trigger):
    """Done after so many events of `kind`, "data" unless it says otherwise.

    >>> Arrival().observe(Arrival().state(), None, Event("data", 0))[1], Arrival().observe(Arrival().state(), None, Event("epoch", 0))[1]
    (True, False)
    """

    count: int = 1
    kind: str = "data"
    name = "arrival"

    def state(self) -> dict[str, Any]:
        return {"seen": 0}

    def observe(self, state: dict[str, Any], sparsifier: Any, event: Event) -> tuple[dict[str, Any], bool]:
        seen = int(state["seen"]) + (event.kind == self.kind)
        return {"seen": seen}, seen >= self.count
