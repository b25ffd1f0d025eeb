"""LRU: what was not used for longest leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Access, Key
from rarefy.core.roles import Policy


@dataclass(frozen=True)
class LRU(Policy):
    """The least recently used leaves.

    ``argmin over resident k of (time of the last use of k)``

    State: `order`, the keys in the cache, least recently used first. One that the state has not seen leaves first.

    >>> lru = LRU()
    >>> lru.evict({"order": [2, 0, 1]}, resident=(0, 1, 2), needed=(3,))
    2
    """

    name = "lru"

    def state(self) -> dict[str, Any]:
        return {"order": []}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        return {"order": [k for k in state["order"] if k not in (access.key, access.left)] + [access.key]}

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        age = {key: place for place, key in enumerate(state["order"])}
        return min(resident, key=lambda k: age.get(k, -1))
