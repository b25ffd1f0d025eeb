"""SMEAR: one expert of mean parameters per example; what it costs, what its router learns from, and what takes no part in the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Mix, Scores
from rarefy.core.roles import Affinity
from rarefy.experts.banks.ffn import FFN
from rarefy.experts.banks.glu import GLU
from rarefy.experts.layers.mixed import Mixed, mixed
from rarefy.experts.mixing import merged_linear
from rarefy.experts.mixtures.smear import Smear, adapters
from rarefy.experts.pooling import Pooled
from rarefy.experts.routers.linear import Linear
from rarefy.experts.routers.normed import NormedLinear
from rarefy.tasks.patch_digits import PatchDigits
from rarefy.weights.train import train
from tests.evidence import check

SLUG = "smear"


def drawn(bank: FFN) -> FFN:
    """The bank with every tensor drawn, biases too."""
    generator = torch.Generator().manual_seed(3)
    for p in bank.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 2
    return bank


def every(p: Tensor) -> Mix:
    return Mix(p, torch.arange(p.shape[1]).expand_as(p))


def layer(choice: Smear, bank: FFN | None = None, affinity: nn.Module | None = None, experts: int = 4) -> Mixed:
    """Of a router that is drawn too: its scores tell examples apart."""
    torch.manual_seed(0)
    made = affinity or choice.affinity(6, experts)
    if affinity is None:
        nn.init.normal_(made.get_parameter("inner.weight_norm.weight"), std=2.0)
    return Mixed(made, choice, drawn(adapters(experts, 6, 5)) if bank is None else bank)


class Biasless(FFN):
    """Weights are merged, biases are the mean of all."""

    def merged(self, x: Tensor, mix: Mix) -> Tensor:
        inner = self.act(merged_linear(x, self.up_proj, self.up_bias.mean(0).expand_as(self.up_bias), mix))
        return merged_linear(inner, self.down_proj, self.down_bias.mean(0).expand_as(self.down_bias), mix)


def one_hot_is_an_expert(bank: FFN) -> None:
    """With all the weight on one expert it is that expert, an adapter through silu; two groups may have different ones."""
    x, chosen = torch.randn(4, 7, 6), torch.tensor([2, 0, 3, 1])
    y = bank.merged(x, every(F.one_hot(chosen, 4).float()))
    for group, e in enumerate(chosen.tolist()):
        torch.testing.assert_close(y[group], bank.split()[e](x[group]), atol=1e-6, rtol=1e-6)
        adapter = F.silu(x[group] @ bank.up_proj[e].T + bank.up_bias[e]) @ bank.down_proj[e].T + bank.down_bias[e]
        torch.testing.assert_close(y[group], adapter, atol=1e-5, rtol=1e-5)


ONE_HOT = "all weight on one expert is that expert, biases too"


@check(SLUG, ONE_HOT, kind="method")
def test_one_hot() -> None:
    one_hot_is_an_expert(drawn(Smear.bank(4, 6, 5)))


@check(SLUG, ONE_HOT, kind="twin")
@pytest.mark.parametrize("twin", [Biasless(4, 6, 5, act=F.silu), FFN(4, 6, 5)], ids=["biases not merged", "another activation"])
def test_one_hot_twin(twin: FFN) -> None:
    with pytest.raises(AssertionError):
        one_hot_is_an_expert(drawn(twin))


def alike_experts_hide_the_router(choice: Smear) -> None:
    """Where all experts are one, neither probabilities nor dropout show, in training either."""
    made, x = layer(choice), torch.randn(8, 5, 6)
    with torch.no_grad():
        for p in made.bank.parameters():
            p.copy_(p[:1].expand_as(p))
    want = made.bank.split()[0](x)
    for training in (False, True):
        torch.testing.assert_close(made.train(training)(x), want, atol=1e-5, rtol=1e-5)


class Shrinking(Smear):
    """Dropout without renormalising."""

    def _dropped(self, p: Tensor, live: Tensor) -> Tensor:
        return p * (torch.rand_like(p) >= self.dropout)


ALIKE = "identical experts make the output independent of the router, under dropout too"


@check(SLUG, ALIKE, kind="method")
def test_alike() -> None:
    alike_experts_hide_the_router(Smear(0.5))


@check(SLUG, ALIKE, kind="twin")
def test_alike_twin() -> None:
    with pytest.raises(AssertionError):
        alike_experts_hide_the_router(Shrinking(0.5))


def router_learns(choice: Smear) -> None:
    """The gradient of every expert's score is what finite differences say, and is not zero."""
    made, x = layer(choice).double().eval(), torch.randn(3, 5, 6, dtype=torch.double)
    bias = made.get_parameter("affinity.inner.bias")

    def loss(bias: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"affinity.inner.bias": bias}, (x,)).square().sum()

    (grad,) = torch.autograd.grad(loss(bias), bias)
    for e in range(4):
        step = 1e-2 * F.one_hot(torch.tensor(e), 4).double()
        slope = float((loss(bias.detach() + step) - loss(bias.detach() - step)) / 2e-2)
        assert float(grad[e]) == pytest.approx(slope, rel=1e-2) and abs(slope) > 1e-3


class Hardest(Smear):
    """The likeliest expert alone, straight through."""

    def __call__(self, scores: Scores, context: Context) -> Mix:
        p = super().__call__(scores, context).weight
        return every(F.one_hot(p.argmax(1), p.shape[1]).to(p) + p - p.detach())


LEARNS = "the router's gradient is exact, and every expert has one"


@check(SLUG, LEARNS, kind="method")
def test_router_learns() -> None:
    router_learns(Smear())


@check(SLUG, LEARNS, kind="twin")
def test_router_learns_twin() -> None:
    with pytest.raises(AssertionError):
        router_learns(Hardest())


def linear_experts(merge: object) -> None:
    """A linear expert of merged weights is the weighted sum of the experts' outputs."""
    x, weight, bias, p = torch.randn(3, 5, 6), torch.randn(4, 7, 6), torch.randn(4, 7), torch.rand(3, 4).softmax(1)
    outputs = torch.stack([F.linear(x, weight[e], bias[e]) for e in range(4)])
    torch.testing.assert_close(merge(x, weight, bias, every(p)), torch.einsum("ge,egmo->gmo", p, outputs), atol=1e-5, rtol=1e-5)  # type: ignore[operator]


def once_per_batch(x: Tensor, weight: Tensor, bias: Tensor, mix: Mix) -> Tensor:
    """One merged expert for the whole batch."""
    return merged_linear(x, weight, bias, every(mix.weight.mean(0, keepdim=True).expand_as(mix.weight)))


LINEAR = "linear experts: merging is the sum of outputs, example by example"


@check(SLUG, LINEAR, kind="method")
def test_linear_experts() -> None:
    linear_experts(merged_linear)


@check(SLUG, LINEAR, kind="twin")
def test_linear_experts_twin() -> None:
    with pytest.raises(AssertionError):
        linear_experts(once_per_batch)


def costs_one_expert_and_the_merge(bank: type[FFN]) -> None:
    """Multiply-adds grow with E by the merge and the router's scores alone."""

    def rest(experts: int) -> int:
        made = layer(Smear(), bank(experts, 6, 5), experts=experts)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            made(torch.randn(3, 20, 6))
        return counted.get_total_flops() - 2 * 3 * experts * (sum(p[0].numel() for p in made.bank.parameters()) + 6)

    assert rest(2) == rest(8) == 2 * 3 * 20 * 2 * 6 * 5


class Ensemble(FFN):
    """Every expert is run."""

    def merged(self, x: Tensor, mix: Mix) -> Tensor:
        return torch.stack([mix.weight[:, e, None, None] * expert(x) for e, expert in enumerate(self.split())]).sum(0)


COST = "the cost grows with E by the merge alone"


@check(SLUG, COST, kind="method")
def test_cost() -> None:
    costs_one_expert_and_the_merge(FFN)


@check(SLUG, COST, kind="twin")
def test_cost_twin() -> None:
    with pytest.raises(AssertionError):
        costs_one_expert_and_the_merge(Ensemble)


def padding_is_not_pooled(pool: type[Pooled]) -> None:
    """What stands in padding, and how much of it there is, changes no probability."""
    torch.manual_seed(0)
    x, valid = torch.randn(3, 6, 6), torch.arange(6) < torch.tensor([[3], [6], [1]])
    router = pool(NormedLinear(6, 4, scale=1.0))
    logits = router(x, Context(valid=valid)).logits
    torch.testing.assert_close(router(x.masked_fill(~valid[..., None], 7.0), Context(valid=valid)).logits, logits)
    torch.testing.assert_close(router(x[:1, :3], Context()).logits, logits[:1])


class OfAll(Pooled):
    """The mean over padding too."""

    def forward(self, x: Tensor, context: Context) -> Scores:
        return super().forward(x, Context())


PADDING = "padding does not change the probabilities"


@check(SLUG, PADDING, kind="method")
def test_padding() -> None:
    padding_is_not_pooled(Pooled)


@check(SLUG, PADDING, kind="twin")
def test_padding_twin() -> None:
    with pytest.raises(AssertionError):
        padding_is_not_pooled(OfAll)


def both_sides_are_normalised(make: type[Affinity]) -> None:
    """Neither the length of a row nor that of an expert's vector shows, and at first all experts score nearly alike."""
    torch.manual_seed(0)
    router, x = make(64, 4), 20 * torch.randn(9, 64) + 5
    logits = router(x, Context(), None).logits
    assert float(logits.detach().softmax(1).sub(0.25).abs().max()) < 0.1
    torch.testing.assert_close(router(3 * x, Context(), None).logits, logits, atol=1e-4, rtol=1e-3)
    found = []
    for lengths in (100 * torch.ones(4, 1), torch.tensor([[5.0], [1.0], [0.5], [9.0]])):
        with torch.no_grad():
            router.get_parameter("weight").mul_(lengths)
        found.append(router(x, Context(), None).logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


NORMED = "rows and expert vectors are both normalised, and experts start alike"


@check(SLUG, NORMED, kind="method")
def test_normalised() -> None:
    both_sides_are_normalised(NormedLinear)


@check(SLUG, NORMED, kind="twin")
def test_normalised_twin() -> None:
    with pytest.raises(AssertionError):
        both_sides_are_normalised(Linear)


def test_dropout_is_of_training_alone_and_drops_its_share() -> None:
    scores = Scores(torch.randn(4000, 4))
    p = Smear(0.1)(scores, Context()).weight
    torch.testing.assert_close(p, scores.logits.softmax(1))
    dropped = Smear(0.1)(scores, Context(training=True)).weight
    torch.testing.assert_close(dropped.sum(1), torch.ones(4000))
    assert float((dropped < 1e-6).float().mean()) == pytest.approx(0.1, abs=0.01)
    all_dropped = Smear(0.1)._dropped(torch.zeros(1, 4), torch.ones(4))
    torch.testing.assert_close(all_dropped, torch.full((1, 4), 0.25))


def test_it_trains_by_name() -> None:
    pytest.importorskip("sklearn")
    task = PatchDigits(width=16, rows=32)
    record = train(task, train_recipes()["static"], density=1.0, steps=60, options={"router": "smear"})
    assert record["metric"]["accuracy"] > task.evaluate(task.model(0, router="smear"))["accuracy"] + 0.15
    assert record["options"] == {"router": "smear"}


def test_a_bank_that_cannot_be_merged_and_wrong_values_are_refused() -> None:
    with pytest.raises(BadInput, match="merged"):
        Mixed(Smear().affinity(6, 4), Smear(), GLU(4, 6, 5))(torch.randn(1, 2, 6))
    with pytest.raises(BadInput, match="in \\[0, 1\\)"):
        Smear(1.0)
    assert mixed(Smear(), 6, 4, 5).bank.act is F.silu
