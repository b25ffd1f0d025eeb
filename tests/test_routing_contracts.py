"""Every check of the routing contracts fails on a part that is broken in the way it looks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy.testing as contracts
from rarefy.core.discover import methods
from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Affinity, Balance, Bank, Choice, Overflow
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity, first_come
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.switch import Switch
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import unpadded
from rarefy.testing.contract import contracts_of
from tests.test_contracts_negative import caught

Broken = Callable[[Routing, Scores, Context], Routing]


@dataclass(frozen=True)
class Chooses(Choice):
    """`broken` says what becomes of top-2's answer, or of switch's where k is 1."""

    name = "chooses"
    broken: Broken
    k: int = 2

    def whole(self, scores: Scores, context: Context) -> Routing:
        return TopK(self.k, renormalise=False)(scores, context)

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return self.broken(self.whole(scores, context), scores, context)


def beyond(r: Routing, scores: Scores, context: Context) -> Routing:
    return replace(r, expert=r.expert + 1)


def weighs_nobody(r: Routing, scores: Scores, context: Context) -> Routing:
    return replace(r, weight=r.weight + 0.1)


class Promises(Switch):
    name = "promises"

    def invariants(self, routing: Routing, scores: Scores, context: Context) -> dict[str, bool]:
        return {"weights of a row sum to 1": bool((routing.weight == 1).all())}


def in_bfloat16(r: Routing, scores: Scores, context: Context) -> Routing:
    return replace(r, weight=r.weight.bfloat16() if torch.is_autocast_enabled("cpu") else r.weight)


class Highest(Switch):
    name = "highest"

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(Scores(scores.logits.flip(1)), replace(context, live=None if context.live is None else context.live.flip(0)))
        return replace(r, expert=(r.experts - 1 - r.expert) % (r.experts + 1), scores=scores)


class NeedsARow(Switch):
    name = "needs-a-row"

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return r if r.items else replace(r, expert=torch.zeros(1, dtype=torch.long), weight=torch.ones(1))


def skips_one(r: Routing, scores: Scores, context: Context) -> Routing:
    return replace(r, expert=r.expert.where(r.rows() > 0, r.experts), weight=r.weight * (r.rows() > 0))


def serves_padding(r: Routing, scores: Scores, context: Context) -> Routing:
    return TopK(r.k or 1)(scores, replace(context, valid=None))


def looks_at_padding(r: Routing, scores: Scores, context: Context) -> Routing:
    return r if context.valid is None else replace(r, weight=r.weight * scores.logits.mean().sigmoid())


def revives(r: Routing, scores: Scores, context: Context) -> Routing:
    return TopK(r.k or 1)(scores, replace(context, live=None))


def forgets_the_living(r: Routing, scores: Scores, context: Context) -> Routing:
    return r if context.live is None else replace(r, expert=torch.full_like(r.expert, r.experts), weight=r.weight * 0)


class Renormalised(Switch):
    """The weight of one expert, renormalised, is 1: nothing to learn from."""

    name = "renormalised"

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return (lambda r: replace(r, weight=r.weight / r.weight.clamp(min=1e-9)))(super().__call__(scores, context))


def first_rows_of_each(r: Routing, scores: Scores, context: Context) -> Routing:
    """The rows that an expert likes most, of all rows: what expert choice does."""
    best = scores.logits.argsort(0, descending=True)[: max(1, r.items // 2)].T.flatten()
    mine = torch.arange(r.experts).repeat_interleave(min(r.items, max(1, r.items // 2)))
    return unpadded(Routing(mine, scores.logits.sigmoid()[best, mine], r.items, r.experts, item=best, scores=scores), context.valid)


class Anticausal(Switch):
    """Honest routing under a flag that says otherwise."""

    name = "anticausal"

    def causal(self, training: bool) -> bool:
        return False


class CausalInTrainingAlone(Switch):
    """Says that it looks ahead outside training, where it does not."""

    name = "causal-in-training-alone"

    def causal(self, training: bool) -> bool:
        return training


@dataclass(frozen=True)
class Scales(Choice):
    """Looks ahead in evaluation only: the contract must look there too."""

    name = "scales"

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = Switch()(scores, context)
        return r if context.training else replace(r, weight=r.weight * scores.logits.std().sigmoid())


BROKEN_CHOICES: list[tuple[Choice, str, str]] = [
    (Chooses(beyond), "every_index_is_an_expert_or_nobody", "routes to .* of 4 experts|nobody's is not 0"),
    (Chooses(weighs_nobody), "every_index_is_an_expert_or_nobody", "nobody's is not 0"),
    (Promises(), "what_it_declares_holds", "weights of a row sum to 1"),
    (Chooses(in_bfloat16), "it_runs_in_float32_and_under_autocast", "torch.bfloat16 under autocast"),
    (Highest(), "of_equals_it_takes_the_lower_index", "takes the higher of two equal experts"),
    (NeedsARow(), "no_rows_give_no_assignments", "1 assignments of no rows"),
    (Chooses(skips_one), "a_lone_expert_gets_every_row_and_k_of_all_gets_all", "does not choose all"),
    (Chooses(skips_one, k=1), "a_lone_expert_gets_every_row_and_k_of_all_gets_all", "a lone expert gets"),
    (Chooses(serves_padding), "padding_goes_to_nobody_and_changes_nothing", "routes padding to an expert"),
    (Chooses(looks_at_padding), "padding_goes_to_nobody_and_changes_nothing", "what padding holds changes"),
    (Chooses(revives), "dead_experts_get_nothing", "routes rows to dead experts"),
    (Chooses(forgets_the_living), "dead_experts_get_nothing", "nothing to the live experts"),
    (Renormalised(), "the_router_learns_through_the_weights", "no gradient from the task"),
    (Chooses(first_rows_of_each), "its_causal_flag_is_true", "later rows change the routing"),
    (Anticausal(), "its_causal_flag_is_true", "causal = False in training, and later rows never change"),
    (CausalInTrainingAlone(), "its_causal_flag_is_true", "causal = False outside training, and later rows never change"),
    (Scales(), "its_causal_flag_is_true", "later rows change the routing"),
]


class Wraps(Affinity):
    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.inner = Linear(width, experts)

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        scores: Scores = self.inner(x, context, bank)
        return scores


class CastsAfterwards(Wraps):
    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        return Scores((x @ self.inner.weight.T.to(x)).float())


class Centres(Wraps):
    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        return super().forward(x - x.mean(0), context, bank)


class AlwaysNoisy(Wraps):
    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        scores = super().forward(x, context, bank)
        return Scores(scores.logits + torch.randn_like(scores.logits))


class Idle(Wraps):
    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__(width, experts)
        self.scale = nn.Parameter(torch.ones(1))


class Hides(Wraps):
    """What it scores by changes with every call, and is in no state dict."""

    calls = 0

    def forward(self, x: Tensor, context: Context, bank: Any) -> Scores:
        self.calls += 1
        return Scores(super().forward(x, context, bank).logits * self.calls)


BROKEN_AFFINITIES: list[tuple[Affinity, str, str]] = [
    (CastsAfterwards(), "scores_are_float32_of_every_row_and_expert", "does not score in float32"),
    (Centres(), "a_row_is_scored_alone", "later rows change the scores"),
    (AlwaysNoisy(), "evaluation_has_no_noise", "twice differently"),
    (Idle(), "every_parameter_learns", "no gradient for scale"),
    (Hides(), "copies_score_alike", "does not survive"),
]


class GathersTheNext(GLU):
    def each(self, x: Tensor, expert: Tensor) -> Tensor:
        return super().each(x, (expert + 1) % self.experts)


class MixesRows(GLU):
    def split(self) -> Any:
        return [lambda x, f=f: f(x - x.sum(0)) for f in super().split()]


class OneForAll(GLU):
    def split(self) -> Any:
        return [super().split()[0]] * self.experts


class Drifts(GLU):
    """What it computes changes with every call, and is in no state dict."""

    calls = 0

    def split(self) -> Any:
        self.calls += 1
        return [lambda x, f=f, c=self.calls: f(x) * c for f in super().split()]


BROKEN_BANKS: list[tuple[Bank, str, str]] = [
    (GathersTheNext(4, 8, 6), "every_back_end_is_the_loop", "by gather"),
    (MixesRows(4, 8, 6), "a_row_is_served_alone", "mixes rows"),
    (OneForAll(4, 8, 6), "experts_are_their_own", "the same function"),
    (Drifts(4, 8, 6), "copies_compute_alike", "does not survive"),
]


@dataclass(frozen=True)
class Limits(Overflow):
    """`broken` says what becomes of the answer of a capacity of one even share."""

    name = "limits"
    broken: Callable[[Routing, Routing, Context], Routing]

    def bound(self, routing: Routing, context: Context) -> int | None:
        return Capacity(1.0, 1.0).bound(routing, context)

    def __call__(self, routing: Routing, context: Context) -> Routing:
        return self.broken(Capacity(1.0, 1.0)(routing, context), routing, context)


def one_more(found: Routing, before: Routing, context: Context) -> Routing:
    return first_come(before, context, 1 + Capacity(1.0, 1.0).bound(before, context))


def silent(found: Routing, before: Routing, context: Context) -> Routing:
    return replace(found, dropped=before.dropped)


def forgetful(found: Routing, before: Routing, context: Context) -> Routing:
    return replace(found, dropped=None if found.dropped is None else found.dropped - (0 if before.dropped is None else before.dropped))


def ghosts(found: Routing, before: Routing, context: Context) -> Routing:
    return replace(found, weight=unpadded(before, context.valid).weight)


def rescales(found: Routing, before: Routing, context: Context) -> Routing:
    return replace(found, weight=found.weight * 0.5)


def counts_padding(found: Routing, before: Routing, context: Context) -> Routing:
    return unpadded(Capacity(1.0, 1.0)(before, replace(context, valid=None)), context.valid)


def detaches(found: Routing, before: Routing, context: Context) -> Routing:
    return replace(found, weight=found.weight.detach() + 0.0 * found.weight)


BROKEN_OVERFLOWS: list[tuple[Overflow, str, str]] = [
    (Limits(one_more), "the_bound_is_never_exceeded", "where an expert keeps at most"),
    (Limits(silent), "nothing_is_lost_silently", "dropped .* of"),
    (Limits(forgetful), "nothing_is_lost_silently", "dropped"),
    (Limits(ghosts), "nothing_is_lost_silently", "keeps a weight"),
    (Limits(rescales), "where_there_is_room_nothing_changes", "within its bound"),
    (Limits(counts_padding), "padding_takes_no_place", "where padding would go"),
    (Limits(detaches), "what_it_keeps_has_its_gradient", "cuts the gradient"),
]


@dataclass(frozen=True)
class Balances(Balance):
    """`broken` says what becomes of the load balance of an entry."""

    name = "balances"
    broken: Callable[[Entry], Tensor]

    def even(self, experts: int) -> float:
        return 0.01

    def __call__(self, entry: Entry) -> Tensor:
        return self.broken(entry)


def by_all_experts(entry: Entry) -> Tensor:
    live = entry.context.live
    return LoadBalance()(entry) if live is None else LoadBalance()(entry) * live.numel() / live.sum()


def blind(entry: Entry) -> Tensor:
    return LoadBalance()(entry) * 0 + 0.01 * (entry.routing.items > 0)


def backwards(entry: Entry) -> Tensor:
    return 0.02 - LoadBalance()(entry)


def with_padding(entry: Entry) -> Tensor:
    return LoadBalance()(replace(entry, context=replace(entry.context, valid=None)))


def by_counts(entry: Entry) -> Tensor:
    assert entry.routing.scores is not None
    share = entry.routing.counts() / max(1, entry.routing.items)
    return 0.01 * share.numel() * (share * share).sum() + 0 * entry.routing.scores.logits.sum()


@dataclass(frozen=True)
class Remembers(Balance):
    """Loads over all layers so far: two that collapsed on different experts look even."""

    name = "remembers"
    seen: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def even(self, experts: int) -> float:
        return 0.01

    def __call__(self, entry: Entry) -> Tensor:
        assert entry.routing.scores is not None
        self.seen.append(entry.routing.scores.logits.softmax(-1).mean(0).detach())
        mean = torch.stack([p for p in self.seen if p.numel() == entry.routing.experts]).mean(0)
        return 0.01 * mean.numel() * (mean * mean).sum()


def nan_for_nobody(entry: Entry) -> Tensor:
    return LoadBalance()(entry) + (0.0 / torch.tensor(float(entry.routing.items)))


class Silent(LoadBalance):
    """States another value than it has."""

    name = "silent"

    def even(self, experts: int) -> float:
        return 0.0


BROKEN_BALANCES: list[tuple[Balance, str, str]] = [
    (Silent(), "it_has_the_value_that_it_states", "states 0 for 2 even experts"),
    (Balances(by_all_experts), "it_has_the_value_that_it_states", "a fourth that is dead"),
    (Balances(blind), "a_collapsed_layer_costs_more", "for layers collapsed"),
    (Balances(backwards), "a_collapsed_layer_costs_more", "for layers collapsed"),
    (Balances(with_padding), "padding_does_not_count", "with padding"),
    (Balances(by_counts), "it_has_a_gradient", "no gradient"),
    (Remembers(), "two_layers_collapsed_on_different_experts_are_both_seen", "remembers layers"),
    (Balances(blind), "two_layers_collapsed_on_different_experts_are_both_seen", "does not see a layer"),
    (Balances(nan_for_nobody), "no_rows_cost_nothing", "gives nan"),
]

BROKEN: list[tuple[Any, str, str]] = [*BROKEN_CHOICES, *BROKEN_AFFINITIES, *BROKEN_BANKS, *BROKEN_OVERFLOWS, *BROKEN_BALANCES]


@pytest.mark.parametrize(("part", "check", "message"), BROKEN, ids=[f"{i}-{type(p).__name__}-{c}" for i, (p, c, _) in enumerate(BROKEN)])
def test_a_broken_part_is_caught_by_the_check_that_looks_for_it(part: Any, check: str, message: str) -> None:
    found = caught(part)
    assert check in found, f"{check} holds for {part!r}; broken are {sorted(found)}"
    assert re.search(message, found[check]), found[check]


def test_every_check_has_a_part_that_it_catches() -> None:
    toys = {check for _, check, _ in BROKEN}
    for role in (Choice, Affinity, Bank, Overflow, Balance):
        assert {f.__name__ for f in contracts_of(role)} <= toys, role


def test_the_parts_that_the_toys_are_made_of_are_whole() -> None:
    for part in (Chooses(lambda r, s, c: r), Wraps(), Limits(lambda found, before, context: found), Balances(LoadBalance())):
        assert caught(part) == {}


def test_a_part_that_states_neither_bound_nor_value_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LoadBalance, "even")
    with pytest.raises(AssertionError, match="even"):
        contracts.check(LoadBalance)
    monkeypatch.delattr(Capacity, "bound")
    with pytest.raises(AssertionError, match="bound"):
        contracts.check(Capacity)


UNEVEN = pytest.mark.xfail(strict=True, reason="experts of several widths run one after the other, over row counts that no graph can hold")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[UNEVEN] if name == "by-size" else []) for name in methods(Choice)])
def test_every_router_is_one_graph_when_compiled(name: str) -> None:
    choice = methods(Choice)[name]()
    torch.manual_seed(0)
    moe = MoE((choice.affinity or Linear)(8, 4), choice, (choice.bank or GLU)(4, 8, 6), choice.overflow, shared=choice.shared(8, 6))
    x, context = torch.randn(9, 8), Context(valid=torch.arange(9) != 4, live=torch.tensor([True, True, True, False]))
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        got: Tensor = torch.compile(moe, backend="eager", fullgraph=True)(x, context)
        torch.manual_seed(1)
        torch.testing.assert_close(got, moe(x, context))
    assert not bool(got[4].any())


def test_what_a_choice_is_trained_with_is_of_its_roles() -> None:
    for kind in (part() for part in methods(Choice).values()):
        assert all(isinstance(balance, Balance) for balance in kind.balances)
        assert kind.overflow is None or isinstance(kind.overflow, Overflow)
        assert kind.affinity is None or isinstance(kind.affinity(8, 4), Affinity)
        assert kind.bank is None or isinstance(kind.bank(4, 8, 6), Bank)
