"""PEER: exact retrieval among n squared experts by two searches among n, experts of one neuron shared by all heads, queries normalised over the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context
from rarefy.core.trace import Trace
from rarefy.experts.banks.singletons import Singletons
from rarefy.experts.layers import product_keys
from rarefy.experts.layers.product_keys import ProductKeys, QueryNorm, Retrieval, best_pairs
from rarefy.probes.expert_load import usage
from rarefy.tasks.layer_lm import LayerLM
from tests.evidence import check

SLUG = "peer"
Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def exact(search: Search) -> None:
    """For random halves of 16 and any k up to all 256, the k best of all sums and no others."""
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40, 3, 16, generator=g)
    every = (first[..., :, None] + second[..., None, :]).flatten(-2)
    for k in (1, 2, 5, 16, 40, 256):
        value, index = search(first, second, k)
        assert torch.equal(index.sort(-1).values, every.topk(k, -1).indices.sort(-1).values), k
        torch.testing.assert_close(value, every.gather(-1, index))
        assert torch.equal(value, value.sort(-1, descending=True).values)


def of_few(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Only as many of each half as make k pairs."""
    few = min(first.shape[-1], int(k**0.5) + 1)
    (one, i), (other, j) = first.topk(few, -1), second.topk(few, -1)
    value, place = (one[..., :, None] + other[..., None, :]).flatten(-2).topk(min(k, few * few), -1)
    return value, (i[..., :, None] * first.shape[-1] + j[..., None, :]).flatten(-2).gather(-1, place)


EXACT = "the k best of all n squared sums are found exactly"


@check(SLUG, EXACT, kind="method")
def test_exact() -> None:
    exact(best_pairs)


@check(SLUG, EXACT, kind="twin")
def test_exact_twin_of_few_candidates() -> None:
    with pytest.raises(AssertionError):
        exact(of_few)


@check(SLUG, EXACT, kind="oracle")
def test_exact_against_a_search_in_python() -> None:
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 9, generator=g).double()
    pairs = sorted(((a + b, 9 * i + j) for i, a in enumerate(first.tolist()) for j, b in enumerate(second.tolist())), reverse=True)[:13]
    assert best_pairs(first, second, 13)[1].tolist() == [index for _, index in pairs]


def one_table(kind: type[Retrieval]) -> None:
    """Every head adds experts of the one table, at softmax weights; with all experts at equal weights a head is a dense layer of as many units."""
    torch.manual_seed(0)
    layer, x = kind(6, 4, 3, 5, 8).eval(), torch.randn(7, 6)
    bank = layer.bank
    assert sum(p.numel() for p in bank.parameters()) == 2 * 16 * 6
    with Trace(layer) as trace:
        y = layer(x)
    routing = trace.entries[0].routing
    weight, expert = routing.weight.view(7, 3, 5), routing.expert.view(7, 3, 5)
    q = (x @ layer.query.T).view(7, 3, 2, 4) / (1 + 1e-5) ** 0.5
    sums = (torch.einsum("rhq,hnq->rhn", q[:, :, 0], layer.keys[0])[..., None] + torch.einsum("rhq,hnq->rhn", q[:, :, 1], layer.keys[1])[..., None, :]).flatten(-2)
    best = sums.topk(5, -1)
    assert torch.equal(expert, best.indices)
    torch.testing.assert_close(weight, best.values.softmax(-1))
    outputs = torch.stack([f(x) for f in bank.split()], 1)
    want = sum((weight[:, h, i, None] * outputs[torch.arange(7), expert[:, h, i]] for h in range(3) for i in range(5)), torch.zeros_like(x))
    torch.testing.assert_close(y, want)
    whole = kind(6, 4, 1, 16, 8).eval()
    with torch.no_grad():
        whole.keys.zero_()
    torch.testing.assert_close(16 * whole(x), F.gelu(x @ whole.bank.up.T) @ whole.bank.down)


class OwnExperts(Retrieval):
    """Every head has experts of its own."""

    def __init__(self, width: int, n: int, heads: int, k: int, query: int) -> None:
        super().__init__(width, n, heads, k, query)
        self.bank = Singletons(heads * n * n, width)


class Unweighted(Retrieval):
    """The softmax is over all experts' sums, not over the k best."""

    def _retrieved(self, rows: Tensor, context: Context) -> Any:
        found = super()._retrieved(rows, context)
        return type(found)(found.expert, found.weight * 0 + 1 / self.bank.experts, found.items, found.experts, found.k)


TABLE = "heads share one table of single-neuron experts, weighed by a softmax over each head's k"


@check(SLUG, TABLE, kind="method")
def test_one_table() -> None:
    one_table(Retrieval)


@check(SLUG, TABLE, kind="twin")
@pytest.mark.parametrize("twin", [OwnExperts, Unweighted])
def test_one_table_twins(twin: type[Retrieval]) -> None:
    with pytest.raises(AssertionError):
        one_table(twin)


def grows_with_the_root(search: Search) -> None:
    """From 1,024 to 4,096 experts the multiply-adds of a forward and of what is touched stay below twice, and no more than h k rows' experts get a gradient."""
    flops, touched = [], []
    for n in (32, 64):
        torch.manual_seed(0)
        layer, x = Retrieval(16, n, 2, 4, 16), torch.randn(5, 16)
        with FlopCounterMode(display=False) as counter:
            y = layer(x) if search is best_pairs else dense(layer, x)
        y.square().sum().backward()
        flops.append(counter.get_total_flops())
        grad = layer.bank.up.grad
        assert grad is not None
        touched.append(int(grad.any(1).sum()))
    assert flops[1] < 2 * flops[0], flops
    assert max(touched) <= 5 * 2 * 4, touched


def dense(layer: Retrieval, x: Tensor) -> Tensor:
    """All experts run, and most count for nothing."""
    routing = layer._retrieved(x, Context(training=True))
    share = torch.zeros(len(x), layer.bank.experts).index_put((routing.rows(), routing.expert), routing.weight, accumulate=True)
    return (F.gelu(x @ layer.bank.up.T) * share) @ layer.bank.down


ROOT = "four times the experts cost less than twice the work, and what is touched does not grow"


@check(SLUG, ROOT, kind="method")
def test_grows_with_the_root() -> None:
    grows_with_the_root(best_pairs)


@check(SLUG, ROOT, kind="twin")
def test_grows_with_the_root_twin_that_runs_all() -> None:
    with pytest.raises(AssertionError):
        grows_with_the_root(of_few)


class Plain(QueryNorm):
    """Queries as they are."""

    def forward(self, q: Tensor, valid: Tensor | None) -> Tensor:
        return q * self.gain + self.shift


def trained(norm: type[QueryNorm]) -> tuple[dict[str, float], float]:
    """Usage of 256 experts over held-out text after 150 steps, and the loss."""
    task = LayerLM(width=32, experts=256, rows=64)
    model: Any = task.model(0, router="product-keys:heads=2,k=4")
    model.layer.norm = norm(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        optimizer.zero_grad()
        task.loss(model, task.batch(0, step)).backward()
        optimizer.step()
    with Trace(model.eval()) as trace, torch.no_grad():
        for step in range(8):
            model(task.batch(77, step)[0])
    return usage(torch.stack([entry.routing.counts() for entry in trace.entries]).sum(0)), task.evaluate(model)["loss"]


def spreads(norm: type[QueryNorm]) -> None:
    """Seed 0: 92% of 256 experts serve held-out text, 0.57 nats from even, at a loss of 2.407; without normalisation 29%, 2.28 nats and 2.452."""
    found, loss = trained(norm)
    assert found["used"] > 0.85 and found["unevenness"] < 1.0 and loss < 2.43, (found, loss)


SPREADS = "normalised queries use nearly all experts"


@check(SLUG, SPREADS, kind="method")
def test_spreads() -> None:
    spreads(QueryNorm)


@check(SLUG, SPREADS, kind="twin")
def test_spreads_twin_without_normalisation() -> None:
    with pytest.raises(AssertionError):
        spreads(Plain)


def test_queries_are_normalised_over_what_is_not_padding() -> None:
    torch.manual_seed(0)
    norm, ours = torch.nn.BatchNorm1d(6), QueryNorm(6)
    q, valid = 3 * torch.randn(40, 6) + 2, torch.arange(40) % 4 != 1
    torch.testing.assert_close(ours(q, valid)[valid], norm(q[valid]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(q, None), norm(q), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.mean, norm.running_mean)
    torch.testing.assert_close(ours.eval()(q, None), (q - ours.mean) / (ours.variance + 1e-5).sqrt())
    before = ours.mean.clone()
    again = torch.utils.checkpoint.checkpoint(ours.train(), q.requires_grad_(), None, use_reentrant=False)
    moved = ours.mean.clone()
    again.sum().backward()
    assert not torch.equal(before, moved) and torch.equal(moved, ours.mean), "the recomputation moves the running figures"


def test_what_is_refused() -> None:
    layer = ProductKeys(2, 3).make(6, 16, 1)
    with pytest.raises(Refused, match="live experts"):
        layer(torch.randn(4, 6), Context(live=torch.ones(16, dtype=torch.bool)))
    for experts in (15, 4):
        with pytest.raises(BadInput, match="a square, and at least k"):
            ProductKeys(2, 5).make(6, experts, 1)
    for wrong in ({"heads": 0}, {"k": 0}, {"query": 3}):
        with pytest.raises(BadInput, match="two halves"):
            ProductKeys(**wrong)
    assert usage(torch.zeros(4)) == {"used": 0.0, "unevenness": 0.0} and usage(torch.ones(4))["unevenness"] == pytest.approx(0)
    assert product_keys.best_pairs(torch.zeros(2), torch.zeros(2), 3)[1].tolist() == [0, 1, 2]


def test_the_command_trains_it(capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.cli.main import main

    assert main(["train", "layer_lm:experts=16,rows=16", "--recipe", "static", "--density", "1", "--steps", "2", "--router", "product-keys:heads=2,k=3", "--json"]) == 0
    assert '"experts": 6.0' in capsys.readouterr().out
