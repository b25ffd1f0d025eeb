"""The contract of a Policy: never beyond the capacity, same results, never fewer loads than Belady, resumable."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rarefy.core.records import Access, Key
from rarefy.core.roles import Policy
from rarefy.runtime.cache import Cache, replay
from rarefy.runtime.policies.belady import Belady
from rarefy.testing import figures
from rarefy.testing.contract import contract, through_a_file

SIZES = (1, 2, 3, 5)


def traces(part: Policy) -> Iterator[tuple[Key, ...]]:
    """Uniform, skewed, id-ordered and layered runs of uses; for a policy that knows its future, that one."""
    known = getattr(part, "trace", None)
    if known is not None:
        yield tuple(known)
        return
    g = figures.seeded(11)
    yield tuple(torch.randint(0, 6, (60,), generator=g).tolist())
    yield tuple(torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.5]), 60, replacement=True, generator=g).tolist())
    yield tuple(expert for _ in range(12) for expert in sorted(torch.randperm(6, generator=g)[:3].tolist()))
    yield tuple((layer, expert) for _ in range(6) for layer in range(3) for expert in torch.randperm(4, generator=g)[:2].tolist())


class _Watched(Policy):
    """A policy whose every call is checked for purity, and every victim for being resident."""

    def __init__(self, part: Policy) -> None:
        self.part = part

    def state(self) -> dict[str, Any]:
        return self.part.state()

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        before = copy.deepcopy(state)
        after, again = self.part.observe(state, access), self.part.observe(state, access)
        assert state == before, f"{self.part!r}: observe changes the state that it is given instead of returning a new one"
        assert after == again, f"{self.part!r}: observe gives two states for one access"
        return after

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        before = copy.deepcopy(state)
        left, again = self.part.evict(state, resident, needed), self.part.evict(state, resident, needed)
        assert state == before, f"{self.part!r}: evict changes the state"
        assert left == again, f"{self.part!r}: evict names {left} and then {again} in one state"
        assert left in resident, f"{self.part!r} evicts {left}, which is not among the resident {tuple(resident)}"
        return left


@contract(Policy)
def capacity_holds_and_decisions_are_pure(part: Policy) -> None:
    for trace in traces(part):
        for size in SIZES:
            cache: Cache[Key] = Cache(size, _Watched(part), lambda key: key)
            for at, key in enumerate(trace):
                later = trace[at + 1 : at + 3]
                assert cache.fetch(key, later) == key, f"{part!r}: the value of {key} is another's"
                assert len(cache.resident) <= size, f"{part!r}: {len(cache.resident)} values in a cache of {size}"
                assert key in cache.resident, f"{part!r}: {key} is used and not resident"
            assert cache.hits + cache.misses == len(trace), f"{part!r}: {cache.hits} hits and {cache.misses} misses of {len(trace)} uses"


@contract(Policy)
def never_fewer_misses_than_belady(part: Policy) -> None:
    for trace in traces(part):
        for size in SIZES:
            found, bound = replay(trace, size, part).misses, replay(trace, size, Belady(trace)).misses
            assert found >= bound, f"{part!r} loads {found} times in a cache of {size}, fewer than the optimum {bound}: it does not obey the cache"


@contract(Policy)
def a_stopped_run_goes_on_with_the_same_decisions(part: Policy) -> None:
    for trace in traces(part):
        whole: Cache[Key] = Cache(2, part, lambda key: key)
        resumed: Cache[Key] = Cache(2, part, lambda key: key)
        for key in trace:
            whole.fetch(key)
            state = through_a_file(part, resumed.state_dict())
            resumed = Cache(2, copy.deepcopy(part), lambda key: key)
            resumed.load_state_dict(state)
            resumed.fetch(key)
            assert resumed.resident == whole.resident, f"{part!r}: stopped and resumed before {key}, it keeps {resumed.resident} instead of {whole.resident}"
        assert resumed.misses == whole.misses, f"{part!r}: {resumed.misses} misses when stopped and resumed, {whole.misses} at one go"
