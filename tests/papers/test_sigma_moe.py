"""sigma-MoE: without gates it is the dense layer, initialised like it; a sigmoid per expert; experts dropped before the choice; an even mean; close to dense at a quarter of the FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.roles import Choice
from rarefy.experts.balance.mean_entropy import MeanEntropy
from rarefy.experts.banks.relu import ReLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.sigmoid import Sigmoid, directions
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense, per_row, row_major
from rarefy.tasks.char_lm import CharLM, RoutedCharacters
from tests.evidence import check

SLUG = "sigma-moe"
TRAINING = Context(training=True)


def logits(rows: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))


class AllAtOne(Sigmoid):
    """Every expert of every row, at weight 1."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        rows, experts = scores.logits.shape
        return row_major(scores, context, torch.arange(experts).expand(rows, experts), torch.ones(rows, experts))


def bank_holds(bank: Callable[[int, int, int], ReLU], router: Callable[[int, int], Linear]) -> None:
    """All experts at weight 1 are one dense layer of E*I units, drawn as such; the router's rows have one length and the first layer's deviation."""
    torch.manual_seed(0)
    moe, x = MoE(router(64, 32), AllAtOne(), bank(32, 64, 16)), torch.randn(5, 64)
    up, down = (moe.bank.get_parameter(name).detach() for name in ("up_proj", "down_proj"))
    wide = F.linear(F.linear(x, up.flatten(0, 1)).relu(), down.permute(1, 0, 2).flatten(1))
    torch.testing.assert_close(moe(x), wide, atol=1e-5, rtol=1e-5)
    layers, units = 2, 32 * 16
    assert up.std().item() == pytest.approx((2 / (64 * layers)) ** 0.5, rel=0.02)
    assert down.std().item() == pytest.approx((2 / (units * layers)) ** 0.5, rel=0.02)
    matrix = moe.get_parameter("affinity.weight").detach()
    torch.testing.assert_close(matrix.norm(dim=1), matrix[0].norm().expand(32))
    assert matrix.std().item() == pytest.approx((2 / (64 * layers)) ** 0.5, rel=1e-4)


class ByOneExpertsWidth(ReLU):
    """Drawn as if each expert were a layer alone."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__(experts, width, inner)
        with torch.no_grad():
            self.down_proj.mul_(experts**0.5)


BANK = "without gates the layer is dense, and is drawn as such"


@check(SLUG, BANK, kind="method")
def test_bank() -> None:
    bank_holds(ReLU, directions)
    assert directions(64, 32, layers=8).weight.std().item() == pytest.approx((2 / (64 * 8)) ** 0.5, rel=1e-4)


@check(SLUG, BANK, kind="twin")
@pytest.mark.parametrize(("bank", "router"), [(ByOneExpertsWidth, directions), (ReLU, Linear)])
def test_bank_twins(bank: Any, router: Any) -> None:
    with pytest.raises(AssertionError):
        bank_holds(bank, router)


def choice_holds(choice: Callable[..., Choice]) -> None:
    """The k likeliest at their own sigmoid, whatever the others' logits; dropped before the choice, so that others take over, and without rescaling."""
    z = logits(400, 4)
    found = dense(choice(2, dropout=0.0)(Scores(z), TRAINING))
    assert ((found > 0).sum(1) == 2).all()
    torch.testing.assert_close(found[found > 0], z.sigmoid()[found > 0])
    assert (z.masked_fill(found == 0, 9e9).min(1).values >= z.masked_fill(found > 0, -9e9).max(1).values).all()
    torch.manual_seed(7)  # not the seed of the logits: their draws would be related
    some = choice(1, dropout=0.5)(Scores(z), TRAINING)
    served, weights = per_row(some).float().mean().item(), dense(some)
    assert served == pytest.approx(1 - 0.5**4, abs=0.04), "a dropped expert's place goes to the next"
    torch.testing.assert_close(weights[weights > 0], z.sigmoid()[weights > 0])
    assert weights.argmax(1).eq(z.argmax(1)).float().mean().item() == pytest.approx(0.5 + 0.5**4 * 0.25, abs=0.06)
    most = choice(3, dropout=0.9)(Scores(z), TRAINING)
    assert torch.isfinite(most.weight).all() and per_row(most).float().mean().item() == pytest.approx(0.4, abs=0.08), "fewer than k are left"
    still = choice(1, dropout=0.5)(Scores(z), Context())
    assert torch.equal(still.expert, z.argmax(1))


class Softmax(Sigmoid):
    """The k likeliest of a softmax, renormalised."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return TopK(self.k)(scores, context)


class DropsAfterwards(Sigmoid):
    """Chosen experts are dropped: nobody takes over."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = Sigmoid(self.k, dropout=0.0)(scores, context)
        lost = torch.rand_like(r.weight) < self.dropout * context.training
        return Routing(r.expert.masked_fill(lost, r.experts), r.weight * ~lost, r.items, r.experts, r.k, scores=scores)


class Rescales(Sigmoid):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return Routing(r.expert, r.weight / (1 - self.dropout), r.items, r.experts, r.k, scores=scores)


CHOICE = "the k likeliest at their own sigmoid, experts dropped before the choice and not rescaled"


@check(SLUG, CHOICE, kind="method")
def test_choice() -> None:
    choice_holds(Sigmoid)


@check(SLUG, CHOICE, kind="twin")
@pytest.mark.parametrize("twin", [Softmax, DropsAfterwards, Rescales])
def test_choice_twins(twin: Any) -> None:
    with pytest.raises(AssertionError):
        choice_holds(twin)


def entry(z: Tensor, valid: Tensor | None = None) -> Entry:
    return Entry("layer", 0, None, Sigmoid(1, dropout=0.0)(Scores(z), Context()), Context(training=True, valid=valid))


def balance_holds(balance: Callable[[Entry], Tensor]) -> None:
    """Rows that are sure, each of another expert, cost as little as rows that are not sure; one favourite costs most; no logit overflows."""
    sure = 50 * torch.eye(4)
    lowest = -1e-3 * np.log(4)
    assert balance(entry(torch.zeros(4, 4))).item() == pytest.approx(lowest)
    assert balance(entry(sure)).item() == pytest.approx(lowest)
    assert balance(entry(sure[:1].expand(4, 4))).item() == pytest.approx(0.0, abs=1e-7)
    assert balance(entry(torch.cat([sure, sure[:1].expand(9, 4)]), torch.arange(13) < 4)).item() == pytest.approx(lowest)
    far = (1e4 * torch.eye(4)).requires_grad_()
    (grad,) = torch.autograd.grad(balance(entry(far)), far)
    assert torch.isfinite(grad).all()
    z = logits(30, 4)
    p = z.softmax(-1).mean(0)
    torch.testing.assert_close(balance(entry(z)), 1e-3 * (p * p.log()).sum())


BALANCE = "the entropy of the mean distribution, not of each row's"


@check(SLUG, BALANCE, kind="method")
def test_balance() -> None:
    (declared,) = Sigmoid.balances
    balance_holds(declared)


@check(SLUG, BALANCE, kind="twin")
def test_balance_twin_of_each_row() -> None:
    def each_row(seen: Entry) -> Tensor:
        assert seen.routing.scores is not None
        p = seen.routing.scores.logits.softmax(-1)
        return 1e-3 * (p * p.clamp(min=1e-30).log()).sum(-1).mean()

    with pytest.raises(AssertionError):
        balance_holds(each_row)


class WithDropout(ReLU):
    """Standard dropout of inner activations."""

    def split(self) -> Any:
        return [lambda x, e=e: F.linear(F.dropout(F.linear(x, self.up_proj[e]).relu(), 0.2, self.training), self.down_proj[e]) for e in range(self.experts)]


class SoftmaxAndDropout(Softmax):
    bank = WithDropout


class DrawnAlone(Sigmoid):
    bank = ByOneExpertsWidth


@cache
def loss(choice: Choice) -> float:
    """Held-out loss after 120 steps on text: 16 experts of 32 units."""
    task = CharLM(width=32, experts=16, inner=32, rows=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RoutedCharacters(32, 16, 32, choice)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(120):
            optimizer.zero_grad()
            task.loss(model, task.batch(0, step)).backward()
            optimizer.step()
    return task.evaluate(model)["loss"]


def near_dense(choice: type[Sigmoid]) -> None:
    """4 of 16 experts, a quarter of the FLOPs: within 3% of the dense layer of as many parameters, and better than renormalised softmax with standard dropout.

    Three seeds gave 1.2, 1.0 and 2.0% where the lazy draw gave 4.2, 3.2 and 4.0, and softmax with dropout 2.4, 1.6 and 2.9. After
    1,500 steps at width 64 the draw no longer mattered (seeds 0 and 1: 2.1 and 0.1%; drawn alone 1.5 and -0.6; softmax with dropout
    4.5 and 1.0).
    """
    found = loss(choice(4))
    assert found <= 1.03 * loss(AllAtOne(4)), (found, loss(AllAtOne(4)))
    assert found < loss(SoftmaxAndDropout(4))


DENSE = "within 3% of the dense layer on text at a quarter of its FLOPs, and better than softmax with standard dropout"


@check(SLUG, DENSE, kind="method")
def test_near_dense() -> None:
    near_dense(Sigmoid)


@check(SLUG, DENSE, kind="twin")
@pytest.mark.parametrize("twin", [DrawnAlone, SoftmaxAndDropout])
def test_near_dense_twins(twin: Any) -> None:
    with pytest.raises(AssertionError):
        near_dense(twin)


@check(SLUG, "the layer is that of numpy, expert by expert", kind="oracle")
def test_against_numpy() -> None:
    torch.manual_seed(0)
    moe, x = MoE(directions(6, 5), Sigmoid(2), ReLU(5, 6, 4)).eval(), torch.randn(7, 6)
    w3, w1, w2 = (p.detach().double().numpy() for p in (moe.get_parameter("affinity.weight"), moe.bank.get_parameter("up_proj"), moe.bank.get_parameter("down_proj")))
    got = moe(x).detach()
    for r, row in enumerate(x.double().numpy()):
        s = 1 / (1 + np.exp(-w3 @ row))
        y = sum(w2[e] @ (s[e] * np.maximum(w1[e] @ row, 0)) for e in np.argsort(-s)[:2])
        torch.testing.assert_close(got[r].double(), torch.from_numpy(y), atol=1e-5, rtol=1e-5)


def test_it_trains_as_the_paper_does_by_its_name() -> None:
    model = CharLM(width=16, experts=8, inner=4).model(0, router="sigmoid:k=2")
    moe = model.get_submodule("moe")
    assert isinstance(moe.bank, ReLU) and moe.bank.up_proj.shape == (8, 4, 16) and model.balances == (MeanEntropy(1e-3),)
    assert moe.choice == Sigmoid(2, dropout=0.05)
    with pytest.raises(BadInput, match="expert dropout 2"):
        Sigmoid(1, dropout=2.0)
    with pytest.raises(BadInput, match="k = 9 with 4 experts"):
        Sigmoid(9)(Scores(torch.zeros(1, 4)), Context())
