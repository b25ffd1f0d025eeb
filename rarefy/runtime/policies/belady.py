"""Belady: what is not needed for longest leaves; the bound that no policy beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.core.errors import BadInput
from rarefy.core.records import Access, Key
from rarefy.core.roles import Policy


@dataclass(frozen=True)
class Belady(Policy):
    """The one whose next use lies farthest in the future leaves: the fewest loads that any policy can have.

    ``argmax over resident k of (time of the next use of k)``; never again counts as infinity, ties to the first resident.

    `trace` holds the keys of every use, in order: an oracle for tests and for what a probe compares with, not for serving.
    Optimal where every use loads what is absent and nothing is loaded ahead. State: `at`, the uses so far.

    Raises:
        BadInput: the run leaves its trace.

    Source: Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2), 1966
    (the algorithm MIN).

    >>> Belady(trace=(0, 1, 2, 0)).evict({"at": 2}, resident=(0, 1), needed=(2,))
    1
    """

    trace: tuple[Key, ...]
    name = "belady"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return cls((0, 1, 2, 0, 3, 0, 4, 1, 2, 0)), cls(((0, 1), (1, 1), (0, 2), (1, 1), (0, 1))), cls(())

    def state(self) -> dict[str, Any]:
        return {"at": 0}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        at = state["at"]
        if at >= len(self.trace) or self.trace[at] != access.key:
            expected = self.trace[at] if at < len(self.trace) else "the end"
            raise BadInput(f"use {at} of expert {access.key}", f"the trace given to this oracle has {expected} there", "record the trace of this very run")
        return {"at": at + 1}

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        future = self.trace[state["at"] :]
        return max(resident, key=lambda k: future.index(k) if k in future else len(future))
