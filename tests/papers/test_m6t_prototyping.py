"""Expert prototyping: one expert of each group, k = 1 is Switch, groups of one are a dense sum, k separate layers and their cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.records import Context, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.prototypes import Prototypes
from rarefy.experts.routers.switch import Switch
from rarefy.experts.routers.topk import TopK
from tests.evidence import check
from tests.papers.routed import Counting

SLUG = "m6t-prototyping"
NAME = "one expert of each group, equal to k separate top-1 layers"


def separate(moe: MoE, k: int, x: Tensor) -> Tensor:
    """k layers of their own with top-1 routers, added up."""
    size, out = moe.bank.experts // k, torch.zeros_like(x)
    for z in range(k):
        part = MoE(Linear(x.shape[1], size), Switch(), GLU(size, x.shape[1], 5), moe.overflow)
        with torch.no_grad():
            for mine, whole in zip(part.parameters(), moe.parameters(), strict=True):
                mine.copy_(whole[z * size : (z + 1) * size])
        out = out + part(x)
    return out


def grouped(choice: type[Choice]) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    moe = MoE(Linear(6, 12), choice(3), GLU(12, 6, 5), choice(3).overflow)
    with Trace(moe) as trace:
        y = moe(x)
    routing = trace.entries[0].routing
    before = moe.choice(moe.affinity(x, Context(), moe.bank), Context())
    assert torch.equal(before.expert.view(-1, 3) // 4, torch.arange(3).expand(40, 3)), "not one expert of each group"
    assert routing.dropped is not None and routing.dropped.sum() > 0
    torch.testing.assert_close(y, separate(moe, 3, x), atol=1e-5, rtol=1e-5)
    one = MoE(moe.affinity, choice(1), moe.bank)
    torch.testing.assert_close(one(x), MoE(moe.affinity, Switch(), moe.bank)(x), atol=1e-6, rtol=1e-6)
    every = MoE(moe.affinity, choice(12), moe.bank)
    torch.testing.assert_close(every(x), torch.stack([f(x) for f in moe.bank.split()]).sum(0), atol=1e-5, rtol=1e-5)


class TopOfAll(TopK):
    """k experts from anywhere: the groups are left out."""


class OneSoftmax(Prototypes):
    """The right experts, weighted by one softmax over all of them: the groups' routers are not their own."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        found = super().__call__(scores, context)
        weight = scores.logits.softmax(-1)[found.rows(), found.expert]
        return type(found)(found.expert, weight, found.items, found.experts, found.k, scores=scores)


@check(SLUG, NAME, kind="method")
def test_grouped() -> None:
    grouped(Prototypes)


@check(SLUG, NAME, kind="twin")
def test_grouped_twin() -> None:
    with pytest.raises(AssertionError, match="not one expert of each group"):
        grouped(TopOfAll)


@check(SLUG, NAME, kind="twin")
def test_grouped_twin_with_one_softmax() -> None:
    with pytest.raises(AssertionError, match="not close"):
        grouped(OneSoftmax)


def cost(choice: Choice, factor: float) -> tuple[int, int]:
    """Rows that the experts run, and places per expert, for 60 rows that all want the same experts."""
    torch.manual_seed(0)
    moe = MoE(Linear(6, 6), choice, Counting(6, 6, 5), Capacity(factor))
    with Trace(moe) as trace, torch.no_grad():
        moe(torch.randn(1, 6).expand(60, 6))
    return moe.bank.rows, int(trace.entries[0].routing.counts().max())


def costs_what_top_k_costs(choice: type[Choice]) -> None:
    """At equal k and factor the experts run as many rows as under top-k; the factor over k gives the places of one top-1 layer."""
    assert cost(choice(2), 1.0) == cost(TopK(2), 1.0) == (40, 20)
    assert cost(choice(2), 1.0 / 2)[1] == cost(Switch(), 1.0)[1] == 10


class EveryGroupTwice(TopK):
    """A group's second expert is taken too: twice the cost."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return TopK(2 * self.k)(scores, context)


@check(SLUG, "the cost of top-k at equal k and capacity", kind="method")
def test_cost() -> None:
    costs_what_top_k_costs(Prototypes)


@check(SLUG, "the cost of top-k at equal k and capacity", kind="twin")
def test_cost_twin() -> None:
    with pytest.raises(AssertionError):
        costs_what_top_k_costs(EveryGroupTwice)


def test_a_k_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 3 with 4 experts"):
        Prototypes(3)(Scores(torch.zeros(1, 4)), Context())
