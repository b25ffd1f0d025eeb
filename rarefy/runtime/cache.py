"""A bounded cache: what is resident, what a policy sends away, and how often something had to be loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Access, Key
from rarefy.core.roles import Policy

T = TypeVar("T")


class Cache(Generic[T]):
    """At most `size` values, loaded when first used; where it is full the policy says which one leaves, before the load.

    `hits` and `misses` count uses. What `fetch` returns is what `load` gives, whatever the size and the policy.

    Raises:
        BadInput: a size below 1.
        Refused: the policy evicts what is not resident.

    >>> from rarefy.runtime.policies.lru import LRU
    >>> cache = Cache(2, LRU(), lambda key: key * 10)
    >>> [cache.fetch(key) for key in (1, 2, 1, 3)], cache.resident, (cache.hits, cache.misses)
    ([10, 20, 10, 30], (1, 3), (1, 3))
    """

    def __init__(self, size: int, policy: Policy, load: Callable[[Any], T]) -> None:
        if size < 1:
            raise BadInput(f"a cache of {size}", "a cache holds at least one value")
        self.size, self.policy, self.load = size, policy, load
        self.hits, self.misses = 0, 0
        self._values: dict[Key, T] = {}
        self._state = policy.state()

    @property
    def resident(self) -> tuple[Key, ...]:
        """The keys in memory, in the order of their loading."""
        return tuple(self._values)

    def fetch(self, key: Key, later: Sequence[Key] = ()) -> T:
        """The value of `key`; `later` are the keys that this call will use after it, in order, as far as known."""
        loaded = key not in self._values
        left = self._make_room((key, *later)) if loaded else None
        if loaded:
            self._values[key] = self.load(key)
        self.misses, self.hits = self.misses + loaded, self.hits + (not loaded)
        self._state = self.policy.observe(self._state, Access(key, loaded, left))
        return self._values[key]

    def _make_room(self, needed: Sequence[Key]) -> Key | None:
        if len(self._values) < self.size:
            return None
        left = self.policy.evict(self._state, self.resident, needed)
        if left not in self._values:
            raise Refused(f"policy {self.policy!r} evicts {left!r}", f"only what is resident can leave, and that is {list(self._values)}")
        del self._values[left]
        return left

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on; the values are loaded again."""
        return {"policy": self.policy.name, "state": self._state, "resident": list(self._values), "hits": self.hits, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            BadInput: it belongs to another policy, or more is resident there than this cache holds.
        """
        if state["policy"] != self.policy.name:
            raise BadInput(f"a state of policy {state['policy']}", f"this cache decides by {self.policy.name}", "resume with the policy that it was saved with")
        if len(state["resident"]) > self.size:
            raise BadInput(f"a state with {len(state['resident'])} resident values", f"this cache holds {self.size}", "resume with the size that it was saved with")
        self._values.clear()
        self._values.update((key, self.load(key)) for key in state["resident"])
        self._state, self.hits, self.misses = state["state"], state["hits"], state["misses"]


def replay(trace: Iterable[Key], size: int, policy: Policy) -> Cache[Key]:
    """The cache after the uses of a trace, for counting what a policy would have loaded.

    >>> from rarefy.runtime.policies.belady import Belady
    >>> trace = (0, 1, 2, 0, 1, 2)
    >>> replay(trace, 2, Belady(trace)).misses
    4
    """
    cache: Cache[Key] = Cache(size, policy, lambda key: key)
    for key in trace:
        cache.fetch(key)
    return cache
