"""SparseMixer: over all samples and coins the router's gradient is exact on quadratics, better than Switch's elsewhere; samples follow p among the near best; evaluation samples nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.banks.glu import GLU
from rarefy.experts.banks.relu import ReLU
from rarefy.experts.banks.scaled import Scaled
from rarefy.experts.dispatch import dispatch, fused
from rarefy.experts.moe import MoE
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.sparse_mixer import SparseMixer, midpoint, near_best
from rarefy.experts.routers.switch import Switch
from rarefy.tasks.char_lm import CharLM
from tests.evidence import check

SLUG = "sparsemixer"
TRAINING = Context(training=True)
Weigh = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]
EXPERTS, WIDTH = 4, 5


def drawn(seed: int) -> tuple[Tensor, Tensor, Loss, Loss]:
    """Logits, experts' outputs, a loss that is quadratic in the layer's output and one that is not."""
    g = torch.Generator().manual_seed(seed)
    z, outputs, a, b, read = (torch.randn(*s, generator=g, dtype=torch.double) for s in ((EXPERTS,), (EXPERTS, WIDTH), (WIDTH, WIDTH), (WIDTH,), (3, WIDTH)))
    return z, outputs, lambda y: (a @ y).square().sum() + b @ y + 7.0, lambda y: F.cross_entropy(2 * (read @ y)[None], torch.tensor([1]))


def on_average(weigh: Weigh, z: Tensor, outputs: Tensor, loss: Loss) -> Tensor:
    """The gradient in the logits over all samples D ~ p and both faces of the coin, none left out."""
    leaf = z.clone().requires_grad_()
    p = leaf.softmax(0)
    total = torch.zeros_like(z)
    for expert in range(EXPERTS):
        for whole in (True, False):
            (grad,) = torch.autograd.grad(loss(weigh(p[expert], torch.tensor(whole)) * outputs[expert]), leaf, retain_graph=True)
            total += p[expert].detach() / 2 * grad
    return total


def exact(z: Tensor, outputs: Tensor, loss: Loss) -> Tensor:
    """The gradient of the expected loss."""
    leaf = z.clone().requires_grad_()
    p = leaf.softmax(0)
    expected = torch.stack([p[e] * loss(p[e] * outputs[e]) for e in range(EXPERTS)]).sum()
    (grad,) = torch.autograd.grad(expected, leaf)
    return grad


def is_exact_on_quadratics(weigh: Weigh) -> None:
    for seed in range(5):
        z, outputs, quadratic, _ = drawn(seed)
        torch.testing.assert_close(on_average(weigh, z, outputs, quadratic), exact(z, outputs, quadratic), atol=1e-10, rtol=1e-10)


def as_switch(p: Tensor, whole: Tensor) -> Tensor:
    return p


def backward_only(p: Tensor, whole: Tensor) -> Tensor:
    """Twice the gradient, without the half forward."""
    return p.detach() + 2 * (p - p.detach())


def forward_only(p: Tensor, whole: Tensor) -> Tensor:
    """The half forward, without twice the gradient."""
    return p * (0.5 + 0.5 * whole)


EXACT = "over all samples and coins the router's gradient is exact on quadratic losses"


@check(SLUG, EXACT, kind="method")
def test_exact() -> None:
    is_exact_on_quadratics(midpoint)


@check(SLUG, EXACT, kind="twin")
@pytest.mark.parametrize("twin", [as_switch, backward_only, forward_only])
def test_exact_twins(twin: Weigh) -> None:
    with pytest.raises(AssertionError):
        is_exact_on_quadratics(twin)


@check(SLUG, EXACT, kind="oracle")
def test_exact_against_finite_differences() -> None:
    """In numpy: the expected loss itself, differenced."""
    z, outputs, _, _ = drawn(9)
    e, a = outputs.numpy(), np.random.default_rng(0).normal(size=(WIDTH, WIDTH))

    def expected(logits: Any) -> float:
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return float(sum(p[d] * (np.square(a @ (p[d] * e[d])).sum() + (p[d] * e[d]).sum()) for d in range(EXPERTS)))

    h = 1e-6 * np.eye(EXPERTS)
    want = [(expected(z.numpy() + h[i]) - expected(z.numpy() - h[i])) / 2e-6 for i in range(EXPERTS)]
    got = on_average(midpoint, z, outputs, lambda y: (torch.from_numpy(a) @ y).square().sum() + y.sum())
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.double), atol=1e-7, rtol=1e-6)


def beats_switch(weigh: Weigh) -> None:
    """On a loss that is not quadratic its direction is nearer to the exact one than Switch's in 36 of 40 draws at least, and by 0.02 on average.

    It was nearer in 38: cosines of 0.996 and 0.951 on average, 0.907 and -0.151 at worst.
    """
    better, gains = 0, []
    for seed in range(40):
        z, outputs, _, loss = drawn(seed)
        want = exact(z, outputs, loss)
        mine, switch = (float(F.cosine_similarity(on_average(w, z, outputs, loss), want, dim=0)) for w in (weigh, as_switch))
        better += mine > switch
        gains.append(mine - switch)
    assert better >= 36 and sum(gains) / 40 > 0.02, (better, sum(gains) / 40)


BEATS = "on other losses its direction is nearer to the exact gradient than Switch's"


@check(SLUG, BEATS, kind="method")
def test_beats_switch() -> None:
    beats_switch(midpoint)


@check(SLUG, BEATS, kind="twin")
def test_beats_switch_twin() -> None:
    with pytest.raises(AssertionError):
        beats_switch(backward_only)


def samples_hold(choice: type[SparseMixer]) -> None:
    """In training samples follow p over the near best; the likeliest is weighed p, another p or p/2 by a fair coin; the gradient is doubled; outside it nothing is drawn."""
    row = torch.tensor([2.0, 1.9, -1.0, 1.7, 1.5])
    z = row.expand(20_000, 5).clone().requires_grad_()
    p = row[[0, 1, 3]].softmax(0)  # 1.5 is a quarter below the best, -1 far below
    torch.manual_seed(0)
    routing = choice(0.1)(Scores(z), TRAINING)
    shares = routing.counts() / 20_000
    torch.testing.assert_close(shares[[0, 1, 3]], p, atol=0.015, rtol=0)
    assert shares[[2, 4]].tolist() == [0.0, 0.0]
    for place, expert in enumerate((0, 1, 3)):
        ratio = (routing.weight[routing.expert == expert] / p[place]).detach()
        halves = float((ratio - 0.5).abs().lt(1e-5).float().mean())
        assert ((ratio - 0.5).abs().lt(1e-5) | (ratio - 1).abs().lt(1e-5)).all()
        assert halves == pytest.approx(0.0 if expert == 0 else 0.5, abs=0.03)
    (grad,) = torch.autograd.grad(routing.weight.sum(), z)
    first = torch.zeros(5).index_fill(0, torch.tensor([int(routing.expert[0])]), 1.0)[[0, 1, 3]]
    chosen = p[(0, 1, 3).index(int(routing.expert[0]))]
    torch.testing.assert_close(grad[0][[0, 1, 3]], 2 * chosen * (first - p))
    still = choice(0.1)(Scores(z), Context())
    assert (still.expert == 0).all()
    torch.testing.assert_close(still.weight, p[0].expand(20_000))
    signs = near_best(torch.tensor([[-1.0, -1.1, -1.3]]), None, 0.1)
    assert (signs > -9).tolist() == [[True, True, False]], "below zero the larger magnitude divides"


class ArgmaxInTraining(SparseMixer):
    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, Context(live=context.live, valid=context.valid))
        return Routing(r.expert, midpoint(r.weight, torch.ones_like(r.weight)), r.items, r.experts, 1, scores=r.scores)


class FromAll(SparseMixer):
    """No expert is out of reach."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return SparseMixer(1e9)(scores, context)


class WithoutTheShortcut(SparseMixer):
    """The likeliest expert too is weighed by a coin."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        lost = (r.expert == scores.logits.argmax(1)) & (torch.rand_like(r.weight) > 0.5) & context.training
        return Routing(r.expert, torch.where(lost, r.weight - 0.5 * r.weight.detach(), r.weight), r.items, r.experts, 1, scores=r.scores)


SAMPLES = "samples follow p among the near best, the likeliest is taken whole, evaluation draws nothing"


@check(SLUG, SAMPLES, kind="method")
def test_samples() -> None:
    samples_hold(SparseMixer)


@check(SLUG, SAMPLES, kind="twin")
@pytest.mark.parametrize("twin", [ArgmaxInTraining, FromAll, WithoutTheShortcut])
def test_samples_twins(twin: Any) -> None:
    with pytest.raises(AssertionError):
        samples_hold(twin)


def layer_holds(choice: type[SparseMixer], bank: Callable[[int, int, int], Any] = SparseMixer.bank) -> None:
    """The experts' outputs are scaled by a learned vector that starts at 1, and balanced are the probabilities within reach."""
    torch.manual_seed(0)
    moe, x = MoE(Linear(6, 4), choice(0.1), bank(4, 6, 5)), torch.randn(30, 6)
    assert isinstance(moe.bank, Scaled) and bool((moe.bank.omega == 1).all())
    plain = moe.eval()(x)
    with torch.no_grad():
        moe.bank.omega.copy_(torch.arange(6.0))
    torch.testing.assert_close(moe(x), plain * torch.arange(6.0))
    with Trace(moe.train()) as trace:
        y = moe(x)
    routing = trace.entries[0].routing
    logits = x @ moe.get_parameter("affinity.weight").T
    p = near_best(logits, None, 0.1).softmax(1)
    assert float(p.min()) == 0.0 < float(logits.softmax(1).min())
    (balance,) = choice.balances
    torch.testing.assert_close(balance(trace.entries[0]), 0.01 * 4 * (routing.counts() / 30 * p.mean(0)).sum())
    y.square().sum().backward()
    assert moe.bank.omega.grad is not None and bool(moe.bank.omega.grad[1:].all())


class BalancesAll(SparseMixer):
    """The balance loss sees the probabilities of experts out of reach too."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        r = super().__call__(scores, context)
        return Routing(r.expert, r.weight, r.items, r.experts, 1, scores=scores)


LAYER = "outputs are scaled by a learned vector, and what is in reach is balanced"


@check(SLUG, LAYER, kind="method")
def test_layer() -> None:
    layer_holds(SparseMixer)


@check(SLUG, LAYER, kind="twin")
@pytest.mark.parametrize(("choice", "bank"), [(BalancesAll, SparseMixer.bank), (SparseMixer, GLU)], ids=["balances all", "not scaled"])
def test_layer_twins(choice: type[SparseMixer], bank: Any) -> None:
    with pytest.raises(AssertionError):
        layer_holds(choice, bank)


def test_it_is_reached_by_name_and_refuses() -> None:
    model = CharLM(width=8).model(0, router="sparse-mixer:epsilon=0.2")
    assert isinstance(model.get_submodule("moe.bank"), Scaled) and model.get_submodule("moe").choice == SparseMixer(0.2)
    with pytest.raises(BadInput, match="epsilon -1"):
        SparseMixer(-1.0)
    bank, x, routing = Scaled(ReLU(3, 4, 5), 4), torch.randn(5, 4), Switch()(Scores(torch.randn(5, 3)), Context())
    torch.testing.assert_close(dispatch(x, routing, bank, backend=fused), dispatch(x, routing, bank))
