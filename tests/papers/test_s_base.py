"""Sinkhorn routing: prices that even out what rows want, in training alone, and a sigmoid of the logits as they are for the weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.experts.routers.load_bias import violation
from rarefy.experts.routers.sinkhorn import Sinkhorn, prices
from rarefy.experts.routers.switch import Switch
from tests.evidence import check

SLUG = "s-base"
TRAINING = Context(training=True)


def logits(rows: int = 400, experts: int = 8) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, experts, generator=g) + 2 * torch.randn(experts, generator=g)  # some experts are liked by all


def choice_holds(choice: type[Sinkhorn]) -> None:
    """Where the best experts alone would be crowded, prices even the load out, more with more rounds; outside training the best; the weight is the sigmoid, with the only gradient."""
    z = logits().requires_grad_()
    crowded = violation(Switch()(Scores(z), Context()).counts())
    found = [violation(choice(1, rounds=rounds)(Scores(z), TRAINING).counts()) for rounds in (3, 30)]
    assert crowded > 2 and found[0] < 0.8 and found[1] < 0.3, (crowded, found)
    for k in (1, 3):
        for context in (TRAINING, Context()):
            routing = choice(k)(Scores(z), context)
            chosen = z[routing.rows(), routing.expert]
            torch.testing.assert_close(routing.weight, chosen.sigmoid())
            (grad,) = torch.autograd.grad(routing.weight.sum(), z)
            assert int((grad != 0).sum()) == 400 * k
        assert torch.equal(choice(k)(Scores(z), Context()).expert.view(400, k), z.topk(k).indices)


class WithoutPrices(Sinkhorn):
    """The best expert in training too."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return super().__call__(scores, Context(valid=context.valid, live=context.live))


class AlwaysPriced(Sinkhorn):
    """Balanced outside training as well."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return super().__call__(scores, TRAINING)


class WeighsThePrice(Sinkhorn):
    """The weight too has the price in it."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        a = prices(scores.logits, torch.ones(len(scores.logits), dtype=torch.bool), self.rounds) if context.training else 0.0
        r = super().__call__(scores, context)
        return Routing(r.expert, (scores.logits + a)[r.rows(), r.expert].sigmoid(), r.items, r.experts, r.k, scores=scores)


CHOICE = "prices even the load out in training alone, and the weight is the sigmoid of the logit as it is"


@check(SLUG, CHOICE, kind="method")
def test_choice() -> None:
    choice_holds(Sinkhorn)


@check(SLUG, CHOICE, kind="twin")
@pytest.mark.parametrize("twin", [WithoutPrices, AlwaysPriced, WeighsThePrice])
def test_choice_twins(twin: type[Sinkhorn]) -> None:
    with pytest.raises(AssertionError):
        choice_holds(twin)


@check(SLUG, CHOICE, kind="oracle")
def test_prices_against_numpy() -> None:
    """Scaling a positive matrix by its rows and columns in turn, in numpy, gives the same relative prices; converged, columns are even."""
    z = logits(30, 5)
    for rounds in (1, 3, 200):
        p = np.exp(z.double().numpy())
        scale = np.ones(5)
        for _ in range(rounds):
            rows = p * scale
            rows = rows / rows.sum(1, keepdims=True)
            scale = scale / rows.sum(0)
        want = np.log(scale) - np.log(scale).mean()
        np.testing.assert_allclose(prices(z, torch.ones(30, dtype=torch.bool), rounds).double().numpy(), want, atol=1e-5)
    mass = (z + prices(z, torch.ones(30, dtype=torch.bool), 200)).softmax(1).sum(0)
    torch.testing.assert_close(mass, torch.full((5,), 6.0), atol=1e-3, rtol=0)


def test_padding_and_dead_experts_take_no_part() -> None:
    z, valid, live = logits(40, 4), torch.arange(40) < 30, torch.tensor([True, True, False, True])
    context: dict[str, Any] = {"training": True, "live": live}
    among = Sinkhorn(1)(Scores(torch.where(valid[:, None], z, 50.0)), Context(valid=valid, **context))
    alone = Sinkhorn(1)(Scores(z[:30]), Context(**context))
    assert torch.equal(among.expert[:30], alone.expert) and (among.expert[30:] == 4).all() and among.counts()[2] == 0
    without = Sinkhorn(1)(Scores(z[:, live]), TRAINING).counts()
    assert torch.equal(Sinkhorn(1)(Scores(z), Context(**context)).counts()[live], without)
    assert not Sinkhorn().causal(training=True) and Sinkhorn().causal(training=False)
    with pytest.raises(BadInput, match="0 rounds"):
        Sinkhorn(rounds=0)
