"""XMoE: the fewest experts that reach p, dense when all are taken, places by rank, a balance of first choices, and no expert run for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Choice, Overflow
from rarefy.experts.balance.switch_balance import LoadBalance
from rarefy.experts.banks.glu import GLU
from rarefy.experts.dispatch import dispatch
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.overflow.row_capacity import RowCapacity
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.mass_before import MassBefore
from rarefy.experts.routers.top_p import TopP
from rarefy.experts.routing import dense
from tests.evidence import check
from tests.papers.routed import Counting

SLUG = "xmoe-threshold"


def fewest(p: Tensor, bound: float) -> int:
    """The smallest k whose likeliest k experts have a mass of at least `bound`, by trying each."""
    ordered = sorted(p.tolist(), reverse=True)
    return next((k for k in range(1, len(ordered)) if sum(ordered[:k]) >= bound), len(ordered))


def threshold_holds(choice: type[Choice]) -> None:
    """As many as the brute force says, more for a larger p, with their own probabilities; experts run those rows and no others."""
    p = torch.randint(1, 9, (200, 8), generator=torch.Generator().manual_seed(0)).double()
    p = p / p.sum(-1, keepdim=True)
    before = torch.zeros(200, dtype=torch.long)
    for bound in (0.1113, 0.3007, 0.6107, 0.9001, 0.9731):
        routing = choice(bound)(Scores(p.log().float()), Context())
        kept = dense(routing)
        served = (kept > 0).sum(-1)
        assert served.tolist() == [fewest(row, bound) for row in p], "not the fewest that reach p"
        assert (served >= before).all()
        torch.testing.assert_close(kept, p.float() * (kept > 0))
        before = served
    assert (dense(choice(0.5)(Scores(torch.zeros(3, 2)), Context())) > 0).sum(-1).tolist() == [1] * 3, "p is reached"
    moe = MoE(Linear(6, 8), choice(0.7), Counting(8, 6, 5))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    moe(x)
    weights = dense(moe.choice(moe.affinity(x, Context(), moe.bank), Context()))
    assert moe.bank.rows == int((weights > 0).sum()), "experts run for nothing"


class Renormalised(MassBefore):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return replace(r, weight=r.weight / dense(r).sum(-1)[r.rows()])


class MaskedOut(MassBefore):
    """Every expert is run, and weighted by 0 where it is not chosen."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return replace(r, expert=scores.logits.sort(descending=True, stable=True).indices.flatten())


@check(SLUG, "the fewest experts whose mass reaches p, and only they run", kind="method")
def test_threshold() -> None:
    threshold_holds(MassBefore)


@check(SLUG, "the fewest experts whose mass reaches p, and only they run", kind="twin")
@pytest.mark.parametrize(("twin", "why"), [(Renormalised, "not close"), (TopP, "p is reached|not the fewest"), (MaskedOut, "run for nothing")])
def test_threshold_twin(twin: type[Choice], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        threshold_holds(twin)


def dense_holds(choice: type[Choice]) -> None:
    """A dense gated layer, cut into blocks of its inner columns, is the sum of all experts with weight 1, which p = 1 chooses."""
    torch.manual_seed(0)
    gate, up, down, x = torch.randn(12, 6), torch.randn(12, 6), torch.randn(6, 12), torch.randn(9, 6)
    bank = GLU(4, 6, 3)
    with torch.no_grad():
        bank.gate_up_proj.copy_(torch.stack([torch.cat([g, u]) for g, u in zip(gate.split(3), up.split(3), strict=True)]))
        bank.down_proj.copy_(torch.stack(down.split(3, dim=1)))
    routing = choice(1.0)(Scores(30 * torch.randn(9, 4)), Context())
    y = dispatch(x, replace(routing, weight=(routing.expert < 4).float()), bank)
    torch.testing.assert_close(y, F.linear(F.silu(x @ gate.T) * (x @ up.T), down), atol=1e-4, rtol=1e-4)


class UpToRounding(MassBefore):
    """Leaves out the experts before which the mass rounds to 1."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return MassBefore(min(self.p, 0.9999999))(scores, context)


@check(SLUG, "p = 1 takes every expert: a split dense layer is the layer", kind="method")
def test_dense() -> None:
    dense_holds(MassBefore)


@check(SLUG, "p = 1 takes every expert: a split dense layer is the layer", kind="twin")
def test_dense_twin() -> None:
    with pytest.raises(AssertionError, match="not close"):
        dense_holds(UpToRounding)


def places_by_rank(overflow: Overflow) -> None:
    """C = ceil(cf R / E); no first choice is dropped while its expert serves a later one, and what is dropped is reported."""
    logits = 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    before = MassBefore(0.95)(Scores(logits), Context())
    after = overflow(before, Context(training=True))
    assert after.counts().max() == 12 and after.dropped is not None and torch.equal(after.counts() + after.dropped, before.counts())  # ceil(1.5 * 64 / 8)
    ranks = before.ranks()
    for e in range(8):
        kept, lost = ranks[after.expert == e], ranks[(before.expert == e) & (after.expert == 8)]
        assert not lost.numel() or kept.max() <= lost.min(), "a later choice has the place of an earlier one"


class ByRow(RowCapacity):
    """First come first served, whatever the rank."""

    def __call__(self, routing: Routing, context: Context) -> Routing:
        found = super().__call__(replace(routing, rank=torch.zeros_like(routing.expert)), context)
        return replace(found, rank=routing.rank)


@check(SLUG, "places go by rank of choice, and are counted by rows", kind="method")
def test_places() -> None:
    places_by_rank(replace(MassBefore.overflow, factor=1.5))


@check(SLUG, "places go by rank of choice, and are counted by rows", kind="twin")
@pytest.mark.parametrize("twin", [ByRow(1.5), Capacity(1.5)], ids=["by row", "by every assignment that might be"])
def test_places_twin(twin: Overflow) -> None:
    with pytest.raises(AssertionError):
        places_by_rank(twin)


def balance_holds(balance: Callable[[Entry], Tensor]) -> None:
    """f counts the likeliest expert of each row, kept or dropped, and nothing else."""
    logits = 2 * torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    routing = RowCapacity(0.5)(MassBefore(0.9)(Scores(logits), Context()), Context())
    f = torch.bincount(logits.argmax(-1), minlength=4) / 32
    want = 4 * (f * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(balance(Entry("layer", 0, None, routing, Context())), want)


@check(SLUG, "the balance loss counts first choices", kind="method")
def test_balance() -> None:
    (declared,) = MassBefore.balances
    balance_holds(replace(declared, alpha=1.0))


@check(SLUG, "the balance loss counts first choices", kind="twin")
def test_balance_twin_of_all_choices() -> None:
    with pytest.raises(AssertionError):
        balance_holds(LoadBalance(1.0))
