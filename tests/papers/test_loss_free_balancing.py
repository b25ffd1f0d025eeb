"""Loss-free balancing: the bias follows the load by its sign, decides who is chosen and weighs nothing; on text loads become even at no loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.control import Control
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.routers.load_bias import Biased, BiasedTopK, FollowLoad, violation
from rarefy.experts.routing import dense
from rarefy.tasks.char_lm import CharLM
from tests.evidence import check

SLUG = "loss-free-balancing"


def layer_holds(choice: type[BiasedTopK], controller: type[FollowLoad]) -> None:
    """Who is chosen follows s + b, the weight is s; after a step b moved by the rate against the sign of the excess load, padding and evaluation aside; no gradient reaches it."""
    torch.manual_seed(0)
    router = Biased(6, 4)
    moe = MoE(router, choice(2), GLU(4, 6, 5))
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.0, 0.3, -0.3, 0.05]))
    x, valid = torch.randn(40, 6), torch.arange(40) % 4 != 1
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    control = Control(moe, optimizer, (controller(0.01),))
    s = (x @ router.inner.weight.T).sigmoid()
    with Trace(moe) as trace:
        y = moe(x, Context(valid=valid))
    with torch.no_grad():
        moe.eval()(10 * torch.randn(90, 6))
    moe.train()
    routing, seen = trace.entries[0].routing, (s + router.bias).topk(2).indices
    want = torch.zeros_like(s).scatter(1, seen, s.gather(1, seen)) * valid[:, None]
    torch.testing.assert_close(dense(routing), want)
    assert not torch.equal(seen.sort().values, s.topk(2).indices.sort().values), "the bias changes nothing"
    before, load = router.bias.clone(), (want > 0).sum(0).float()
    control.loss(y.square().sum()).backward()
    assert not router.bias.requires_grad
    optimizer.step()
    torch.testing.assert_close(router.bias, before + 0.01 * (load.mean() - load).sign())
    again = Biased(6, 4)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.bias, router.bias)


class WeighsTheBias(BiasedTopK):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        assert scores.select is not None
        lost = torch.cat([scores.select.detach() - scores.logits.detach().sigmoid(), torch.zeros(len(scores.logits), 1)], 1)
        return replace(r, weight=r.weight + lost[r.rows(), r.expert])


class ByExcess(FollowLoad):
    """Moves by the excess itself, not by its sign."""

    def after_step(self, state: dict[str, Any], layers: Mapping[str, Any], entries: Sequence[Entry], optimizer: Any) -> dict[str, Any]:
        for path, layer in layers.items():
            load = torch.stack([e.routing.counts() for e in entries if e.path == path]).sum(0).float()
            layer.affinity.bias += self.rate * (load.mean() - load) / load.mean()
        return state


LAYER = "the bias chooses and does not weigh, and moves by the sign of the load's excess"


@check(SLUG, LAYER, kind="method")
def test_layer() -> None:
    layer_holds(BiasedTopK, FollowLoad)


@check(SLUG, LAYER, kind="twin")
@pytest.mark.parametrize(("choice", "controller"), [(WeighsTheBias, FollowLoad), (BiasedTopK, ByExcess)])
def test_layer_twins(choice: type[BiasedTopK], controller: type[FollowLoad]) -> None:
    with pytest.raises(AssertionError):
        layer_holds(choice, controller)


@cache
def trained(rate: float, seed: int) -> tuple[float, float]:
    """How uneven the loads of the last 50 of 150 steps on text are, and the held-out loss."""
    task = CharLM(width=16, experts=8, rows=64)
    model: Any = task.model(seed, router=f"load-bias:k=2,rate={rate}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    control, load = Control(model, optimizer, model.controllers), torch.zeros(8)
    for step in range(150):
        optimizer.zero_grad()
        with Trace(model) as trace:
            loss = task.loss(model, task.batch(seed, step))
        control.loss(loss).backward()
        optimizer.step()
        load += trace.entries[0].routing.counts() * (step >= 100)
    control.close()
    return violation(load), task.evaluate(model)["loss"]


def evens(rate: float) -> None:
    """The busiest expert has at most 1.3 times its share, at a loss within 1% of that without a bias.

    At a rate of 0.005 seeds 0, 1 and 2 were at 1.15, 1.06 and 1.05 times, without a bias at 3.9, 3.0 and 3.9; losses differed by 0.5% at
    most. The paper's 0.001, for runs of many thousand steps, was at 3.7, 1.8 and 3.2 after 150.
    """
    for seed in range(2):
        found, plain = trained(rate, seed), trained(0.0, seed)
        assert found[0] <= 0.3 and found[1] <= 1.01 * plain[1], (found, plain)


EVENS = "on text loads become even at no loss"


@check(SLUG, EVENS, kind="method")
def test_evens() -> None:
    evens(0.005)


@check(SLUG, EVENS, kind="twin")
def test_evens_twin_without_a_bias() -> None:
    with pytest.raises(AssertionError):
        evens(0.0)


@check(SLUG, LAYER, kind="oracle")
def test_choice_against_a_sort_in_python() -> None:
    g = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(20, 5, generator=g), torch.randn(5, generator=g) / 4
    got = dense(BiasedTopK(3)(Scores(logits, select=logits.sigmoid() + bias), Context()))
    for row, weights in zip(logits.double().tolist(), got, strict=True):
        s = [1 / (1 + 2.718281828459045**-z) for z in row]
        best = sorted(range(5), key=lambda e: -(s[e] + bias[e].item()))[:3]
        torch.testing.assert_close(weights, Tensor([s[e] if e in best else 0.0 for e in range(5)]), atol=1e-6, rtol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="rate -1"):
        FollowLoad(-1.0)
    with pytest.raises(BadInput, match="k = 5 with 4 experts"):
        BiasedTopK(5)(Scores(torch.zeros(1, 4)), Context())
    assert violation(torch.zeros(4)) == 0.0
