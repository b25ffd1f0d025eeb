"""Plateau: a phase ends when a figure stops improving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Event
from rarefy.core.roles import Trigger


@dataclass(frozen=True)
class Plateau(Trigger):
    """Done after `patience` events of `kind` in a row whose `figure` (smaller is better) is not below the best so far.

    >>> t, e = Plateau(patience=1), Event("epoch", 0, {"loss": 1.0})
    >>> state, done = t.observe(t.state(), None, e)
    >>> done, t.observe(state, None, e)[1]
    (False, True)
    """

    patience: int = 3
    kind: str = "epoch"
    figure: str = "loss"
    name = "plateau"

    def state(self) -> dict[str, Any]:
        return {"best": None, "bad": 0}

    def observe(self, state: dict[str, Any], sparsifier: Any, event: Event) -> tuple[dict[str, Any], bool]:
        if event.kind != self.kind or self.figure not in event.data:
            return state, False
        value, best = float(event.data[self.figure]), state["best"]
        better = best is None or value < best
        now = {"best": value if better else best, "bad": 0 if better else state["bad"] + 1}
        return now, now["bad"] >= self.patience
