"""ARC: a cache that learns how much of itself recency deserves and how much frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.core.records import Access, Key
from rarefy.core.roles import Policy


@dataclass(frozen=True)
class ARC(Policy):
    """Two lists, used once (`recent`) and more often (`frequent`), and a target for the first that mistakes correct.

    A use of what had left the first list raises the target p by ``max(1, |gone_2| / |gone_1|)``, of what had left the
    second lowers it by ``max(1, |gone_1| / |gone_2|)``, within 0..c. The oldest of the first list leaves where it is
    longer than p (or as long, for a key of gone_2), the oldest of the second otherwise. c is the size of the cache.

    State: the lists, oldest first, `gone_recent` and `gone_frequent` of keys alone (at most 2c in all), and `target`.

    Source: Megiddo and Modha, ARC: A Self-Tuning, Low Overhead Replacement Cache, FAST 2003, figure 4. The lists of what
    left are trimmed after a key enters and not before, which trims the same ones.

    >>> state = {"recent": [1], "frequent": [2, 3], "gone_recent": [4], "gone_frequent": [], "target": 0}
    >>> ARC().evict(state, resident=(1, 2, 3), needed=(5,)), ARC().evict(state, resident=(1, 2, 3), needed=(4,))
    (1, 2)
    """

    name = "arc"

    def state(self) -> dict[str, Any]:
        return {"recent": [], "frequent": [], "gone_recent": [], "gone_frequent": [], "target": 0}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        known = any(access.key in keys for name, keys in state.items() if name != "target")
        size = len(state["recent"]) + len(state["frequent"])
        new = {name: [k for k in keys if k not in (access.key, access.left)] for name, keys in state.items() if name != "target"}
        for name in ("recent", "frequent"):
            if access.left is not None and access.left in state[name]:
                new[f"gone_{name}"].append(access.left)
        new["frequent" if known else "recent"].append(access.key)
        if access.left is not None:
            new["gone_recent"] = _youngest(new["gone_recent"], size - len(new["recent"]))
            new["gone_frequent"] = _youngest(new["gone_frequent"], size - len(new["gone_recent"]))
        return {**new, "target": _target(state, access.key, size)}

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        recent, frequent = ([k for k in state[name] if k in resident] for name in ("recent", "frequent"))
        target = _target(state, needed[0], len(resident))
        first = len(recent) > target or (needed[0] in state["gone_frequent"] and len(recent) == target)
        lists = (recent, frequent) if first else (frequent, recent)
        return next((keys[0] for keys in lists if keys), resident[0])


def _youngest(keys: list[Key], count: int) -> list[Key]:
    return keys[max(0, len(keys) - max(0, count)) :]


def _target(state: dict[str, Any], key: Key, size: int) -> float:
    """The target after a use of `key`: it moves when the key had been sent away."""
    recent, frequent, target = len(state["gone_recent"]), len(state["gone_frequent"]), state["target"]
    if key in state["gone_recent"]:
        return min(size, target + max(1, frequent / recent))
    if key in state["gone_frequent"]:
        return max(0, target - max(1, recent / frequent))
    return float(target)
