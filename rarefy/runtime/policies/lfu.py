"""LFU: what was used least often leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Access, Key
from rarefy.core.roles import Policy


@dataclass(frozen=True)
class LFU(Policy):
    """The least frequently used leaves; among equals the least recently used.

    ``argmin over resident k of (uses of k, time of the last use of k)``

    State: `uses` {key: count}, least recently used first. Counts outlive an eviction: an expert's popularity is a
    property of the model and its text, not of its stay in the cache.

    >>> LFU().evict({"uses": {0: 3, 1: 2, 2: 2}}, resident=(0, 1, 2), needed=(3,))
    1
    """

    name = "lfu"

    def state(self) -> dict[str, Any]:
        return {"uses": {}}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        others = {k: n for k, n in state["uses"].items() if k != access.key}
        return {"uses": {**others, access.key: state["uses"].get(access.key, 0) + 1}}

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        rank = {key: (count, place) for place, (key, count) in enumerate(state["uses"].items())}
        return min(resident, key=lambda k: rank.get(k, (0, -1)))
