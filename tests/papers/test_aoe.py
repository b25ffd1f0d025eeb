"""Autonomy of experts: the loudest first steps go on, from the step that was made; nothing is a router's; two exchanged experts take their rows along."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rarefy.core.control import Control
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.layers import autonomy
from rarefy.experts.layers.autonomy import Autonomous, Autonomy, loudness
from rarefy.experts.routers.topk import TopK
from rarefy.experts.routing import dense
from rarefy.tasks.char_lm import CharLM
from rarefy.tasks.layer_lm import LayerLM
from tests.evidence import check

SLUG = "aoe"
ROWS, WIDTH, EXPERTS, INNER, RANK, K = 20, 6, 5, 7, 3, 2


def built(kind: type[Autonomous], choice: TopK | None = None) -> Any:
    torch.manual_seed(0)
    return kind(WIDTH, EXPERTS, INNER, RANK, choice or TopK(K)).double()


def reference(layer: Any, x: Tensor, renormalise: bool) -> Tensor:
    """All experts run on all rows, and those are masked whose first step is not among the k longest."""
    probe = layer.probe.view(EXPERTS, RANK, WIDTH)
    c = torch.einsum("rd,ekd->rek", x, probe)
    lengths = c.square().sum(-1).sqrt()
    best, who = lengths.topk(K)
    share = best.softmax(-1) if renormalise else lengths.softmax(-1).gather(1, who)
    mask = torch.zeros_like(lengths).scatter(1, who, share)
    inner = F.silu(torch.einsum("rek,eik->rei", c, layer.gate)) * torch.einsum("rd,eid->rei", x, layer.up)
    return torch.einsum("rei,edi,re->rd", inner, layer.down, mask)


def autonomous(kind: type[Autonomous]) -> None:
    """Outputs and gradients are the reference's for both ways to weigh; A learns through the weights too; no router; the first step is made once."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=g).double()
    for renormalise in (True, False):
        layer = built(kind, TopK(K, renormalise=renormalise))
        assert not [name for name, _ in layer.named_parameters() if name not in ("probe", "gate", "up", "down")]
        y, want = layer(x), reference(layer, x, renormalise)
        torch.testing.assert_close(y, want, atol=1e-6, rtol=1e-6)
        for got, expected in zip(*(torch.autograd.grad(t.square().sum(), [*layer.parameters()], retain_graph=True) for t in (y, want)), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * ROWS * (EXPERTS * RANK * WIDTH + K * (RANK * INNER + 2 * WIDTH * INNER))


def follows(kind: type[Autonomous]) -> None:
    """Exchange all parameters of experts 1 and 3: their rows are exchanged, and outputs stay."""
    layer, x = built(kind), torch.randn(ROWS, WIDTH).double()
    with Trace(layer) as trace, torch.no_grad():
        y = layer(x)
        order = torch.tensor([0, 3, 2, 1, 4])
        for name in ("gate", "up", "down"):
            getattr(layer, name).copy_(getattr(layer, name)[order])
        layer.probe.copy_(layer.probe.view(EXPERTS, RANK, WIDTH)[order].view_as(layer.probe))
        again = layer(x)
    one, other = (dense(entry.routing) for entry in trace.entries)
    assert torch.equal(other > 0, one[:, order] > 0) and not torch.equal(other > 0, one > 0)
    torch.testing.assert_close(other, one[:, order])
    torch.testing.assert_close(y, again)


class Router(Autonomous):
    """A router of its own, made of the experts' first steps at the start."""

    def __init__(self, width: int, experts: int, inner: int, rank: int, choice: Any) -> None:
        super().__init__(width, experts, inner, rank, choice)
        self.router = nn.Parameter(self.probe.detach().view(experts, rank, width).norm(dim=1))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        routing = self.tap(self.choice(Scores(x @ self.router.T), Context()), Context(), x)
        return self._finished(x, F.linear(x, self.probe).view(len(x), self.experts, -1), routing)


class Recomputes(Autonomous):
    """The first step is made again for the chosen."""

    def _finished(self, rows: Tensor, first: Tensor, routing: Routing) -> Tensor:
        return super()._finished(rows, F.linear(rows, self.probe).view_as(first), routing)


class Detached(Autonomous):
    """The weights have no gradient."""

    def _finished(self, rows: Tensor, first: Tensor, routing: Routing) -> Tensor:
        return super()._finished(rows, first, Routing(routing.expert, routing.weight.detach(), routing.items, routing.experts, routing.k))


def squared(first: Tensor) -> Tensor:
    return first.float().square().sum(-1)


def mean_abs(first: Tensor) -> Tensor:
    return first.float().abs().mean(-1)


AUTONOMOUS = "the loudest first steps go on from where they are, and A learns by both ways"
FOLLOWS = "two experts that are exchanged take their rows along"


@check(SLUG, AUTONOMOUS, kind="method")
def test_autonomous() -> None:
    autonomous(Autonomous)


@check(SLUG, AUTONOMOUS, kind="twin")
@pytest.mark.parametrize("twin", [Router, Recomputes, Detached])
def test_autonomous_twins(twin: type[Autonomous]) -> None:
    with pytest.raises(AssertionError):
        autonomous(twin)


@check(SLUG, AUTONOMOUS, kind="twin")
@pytest.mark.parametrize("length", [squared, mean_abs])
def test_autonomous_twins_of_other_lengths(monkeypatch: pytest.MonkeyPatch, length: Any) -> None:
    monkeypatch.setattr(autonomy, "loudness", length)
    with pytest.raises(AssertionError):
        autonomous(Autonomous)


@check(SLUG, FOLLOWS, kind="method")
def test_follows() -> None:
    follows(Autonomous)


@check(SLUG, FOLLOWS, kind="twin")
def test_follows_twin_with_a_router() -> None:
    with pytest.raises(AssertionError):
        follows(Router)


def of_equal_size(kind: type[Autonomy]) -> None:
    """An expert has as many parameters as a gated one of the width asked for, to within half of one inner unit's."""
    for width, inner, rank in ((32, 64, 8), (64, 48, 16), (48, 32, 1)):
        layer = kind(rank=rank).make(width, 4, inner)
        plain = sum(p.numel() for p in GLU(4, width, inner).parameters())
        assert abs(sum(p.numel() for p in layer.parameters()) - plain) <= 4 * (2 * width + rank) / 2


class AsWide(Autonomy):
    """Experts of the width that was asked for, and their first step besides."""

    def make(self, width: int, experts: int, inner: int, /) -> nn.Module:
        return Autonomous(width, experts, inner, self.rank or 1, TopK(2))


SIZE = "experts are as large as the gated ones that they stand for"


@check(SLUG, SIZE, kind="method")
def test_of_equal_size() -> None:
    of_equal_size(Autonomy)


@check(SLUG, SIZE, kind="twin")
def test_of_equal_size_twin() -> None:
    with pytest.raises(AssertionError):
        of_equal_size(AsWide)


@cache
def trained(task: Any, router: str, seed: int = 0) -> float:
    """Held-out loss after 200 steps on text."""
    model: Any = task.model(seed, router=router)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    control = Control(model, optimizer, model.controllers)
    for step in range(200):
        optimizer.zero_grad()
        control.loss(task.loss(model, task.batch(seed, step))).backward()
        optimizer.step()
    control.close()
    return float(task.evaluate(model)["loss"])


def test_on_text_it_learns_as_a_routed_layer_of_equal_size_does() -> None:
    """Seeds 0, 1, 2: 2.376, 2.386 and 2.389 at rank 8, 2.391, 2.404 and 2.422 at rank 16, against 2.359, 2.351 and 2.366 of a linear router: no gain at this scale."""
    sizes = {"width": 32, "experts": 8, "inner": 16, "rows": 64}
    found, plain = trained(LayerLM(**sizes), "autonomy"), trained(CharLM(**sizes), "topk")  # type: ignore[arg-type]
    assert found < plain + 0.05, (found, plain)


def test_padding_dead_experts_other_choices_and_refusals() -> None:
    layer = Autonomy(rank=2).make(WIDTH, EXPERTS, INNER)
    valid, live = torch.arange(ROWS) % 3 != 1, torch.tensor([True, False, True, True, False])
    with Trace(layer) as trace:
        y = layer(torch.randn(ROWS, WIDTH), Context(valid=valid, live=live))
    assert not y[~valid].any() and trace.entries[0].routing.counts()[~live].tolist() == [0, 0]
    assert loudness(torch.zeros(0, 3, 2)).shape == (0, 3)
    assert Autonomy("expert-choice").causal(True) is False and Autonomy("top-p").causal(True)
    whole = Autonomy("expert-choice", rank=2).make(WIDTH, EXPERTS, INNER)
    with Trace(whole) as trace:
        whole(torch.randn(ROWS, WIDTH))
    assert trace.entries[0].routing.counts().tolist() == [8] * EXPERTS
    with pytest.raises(BadInput, match="scores rows in its own way"):
        Autonomy("load-bias").make(WIDTH, EXPERTS, INNER)
    with pytest.raises(BadInput, match="larger than a gated expert"):
        Autonomy(rank=99).make(WIDTH, EXPERTS, INNER)
    with pytest.raises(BadInput, match="rank 0"):
        Autonomy(rank=0)
