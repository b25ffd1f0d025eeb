"""Policies of a full cache: against an OrderedDict, against brute force, broken ones caught, and what the role cannot say yet."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rarefy.testing as contracts
from rarefy.core import discover
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Access, Context, Entry, Key, Routing
from rarefy.core.roles import Policy
from rarefy.experts.dispatch import Backend, dispatch, gather, loop
from rarefy.runtime.cache import Cache, replay
from rarefy.runtime.policies.arc import ARC
from rarefy.runtime.policies.belady import Belady
from rarefy.runtime.policies.lfu import LFU
from rarefy.runtime.policies.lru import LRU
from rarefy.runtime.store import ExpertStore
from tests.test_store import saved

TRACES = st.lists(st.integers(0, 5), max_size=40).map(tuple)
ONLINE = [kind() for name, kind in discover.methods(Policy).items() if name != "belady"]


def ordered_dict_misses(trace: Sequence[int], size: int) -> tuple[int, list[int]]:
    kept: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for key in trace:
        if key in kept:
            kept.move_to_end(key)
            continue
        misses += 1
        if len(kept) == size:
            kept.popitem(last=False)
        kept[key] = None
    return misses, sorted(kept)


class TextbookARC:
    """Figure 4 of the paper, case by case, with its own cache."""

    def __init__(self, c: int) -> None:
        self.c, self.p, self.misses = c, 0.0, 0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict[int, None]() for _ in range(4))

    def replace(self, x: int) -> None:
        if self.t1 and ((x in self.b2 and len(self.t1) == self.p) or len(self.t1) > self.p):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None

    def request(self, x: int) -> None:
        t1, t2, b1, b2, c = self.t1, self.t2, self.b1, self.b2, self.c
        if x in t1 or x in t2:
            t1.pop(x, None)
            t2.pop(x, None)
            t2[x] = None
            return
        self.misses += 1
        if x in b1:
            self.p = min(c, self.p + (1 if len(b1) >= len(b2) else len(b2) / len(b1)))
            self.replace(x)
            del b1[x]
            t2[x] = None
        elif x in b2:
            self.p = max(0, self.p - (1 if len(b2) >= len(b1) else len(b1) / len(b2)))
            self.replace(x)
            del b2[x]
            t2[x] = None
        else:
            one, two = len(t1) + len(b1), len(t2) + len(b2)
            if one == c:
                if len(t1) < c:
                    b1.popitem(last=False)
                    self.replace(x)
                else:
                    t1.popitem(last=False)
            elif one + two >= c:
                if one + two == 2 * c:
                    b2.popitem(last=False)
                self.replace(x)
            t1[x] = None


def fewest_misses(trace: Sequence[int], size: int) -> int:
    """Every choice of every victim tried: {resident set: fewest loads so far}."""
    best = {frozenset[int](): 0}
    for key in trace:
        after: dict[frozenset[int], int] = {}
        for kept, misses in best.items():
            options = [kept] if key in kept else [kept | {key}] if len(kept) < size else [kept - {left} | {key} for left in kept]
            for option in options:
                after[option] = min(after.get(option, len(trace)), misses + (key not in kept))
        best = after
    return min(best.values())


@settings(max_examples=60, deadline=None)
@given(trace=TRACES, size=st.integers(1, 6))
def test_lru_is_an_ordered_dict(trace: tuple[int, ...], size: int) -> None:
    cache = replay(trace, size, LRU())
    assert (cache.misses, sorted(cache.resident)) == ordered_dict_misses(trace, size)


@settings(max_examples=80, deadline=None)
@given(trace=st.lists(st.integers(0, 9), max_size=80).map(tuple), size=st.integers(1, 5))
def test_arc_is_the_textbooks(trace: tuple[int, ...], size: int) -> None:
    cache, book = replay(trace, size, ARC()), TextbookARC(size)
    for key in trace:
        book.request(key)
    state = cache.state_dict()["state"]
    assert (cache.misses, sorted(cache.resident)) == (book.misses, sorted([*book.t1, *book.t2]))
    assert [state[n] for n in ("recent", "frequent", "gone_recent", "gone_frequent")] == [list(t) for t in (book.t1, book.t2, book.b1, book.b2)]
    assert state["target"] == pytest.approx(book.p)


@settings(max_examples=40, deadline=None)
@given(trace=st.lists(st.integers(0, 4), max_size=14).map(tuple), size=st.integers(1, 4))
def test_belady_is_the_best_of_all_choices(trace: tuple[int, ...], size: int) -> None:
    assert replay(trace, size, Belady(trace)).misses == fewest_misses(trace, size)


@settings(max_examples=60, deadline=None)
@given(trace=TRACES, size=st.integers(1, 6))
def test_no_policy_loads_less_than_belady_or_exceeds_its_capacity(trace: tuple[int, ...], size: int) -> None:
    bound = replay(trace, size, Belady(trace)).misses
    for policy in ONLINE:
        cache: Cache[Key] = Cache(size, policy, lambda key: key)
        assert [cache.fetch(key) for key in trace] == list(trace)
        assert len(cache.resident) <= size and bound <= cache.misses <= len(trace)
        assert cache.misses >= len(set(trace)) and (size < 6 or cache.misses == len(set(trace)))


@settings(max_examples=30, deadline=None)
@given(trace=TRACES, size=st.integers(1, 4), stop=st.integers(0, 40))
def test_a_stopped_cache_resumes_with_the_same_decisions(trace: tuple[int, ...], size: int, stop: int) -> None:
    for policy in [*ONLINE, Belady(trace)]:
        first = replay(trace[:stop], size, policy)
        second: Cache[Key] = Cache(size, policy, lambda key: key)
        second.load_state_dict(first.state_dict())
        for key in trace[stop:]:
            second.fetch(key)
        whole = replay(trace, size, policy)
        assert (second.resident, second.hits, second.misses) == (whole.resident, whole.hits, whole.misses)


def test_the_least_frequently_used_leaves_and_ties_go_to_the_older() -> None:
    cache = replay((0, 0, 1, 1, 1, 2), 3, LFU())
    cache.fetch(3)
    assert cache.resident == (0, 1, 3)
    cache.fetch(2)  # sends 3 away, used once
    assert cache.resident == (0, 1, 2)
    cache.fetch(4)  # 2 was used twice, once before it left; so was 0, and longer ago
    assert cache.resident == (1, 2, 4)


@settings(max_examples=40, deadline=None)
@given(trace=TRACES, size=st.integers(1, 4))
def test_states_stay_as_small_as_what_they_remember(trace: tuple[int, ...], size: int) -> None:
    assert sorted(replay(trace, size, LRU()).state_dict()["state"]["order"]) == sorted(replay(trace, size, LRU()).resident)
    assert replay(trace, size, LFU()).state_dict()["state"]["uses"] == Counter(trace)


@pytest.mark.parametrize("policy", [*ONLINE, "belady"], ids=repr)
@torch.no_grad()
def test_a_store_gives_the_same_bits_for_every_policy_and_size(tmp_path: Path, policy: Any) -> None:
    bank = saved(tmp_path)
    g = torch.Generator().manual_seed(3)
    calls = [(torch.randn(9, 6, generator=g), torch.randint(0, 5, (18,), generator=g), torch.rand(18, generator=g)) for _ in range(4)]
    trace = tuple(e for _, expert, _ in calls for e in expert.unique().tolist() if e < 4)
    for size in (1, 2, 4):
        store = ExpertStore(tmp_path / "experts.safetensors", size, prefix="moe.", policy=Belady(trace) if policy == "belady" else policy)
        for x, expert, weight in calls:
            routing = Routing(expert, weight, 9, 4, 2)
            assert torch.equal(dispatch(x, routing, store, backend=loop), dispatch(x, routing, bank, backend=loop))
            assert len(store.kept) <= size
        assert store.hits + store.misses == len(trace)
        assert size < 4 or store.misses == len(set(trace))


def test_a_stopped_store_resumes_with_the_same_decisions(tmp_path: Path) -> None:
    saved(tmp_path)

    def fresh() -> ExpertStore:
        return ExpertStore(tmp_path / "experts.safetensors", 2, prefix="moe.", policy=LFU())

    draw = random.Random(0)
    trace = [draw.randrange(4) for _ in range(30)]
    whole, first, second = fresh(), fresh(), fresh()
    for expert in trace:
        whole.fetch(expert)
    for expert in trace[:17]:
        first.fetch(expert)
    second.load_state_dict(first.state_dict())
    assert second.misses == first.misses and all(torch.equal(a, b) for e in second.kept for a, b in zip(second.fetch(e), whole._read(e), strict=True))
    second.load_state_dict(first.state_dict())
    for expert in trace[17:]:
        second.fetch(expert)
    assert (second.kept, second.misses, second.hits) == (whole.kept, whole.misses, whole.hits)


def test_a_state_of_another_policy_or_size_is_refused_and_an_oracle_holds_to_its_trace() -> None:
    state = replay((0, 1, 2), 3, LRU()).state_dict()
    with pytest.raises(BadInput, match="a state of policy lru: this cache decides by lfu"):
        Cache(3, LFU(), lambda key: key).load_state_dict(state)
    with pytest.raises(BadInput, match="3 resident values: this cache holds 2"):
        Cache(2, LRU(), lambda key: key).load_state_dict(state)
    with pytest.raises(BadInput, match="use 1 of expert 2: the trace given to this oracle has 1 there"):
        replay((0, 2), 1, Belady((0, 1)))
    with pytest.raises(BadInput, match="has the end there"):
        replay((0,), 1, Belady(()))
    with pytest.raises(BadInput, match="a cache of 0"):
        Cache(0, LRU(), lambda key: key)


def test_what_leaves_is_gone_before_the_next_is_read_and_a_failed_read_can_be_repeated() -> None:
    broken, during = {3}, []

    def load(key: int) -> int:
        during.append(len(cache.resident))
        if key in broken:
            raise OSError("no such expert")
        return key

    cache: Cache[int] = Cache(2, LRU(), load)
    for key in (0, 1, 2):
        cache.fetch(key)
    with pytest.raises(OSError, match="no such expert"):
        cache.fetch(3)
    assert (cache.hits, cache.misses) == (0, 3) and cache.resident == (2,)
    broken.clear()
    assert [cache.fetch(key) for key in (3, 2, 0)] == [3, 2, 0] and cache.resident == (2, 0)
    assert during == [0, 1, 1, 1, 1, 1]
    fresh: Cache[int] = Cache(2, LRU(), lambda key: during.append(len(fresh.resident)) or key)
    fresh.load_state_dict(cache.state_dict())
    assert fresh.resident == (2, 0) and max(during[-2:]) < 2


# Policies of papers that the role carries as it is: `needed` says what this call still uses, keys may be (layer, expert).


@dataclass(frozen=True)
class LifoActive(Policy):
    """What this call does not use leaves first; among what it uses, the one that it uses last (arXiv 2303.06182)."""

    name = "lifo-active"

    def state(self) -> dict[str, Any]:
        return LRU().state()

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        return LRU().observe(state, access)

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        idle = [k for k in resident if k not in needed]
        return LRU().evict(state, idle, needed) if idle else max(resident, key=lambda k: list(needed).index(k))


@dataclass(frozen=True)
class FrequencyDistance(Policy):
    """The smallest frequency over distance to the layer's next turn leaves (EdgeMoE, arXiv 2308.14352); keys (layer, expert)."""

    layers: int = 3
    name = "frequency-distance"

    def state(self) -> dict[str, Any]:
        return LFU().state()

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        return LFU().observe(state, access)

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        def layer(key: Key) -> int:
            return key if isinstance(key, int) else key[0]

        return min(resident, key=lambda k: state["uses"].get(k, 0) / ((layer(k) - layer(needed[0])) % self.layers or self.layers))


@dataclass(frozen=True)
class Chance(Policy):
    """A random one leaves: the draw is a function of how many were seen, so that a resumed run draws alike."""

    name = "chance"

    def state(self) -> dict[str, Any]:
        return {"uses": 0}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        return {"uses": state["uses"] + 1}

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        return random.Random(state["uses"]).choice(list(resident))


@pytest.mark.parametrize("kind", [LifoActive, FrequencyDistance, Chance])
def test_policies_of_papers_keep_the_contract(kind: type[Policy]) -> None:
    assert contracts.check(kind) == 5


def test_knowing_the_rest_of_the_call_pays_on_id_ordered_traces() -> None:
    g = torch.Generator().manual_seed(0)
    calls = [sorted(torch.randperm(16, generator=g)[:6].tolist()) for _ in range(60)]
    trace = tuple(e for call in calls for e in call)
    cache: Cache[Key] = Cache(4, LifoActive(), lambda key: key)
    for call in calls:
        for at, key in enumerate(call):
            cache.fetch(key, call[at + 1 :])
    assert replay(trace, 4, Belady(trace)).misses <= cache.misses < replay(trace, 4, LRU()).misses


# Broken ones, each caught by the check that is for it.


class Outsider(LRU):
    """Evicts what is being loaded."""

    name = "outsider"

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        return needed[0]


class InPlace(LRU):
    """Changes the state that it is given."""

    name = "in-place"

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        state["order"] = super().observe(state, access)["order"]
        return state


class Hidden(LRU):
    """Decides by a state that nobody can save."""

    name = "hidden"
    turn = [0]

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        self.turn[0] += 1
        return resident[self.turn[0] % len(resident)]


class Unsaved(LRU):
    """Its state holds what a checkpoint cannot."""

    name = "unsaved"

    def state(self) -> dict[str, Any]:
        return {"order": [], "why": LRU}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        return {**state, **super().observe(state, access)}


class Elsewhere(LRU):
    """Its state counts uses, and the keys lie in the part: a copy of the part does not have them."""

    name = "elsewhere"

    def __init__(self) -> None:
        self.memory: dict[int, Key] = {}

    def __reduce__(self) -> Any:
        return Elsewhere, ()

    def state(self) -> dict[str, Any]:
        return {"uses": 0}

    def observe(self, state: dict[str, Any], access: Access) -> dict[str, Any]:
        self.memory[state["uses"]] = access.key
        return {"uses": state["uses"] + 1}

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        last = {self.memory.get(use): use for use in range(state["uses"])}
        return min(resident, key=lambda k: last.get(k, -1))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Outsider(), "which is not among the resident"),
        (InPlace(), "changes the state"),
        (Hidden(), "in one state"),
        (Unsaved(), "its state must be plain"),
        (Elsewhere(), "stopped and resumed"),
    ],
    ids=lambda p: getattr(p, "name", ""),
)
def test_a_broken_policy_is_caught(part: Policy, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        contracts.check(part)


def test_a_cache_that_cheats_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_make_room", lambda self, needed: None)
    with pytest.raises(AssertionError, match=r"\d values in a cache of"):
        contracts.check(LRU())


def test_a_bound_that_is_none_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Belady, "evict", lambda self, state, resident, needed: resident[-1])
    with pytest.raises(AssertionError, match="fewer than the optimum"):
        contracts.check(LRU())


def test_the_cache_refuses_a_victim_that_is_not_resident() -> None:
    with pytest.raises(Refused, match=r"evicts 2: only what is resident can leave, and that is \[0, 1\]"):
        replay((0, 1, 2), 2, Outsider())


# What the role cannot say yet. Each fails today for the reason it gives; a contract follows two real implementations.


@pytest.mark.xfail(
    strict=True,
    raises=AttributeError,
    reason="Fate (P139) loads ahead from layer l's gate input through layer l+1's router: needs a `fetch` that sees an Entry with x and fills free slots",
)
def test_sketch_fate_fetches_ahead_by_the_next_layers_gate(tmp_path: Path) -> None:
    saved(tmp_path)

    class CrossLayerGate(LRU):
        name = "cross-layer-gate"

        def fetch(self, entry: Entry) -> list[Key]:
            assert entry.x is not None
            return [int(e) for e in (entry.x @ torch.eye(6, 4)).topk(1).indices.unique()]  # the router of layers.1

    store: Any = ExpertStore(tmp_path / "experts.safetensors", 2, prefix="moe.", policy=CrossLayerGate())
    routing = Routing(torch.tensor([0]), torch.ones(1), 1, 4, 1)
    store.ahead(Entry("layers.0", 0, None, routing, Context(), torch.eye(6)[2:3]))
    assert store.kept == (2,) and store.misses == 0


@pytest.mark.xfail(
    strict=True,
    raises=AttributeError,
    reason="MoETuner (P130) maps a trace with token identity across layers to a Placement (layer, expert) -> device, once: no cache, no eviction; needs `place`",
)
def test_sketch_moetuner_places_experts_by_what_tokens_use_together() -> None:
    assert LRU().place({((0, 1), (1, 2)): 7}, devices=2) == {(0, 1): 0, (1, 2): 0}  # type: ignore[attr-defined]


@pytest.mark.xfail(
    strict=True,
    raises=TypeError,
    reason="ExpertFlow (P020) shares one budget of slots over layers by predicted paths and sends predicted-but-unused experts away first: needs predictions beside uses",
)
def test_sketch_expertflow_sends_away_what_was_predicted_and_not_used() -> None:
    state = LRU().observe(LRU().state(), Access(3, predicted=(1, 2, 3)))  # type: ignore[call-arg]
    assert LRU().evict(state, (1, 3), (4,)) == 1


class Listening(LRU):
    """Writes down what it is told is needed."""

    name = "listening"

    def __init__(self) -> None:
        self.told: list[tuple[Key, ...]] = []

    def evict(self, state: dict[str, Any], resident: Sequence[Key], needed: Sequence[Key]) -> Key:
        self.told.append(tuple(needed))
        return resident[0]


@torch.no_grad()
def told(tmp_path: Path, backend: Backend) -> list[tuple[Key, ...]]:
    saved(tmp_path)
    policy = Listening()
    store = ExpertStore(tmp_path / "experts.safetensors", 1, prefix="moe.", policy=policy)
    dispatch(torch.randn(3, 6), Routing(torch.tensor([0, 1, 2]), torch.ones(3), 3, 4, 1), store, backend=backend)
    return policy.told


def test_row_by_row_the_policy_is_told_what_the_call_still_uses(tmp_path: Path) -> None:
    assert told(tmp_path, gather) == [(1, 2), (2,)]


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="dispatch's loop calls experts one by one and tells the bank nothing of the rest of the call, so `needed` holds one key there; needs the offsets in `split`",
)
def test_sketch_the_loop_tells_the_store_what_the_call_still_uses(tmp_path: Path) -> None:
    assert told(tmp_path, loop) == [(1, 2), (2,)]
