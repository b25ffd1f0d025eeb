"""Switch: the balance loss at its two extremes, its gradient, the capacity, exact zeros for the dropped, a float32 router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.balance.switch_balance import LoadBalance, load_times_probability, valid_rows
from rarefy.experts.banks.glu import GLU
from rarefy.experts.moe import MoE
from rarefy.experts.overflow.capacity import Capacity
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.switch import Switch, small_init
from tests.evidence import check


def entry(logits: Tensor, expert: Tensor, valid: Tensor | None = None) -> Entry:
    scores = Scores(logits)
    return Entry("layer", 0, None, Routing(expert, logits.new_ones(len(expert)), len(expert), logits.shape[1], 1, scores=scores), Context(valid=valid))


def balance_holds(balance: Callable[[Entry], Tensor]) -> None:
    """Uniform gives 1, collapse E; padding does not count; d/d logits is that of P alone."""
    spread, one = torch.arange(8) % 4, torch.zeros(8, dtype=torch.long)
    assert balance(entry(torch.zeros(8, 4), spread)).item() == pytest.approx(1.0)
    sure = torch.zeros(8, 4).index_fill(1, torch.tensor([0]), 50.0)
    assert balance(entry(sure, one)).item() == pytest.approx(4.0)
    padded = entry(torch.cat([torch.zeros(8, 4), sure]), torch.cat([spread, one]), torch.arange(16) < 8)
    assert balance(padded).item() == pytest.approx(1.0)
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (got,) = torch.autograd.grad(balance(entry(logits, logits.argmax(-1))), logits)
    f = torch.bincount(logits.argmax(-1), minlength=4) / 8
    (want,) = torch.autograd.grad(4 * (f * logits.softmax(-1).mean(0)).sum(), logits)
    torch.testing.assert_close(got, want)
    favours = logits.detach() + torch.tensor([2.0, 1.0, 0.0, 0.0])
    whole = entry(favours, favours.argmax(-1))
    cut = replace(whole, routing=Capacity(0.5)(whole.routing, Context(training=True)))
    assert cut.routing.dropped is not None and cut.routing.dropped.sum() > 0
    torch.testing.assert_close(balance(cut), balance(whole), msg="f is of the router's choices, dropped ones too")


class KeptAlone(LoadBalance):
    """f counts the rows that found a place."""

    def __call__(self, entry: Entry) -> Tensor:
        return self.alpha * load_times_probability(entry, entry.routing.count(valid_rows(entry)[entry.routing.rows()]))


def counts_padding_and_differentiates_f(seen: Entry) -> Tensor:
    assert seen.routing.scores is not None
    p = seen.routing.scores.logits.softmax(-1).mean(0)
    return p.numel() * (p * p).sum()


@check("switch", "balance loss is 1 when uniform, E when collapsed, and its gradient flows through P only", kind="method")
def test_balance() -> None:
    (declared,) = Switch.balances
    assert declared.alpha == 0.01
    balance_holds(replace(declared, alpha=1.0))


@check("switch", "balance loss is 1 when uniform, E when collapsed, and its gradient flows through P only", kind="twin")
def test_balance_twin() -> None:
    with pytest.raises(AssertionError):
        balance_holds(counts_padding_and_differentiates_f)


def differentiates_f(seen: Entry) -> Tensor:
    assert seen.routing.scores is not None
    p = seen.routing.scores.logits.softmax(-1)
    p = (p if seen.context.valid is None else p[seen.context.valid]).mean(0)
    return p.numel() * (p * p).sum()


@check("switch", "balance loss is 1 when uniform, E when collapsed, and its gradient flows through P only", kind="twin")
def test_balance_twin_that_is_wrong_in_its_gradient_alone() -> None:
    with pytest.raises(AssertionError, match="not close"):
        balance_holds(differentiates_f)


def layer_holds(choice: type[Switch]) -> None:
    """C is respected, dropped rows are exactly 0, a lone expert equals the dense FFN, and the router learns from the task."""
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    with Trace(full := MoE(Linear(6, 4), choice(), GLU(4, 6, 5), choice.overflow)) as trace:
        full(torch.ones(32, 6))
    assert trace.entries[0].routing.counts().sum() == 10, "1.25 times an even share at most: ceil(1.25 * 32 / 4)"
    moe = MoE(Linear(6, 4), choice(), GLU(4, 6, 5), Capacity(1.0, 4.0))
    with Trace(moe) as trace:
        y = moe(x)
    routing = trace.entries[0].routing
    assert routing.dropped is not None
    assert routing.counts().max() <= 8 and routing.dropped.sum() > 0
    assert torch.equal((y == 0).all(-1), routing.expert == 4)
    y.square().sum().backward()
    (learned,) = moe.affinity.parameters()
    assert learned.grad is not None and learned.grad.abs().sum() > 1e-4
    with Trace(moe.eval()) as trace:
        moe(x)
    dropped = trace.entries[0].routing.dropped
    assert dropped is not None and dropped.sum() == 0
    lone = MoE(Linear(6, 1), choice(), GLU(1, 6, 5))
    torch.testing.assert_close(lone(x), lone.bank.split()[0](x))


class Renormalised(Switch):
    """The weight of one expert, renormalised, is always 1: the router gets no gradient."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        routing = super().__call__(scores, context)
        return Routing(routing.expert, routing.weight / routing.weight, routing.items, routing.experts, 1, scores=scores)


@check("switch", "balance loss is 1 when uniform, E when collapsed, and its gradient flows through P only", kind="twin")
def test_balance_twin_that_counts_what_is_kept() -> None:
    with pytest.raises(AssertionError, match="dropped ones too"):
        balance_holds(KeptAlone(1.0))


@check("switch", "capacity holds, dropped rows are zero, the router learns through p", kind="method")
def test_layer() -> None:
    layer_holds(Switch)


@check("switch", "capacity holds, dropped rows are zero, the router learns through p", kind="twin")
def test_layer_twin() -> None:
    with pytest.raises(AssertionError):
        layer_holds(Renormalised)


def router_holds(router: Callable[[Linear, Tensor], Tensor]) -> None:
    """Logits are computed in float32 from float32 and from bfloat16 rows, under bfloat16 autocast."""
    affinity = Linear(6, 4)
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for x in (rows, rows.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = router(affinity, x)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, x.float() @ affinity.weight.T)


@check("switch", "the router computes in float32 under autocast", kind="method")
def test_router_dtype() -> None:
    router_holds(lambda affinity, x: affinity(x, Context(), None).logits)


@check("switch", "the router computes in float32 under autocast", kind="twin")
def test_router_dtype_twin_that_casts_afterwards() -> None:
    with pytest.raises(AssertionError):
        router_holds(lambda affinity, x: (x @ affinity.weight.T).float())


def test_the_router_stays_float32_under_autocast_and_jitters_in_training_only() -> None:
    router, x = Linear(6, 4, jitter=0.01), torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calm = router(x, Context(), None).logits
    assert calm.dtype == torch.float32
    assert torch.equal(calm, x @ router.weight.T)
    moved = router(x, Context(training=True), None).logits
    assert 0 < (moved - calm).abs().max() <= 0.01 * (x.abs() @ router.weight.abs().T).max() + 1e-6


def init_holds(init: Callable[[GLU], object]) -> None:
    """Deviation sqrt(0.1 / inputs), cut off at two of it, so that 0.88 of it is left."""
    torch.manual_seed(0)
    bank = GLU(4, 64, 32)
    init(bank)
    for weight, inputs in ((bank.gate_up_proj.detach(), 64), (bank.down_proj.detach(), 32)):
        std = (0.1 / inputs) ** 0.5
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.02)


def ten_times_larger(bank: GLU) -> None:
    small_init(bank, scale=1.0)


def not_cut_off(bank: GLU) -> None:
    for weight in bank.parameters():
        torch.nn.init.normal_(weight, std=0.88 * (0.1 / weight.shape[-1]) ** 0.5)


INIT = "weights are drawn with a tenth of the usual variance, cut off at two deviations"


@check("switch", INIT, kind="method")
def test_small_init() -> None:
    init_holds(small_init)


@check("switch", INIT, kind="twin")
@pytest.mark.parametrize("twin", [ten_times_larger, not_cut_off])
def test_small_init_twin(twin: Callable[[GLU], object]) -> None:
    with pytest.raises(AssertionError):
        init_holds(twin)


def test_expert_dropout_is_inside_the_experts_and_in_training_only() -> None:
    torch.manual_seed(0)
    bank = GLU(2, 16, 4000, dropout=0.4)
    both = torch.randn(1, 8000)
    whole = bank.eval()._gated(both)
    dropped = bank.train()._gated(both)
    kept = dropped != 0
    assert abs(float(kept.float().mean()) - 0.6) < 0.03
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.6)
