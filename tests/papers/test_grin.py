"""GRIN: over all samples and coins the router's gradient is exact on cubic losses; picks are distinct, masked and in turn; evaluation samples nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Entry, Routing, Scores
from rarefy.experts.balance.first_choice import FirstChoiceBalance
from rarefy.experts.routers.grin import Grin, heun
from rarefy.experts.routers.sparse_mixer import midpoint
from rarefy.tasks.char_lm import CharLM
from rarefy.weights.train import train
from tests.evidence import check

SLUG = "grin"
TRAINING = Context(training=True)
Weigh = Callable[[Tensor, Tensor], Tensor]
EXPERTS = 4


def drawn(seed: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Logits, experts' outputs (numbers), and a cubic loss of the layer's output."""
    g = torch.Generator().manual_seed(seed)
    z, outputs, c = (torch.randn(n, generator=g, dtype=torch.double) for n in (EXPERTS, EXPERTS, 4))
    return z, outputs, lambda y: c[0] * y**3 + c[1] * y**2 + c[2] * y + c[3]


def averaged(weigh: Weigh, chance: float, temperature: float, seed: int) -> Tensor:
    """The gradient in the logits over all samples and both faces of the coin, without the likeliest expert's short cut."""
    z, outputs, loss = drawn(seed)
    z = z.requires_grad_()
    p = (z / temperature).softmax(0)
    total = torch.zeros_like(z)
    for d in range(EXPERTS):
        for whole, odds in ((True, chance), (False, 1 - chance)):
            (grad,) = torch.autograd.grad(loss(weigh(p[d], torch.tensor(whole)) * outputs[d]), z, retain_graph=True)
            total += p[d].detach() * odds * grad
    return total


def sampling_is_exact(weigh: Weigh) -> None:
    """``sum_D L(y_D) dp_D``, p held inside y_D."""
    for seed in range(5):
        z, outputs, loss = drawn(seed)
        z = z.requires_grad_()
        p = z.softmax(0)
        want = torch.autograd.grad((loss(p.detach() * outputs) * p).sum(), z)[0]
        torch.testing.assert_close(averaged(weigh, 0.25, 1.0, seed), want, atol=1e-12, rtol=1e-10)


def straight(p: Tensor, whole: Tensor) -> Tensor:
    """The probability, as it is."""
    return p


def backward_only(p: Tensor, whole: Tensor) -> Tensor:
    """The forward is not scaled by a third, the gradient is."""
    return p.detach() + (1 + 2 * whole) / 3 * (p - p.detach())


SAMPLING = "over all samples and coins the router's gradient through the sampling is exact on cubic losses"


@check(SLUG, SAMPLING, kind="method")
def test_sampling_is_exact() -> None:
    sampling_is_exact(lambda p, whole: heun(p, whole, Grin().gain))


@check(SLUG, SAMPLING, kind="twin")
@pytest.mark.parametrize("twin", [straight, backward_only, lambda p, whole: midpoint(p, whole) / 2])
def test_sampling_is_exact_twin(twin: Weigh) -> None:
    with pytest.raises(AssertionError):
        sampling_is_exact(twin)


def whole_gradient_is_exact(chance: float, gain: float, temperature: float) -> None:
    """With the part through the weight too, it is that of the expected loss."""
    for seed in range(5):
        z, outputs, loss = drawn(seed)
        z = z.requires_grad_()
        p = (z / temperature).softmax(0)
        want = torch.autograd.grad((loss(p * outputs) * p).sum(), z)[0]
        torch.testing.assert_close(averaged(lambda p, whole: heun(p, whole, gain), chance, temperature, seed), want, atol=1e-12, rtol=1e-10)


WHOLE = "with chance 5/8 and gain 2 it is the whole gradient"


@check(SLUG, WHOLE, kind="method")
def test_whole_gradient() -> None:
    whole_gradient_is_exact(0.625, 2.0, 2.0)


@check(SLUG, WHOLE, kind="twin")
def test_whole_gradient_twin() -> None:
    with pytest.raises(AssertionError):
        whole_gradient_is_exact(0.25, 1.0, 1.0)


class Counted(Grin):
    """A second pick that keeps its probability among all experts."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        routing = super().__call__(scores, context)
        p = scores.logits.softmax(-1).gather(1, routing.expert.view(-1, self.k).clamp(max=scores.logits.shape[1] - 1))
        return replace(routing, weight=p.flatten())


def picks_in_turn(choice: Grin) -> None:
    """Two picks are distinct, both within reach of the best of those left, and the second's chances are among those alone."""
    z = torch.tensor([2.0, 1.9, 1.7, 1.0, -3.0]).repeat(6000, 1)
    for context in (Context(), TRAINING):
        routing = choice(Scores(z), context)
        first, second = routing.expert.view(-1, 2).T
        assert bool((first != second).all()) and int(first.max()) <= 2 and int(second.max()) <= 2, "masked experts are picked"
    p = z[0, :3].softmax(0)
    for e in range(3):
        assert float((first == e).float().mean()) == pytest.approx(float(p[e]), abs=0.03)
        rest = z[0, [i for i in range(3) if i != e]].softmax(0)
        picked = second[first == e]
        assert float((picked == min(i for i in range(3) if i != e)).float().mean()) == pytest.approx(float(rest[0]), abs=0.03)
    weight = choice(Scores(z[:1]), Context()).weight
    want = torch.stack([p.max(), z[0, 1:3].softmax(0).max()])
    torch.testing.assert_close(weight, want)


PICKS = "picks are distinct, within reach and in turn, the second's probabilities over those left"


@check(SLUG, PICKS, kind="method")
def test_picks() -> None:
    torch.manual_seed(0)
    picks_in_turn(Grin(2))


@check(SLUG, PICKS, kind="twin")
def test_picks_twin() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        picks_in_turn(Counted(2))


def evaluation_is_certain(choice: Grin) -> None:
    """Outside training nothing is drawn: the likeliest, then the likeliest of the rest, at their own weight."""
    scores = Scores(torch.randn(200, 6))
    one, other = choice(scores, Context()), choice(scores, Context())
    assert torch.equal(one.expert, other.expert) and torch.equal(one.weight, other.weight)
    assert torch.equal(one.expert.view(-1, 2), scores.logits.topk(2).indices)
    assert not torch.equal(choice(scores, TRAINING).expert, one.expert)


class AlwaysSamples(Grin):
    """Samples outside training too."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return super().__call__(scores, replace(context, training=True))


EVALUATION = "evaluation takes the likeliest and draws nothing"


@check(SLUG, EVALUATION, kind="method")
def test_evaluation() -> None:
    torch.manual_seed(0)
    evaluation_is_certain(Grin(epsilon=2.0))


@check(SLUG, EVALUATION, kind="twin")
def test_evaluation_twin() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        evaluation_is_certain(AlwaysSamples(epsilon=2.0))


@check(SLUG, "equal to transformers' Phi-3.5-MoE, gradients included", kind="oracle")
@pytest.mark.parametrize("training", [False, True])
def test_against_transformers(training: bool) -> None:
    """With the same draws; transformers writes thirds as 0.3333."""
    phimoe: Any = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    z = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for ours in (True, False):
        leaf = z.clone().requires_grad_()
        torch.manual_seed(4)
        if ours:
            routing = Grin(2, epsilon=0.3)(Scores(leaf), Context(training=training))
            expert, weight = routing.expert.view(-1, 2), routing.weight.view(-1, 2)
        else:
            weight, expert = phimoe.sparsemixer(leaf, 0.3, training, 2)
        (weight * torch.tensor([[1.0, -2.0]]) * leaf.detach()[:, :2]).sum().backward()
        found.append((expert, weight.detach(), leaf.grad))
    if training:  # the coin falls whole below our chance and above theirs: only the picks and the weights' two values are compared
        assert torch.equal(found[0][0], found[1][0])
        ratio = (found[0][1] / found[1][1]).log().abs()
        assert bool(((ratio < 1e-3) | ((ratio - torch.tensor(3.0).log()).abs() < 1e-3)).all())
        torch.testing.assert_close(found[0][2], found[1][2], atol=1e-5, rtol=1e-4)
        return
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def coin_falls(choice: type[Grin]) -> None:
    """Samples follow p at the temperature; the likeliest weighs p, another p by the coin's chance, a quarter by default, and a third of it otherwise."""
    torch.manual_seed(0)
    z = torch.tensor([0.3, 0.0]).repeat(8000, 1)
    for made, chance, temperature in ((choice(1, epsilon=2.0), 0.25, 1.0), (choice(1, epsilon=2.0, chance=0.625, temperature=0.5), 0.625, 0.5)):
        p = (z[0] / temperature).softmax(0)
        routing = made(Scores(z), TRAINING)
        other = routing.expert == 1
        assert float(other.float().mean()) == pytest.approx(float(p[1]), abs=0.02)
        assert bool(torch.isclose(routing.weight[~other], p[0]).all())
        whole = torch.isclose(routing.weight[other], p[1])
        assert float(whole.float().mean()) == pytest.approx(chance, abs=0.03)
        assert bool((whole | torch.isclose(routing.weight[other], p[1] / 3)).all())


class NoCoin(Grin):
    """Every sample is taken whole."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return Grin(self.k, self.epsilon, 1.0, self.gain, self.temperature)(scores, context)


class WithoutTheShortcut(Grin):
    """The likeliest too is weighed by the coin."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        routing = super().__call__(scores, context)
        lost = (routing.expert == scores.logits.argmax(1)) & (torch.rand_like(routing.weight) > self.chance)
        return replace(routing, weight=torch.where(lost, routing.weight / 3, routing.weight))


class OneTemperature(Grin):
    """The temperature is left out."""

    def __call__(self, scores: Scores, context: Context) -> Routing:
        return Grin(self.k, self.epsilon, self.chance, self.gain)(scores, context)


COIN = "the likeliest is taken whole, another by the coin's chance, at the temperature"


@check(SLUG, COIN, kind="method")
def test_coin() -> None:
    coin_falls(Grin)


@check(SLUG, COIN, kind="twin")
@pytest.mark.parametrize("twin", [NoCoin, WithoutTheShortcut, OneTemperature])
def test_coin_twins(twin: type[Grin]) -> None:
    with pytest.raises(AssertionError):
        coin_falls(twin)


def balance_holds(balance: Callable[[Entry], Tensor]) -> None:
    """``0.01 E sum_i f_i P_i``: f the share of all picks, the sampled ones, P the mean probability among all experts."""
    torch.manual_seed(0)
    z = torch.randn(200, 6)
    routing = Grin(2, epsilon=2.0)(Scores(z), TRAINING)
    f = torch.bincount(routing.expert, minlength=6) / 400
    torch.testing.assert_close(balance(Entry("layer", 0, None, routing, TRAINING)), 0.01 * 6 * (f * z.softmax(-1).mean(0)).sum())


BALANCE = "balanced are the picks that were sampled"


@check(SLUG, BALANCE, kind="method")
def test_balance() -> None:
    (declared,) = Grin.balances
    balance_holds(declared)


@check(SLUG, BALANCE, kind="twin")
def test_balance_twin_of_the_likeliest() -> None:
    with pytest.raises(AssertionError):
        balance_holds(FirstChoiceBalance(0.01))


def test_it_trains_by_name() -> None:
    task = CharLM(width=16, rows=64)
    record = train(task, train_recipes()["static"], density=1.0, steps=25, options={"router": "grin:k=1"})
    assert record["metric"]["experts"] == 1.0


def test_wrong_values_are_refused() -> None:
    with pytest.raises(BadInput, match="between one and all"):
        Grin(5)(Scores(torch.zeros(1, 4)), Context())
    with pytest.raises(BadInput, match="lies in"):
        Grin(chance=1.5)
