"""MEO: k experts are mixed in their parameters and one is run; what that equals, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Mix, Routing, Scores
from rarefy.core.trace import Trace
from rarefy.experts.banks.ffn import FFN
from rarefy.experts.dispatch import dispatch
from rarefy.experts.layers.mixed import Mixed
from rarefy.experts.mixing import merge, merged_linear
from rarefy.experts.mixtures.merged_topk import MergedTopK, TokenBlock
from rarefy.experts.pooling import Pooled
from rarefy.experts.routers.noisy_topk import NoisyLinear, NoisyTopK
from rarefy.tasks.patch_digits import PatchDigits
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.test_smear import Biasless, OfAll, drawn

SLUG = "meo"


def layer(choice: MergedTopK, bank: FFN | None = None) -> Mixed:
    """Of a router that is drawn: its weights start at zero."""
    torch.manual_seed(0)
    made = Mixed(choice.affinity(6, 8), choice, drawn(FFN(8, 6, 5)) if bank is None else bank, choice.before(6))
    nn.init.normal_(made.get_parameter("affinity.inner.weight"))
    return made.eval()


def chosen(made: Mixed, x: Tensor) -> Mix:
    found = made.choice(made.affinity(x, Context()), Context())
    assert isinstance(found, Mix)
    return found


def linear_identity(merge_linear: object) -> None:
    """For a linear expert, biases too, merging is the weighted sum of the chosen experts' outputs, few of many or all."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 6), torch.randn(8, 7, 6), torch.randn(8, 7)
    for k in (1, 2, 4, 8):
        mix = MergedTopK(k)(Scores(torch.randn(3, 8)), Context())
        want = torch.stack([sum(w * (weight[e] @ x[g].T).T + w * bias[e] for w, e in zip(mix.weight[g], mix.expert[g].tolist(), strict=True)) for g in range(3)])  # type: ignore[arg-type]
        torch.testing.assert_close(merge_linear(x, weight, bias, mix), want, atol=1e-5, rtol=1e-5)  # type: ignore[operator]


def without_biases(x: Tensor, weight: Tensor, bias: Tensor, mix: Mix) -> Tensor:
    """The first expert's bias is kept as it is."""
    return torch.baddbmm(bias[mix.expert[:, 0]][:, None], x, merge(weight, mix).transpose(1, 2))


LINEAR = "for linear experts merging is the weighted sum of outputs, to 1e-5"


@check(SLUG, LINEAR, kind="method")
def test_linear_identity() -> None:
    linear_identity(merged_linear)


@check(SLUG, LINEAR, kind="twin")
def test_linear_identity_twin() -> None:
    with pytest.raises(AssertionError):
        linear_identity(without_biases)


def one_is_top_1(choice: MergedTopK, bank: FFN) -> None:
    """With k = 1 it is the ordinary layer that sends a sequence's tokens to its first expert at weight 1."""
    made, x = layer(choice, bank), torch.randn(7, 5, 6)
    best = made.affinity(x, Context()).logits.argmax(1)
    assert len(best.unique()) > 2
    routing = Routing(best.repeat_interleave(5), torch.ones(35), 35, 8, 1)
    torch.testing.assert_close(made(x), dispatch(x.flatten(0, 1), routing, bank).view_as(x), atol=1e-6, rtol=1e-6)


ONE = "k = 1 is the ordinary top-1 layer, its gate 1"


@check(SLUG, ONE, kind="method")
def test_one() -> None:
    one_is_top_1(MergedTopK(1), drawn(FFN(8, 6, 5)))


@check(SLUG, ONE, kind="twin")
def test_one_twin() -> None:
    with pytest.raises(AssertionError):
        one_is_top_1(MergedTopK(1), drawn(Biasless(8, 6, 5)))


def costs_one_expert(bank: type[FFN]) -> None:
    """Multiply-adds of matrix products are those of one expert, whatever k < E / 2; what is left is the merge, k |W| per sequence."""

    def flops(k: int) -> int:
        made = layer(MergedTopK(k), bank(8, 6, 5))
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            made(torch.randn(3, 20, 6))
        return counted.get_total_flops() - 2 * 3 * 6 * 8  # the router's

    assert flops(1) == flops(2) == flops(3) == 2 * 3 * 20 * 2 * 6 * 5


class MixesOutputs(FFN):
    """Runs all k experts and mixes what they give."""

    def merged(self, x: Tensor, mix: Mix) -> Tensor:
        experts = self.split()
        rows = [sum(w * experts[e](x[g]) for w, e in zip(mix.weight[g], mix.expert[g].tolist(), strict=True)) for g in range(len(x))]
        return torch.stack(rows)  # type: ignore[arg-type]


COST = "the cost does not depend on k but for the merge"


@check(SLUG, COST, kind="method")
def test_cost() -> None:
    costs_one_expert(FFN)


@check(SLUG, COST, kind="twin")
def test_cost_twin() -> None:
    with pytest.raises(AssertionError):
        costs_one_expert(MixesOutputs)


def each_map_is_merged_by_itself(bank: FFN) -> None:
    """A chosen pair is one expert of mean up, b, down and c, its activation between: not the mean of two outputs."""
    x, mix = torch.randn(2, 5, 6), Mix(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[2, 0], [7, 3]]))
    for g in range(2):
        up, b, down, c = (sum(mix.weight[g, i] * p[mix.expert[g, i]] for i in range(2)) for p in (bank.up_proj, bank.up_bias, bank.down_proj, bank.down_bias))
        want = torch.nn.functional.gelu(x[g] @ up.T + b) @ down.T + c  # type: ignore[union-attr]
        torch.testing.assert_close(bank.merged(x, mix)[g], want, atol=1e-5, rtol=1e-5)


BY_ITSELF = "each linear map is merged by itself, the activation between"


@check(SLUG, BY_ITSELF, kind="method")
def test_each_map() -> None:
    each_map_is_merged_by_itself(drawn(FFN(8, 6, 5)))


@check(SLUG, BY_ITSELF, kind="twin")
def test_each_map_twin() -> None:
    with pytest.raises(AssertionError):
        each_map_is_merged_by_itself(drawn(MixesOutputs(8, 6, 5)))


def faster_with_length(bank: type[FFN]) -> None:
    """Measured: over a layer that runs four experts its time falls as sequences grow, towards a quarter."""

    torch.manual_seed(0)
    merging, moe, mix = bank(16, 256, 512), FFN(16, 256, 512), MergedTopK(4)(Scores(torch.randn(1, 16)), Context())

    def ratio(tokens: int) -> float:
        x, each = torch.randn(1, tokens, 256), [t.repeat_interleave(tokens, 0).flatten() for t in (mix.expert, mix.weight)]
        routing, best = Routing(*each, tokens, 16, 4), [math.inf, math.inf]
        for _ in range(7):
            for place, run in enumerate((lambda: merging.merged(x, mix), lambda: dispatch(x[0], routing, moe))):
                start = time.perf_counter()
                run()
                best[place] = min(best[place], time.perf_counter() - start)
        return best[0] / best[1]

    with torch.no_grad():
        short, long = ratio(1), ratio(1024)
    assert long < min(0.7, 0.5 * short), (short, long)


FASTER = "measured against four experts, its time falls as sequences grow"


@check(SLUG, FASTER, kind="method")
def test_faster_with_length() -> None:
    faster_with_length(FFN)


@check(SLUG, FASTER, kind="twin")
def test_faster_with_length_twin() -> None:
    with pytest.raises(AssertionError):
        faster_with_length(MixesOutputs)


def a_sequence_is_gated_by_its_own_tokens(pool: type[Pooled]) -> None:
    """Its mean is over its tokens that are not padding."""
    torch.manual_seed(0)
    router, x, valid = pool(NoisyLinear(6, 8)), torch.randn(3, 6, 6), torch.arange(6) < torch.tensor([[3], [6], [1]])
    nn.init.normal_(router.get_parameter("inner.weight"))
    logits = router(x, Context(valid=valid)).logits
    want = torch.stack([row[mask].mean(0) for row, mask in zip(x, valid, strict=True)]) @ router.get_parameter("inner.weight").T
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(router(x, Context()).logits, x.mean(1) @ router.get_parameter("inner.weight").T, atol=1e-5, rtol=1e-5)


class OfTheFirst(Pooled):
    """Without padding a sequence's first token stands for it."""

    def forward(self, x: Tensor, context: Context) -> Scores:
        return super().forward(x if context.valid is not None else x[:, :1], context)


POOLED = "a sequence's gate sees its tokens and no padding"


@check(SLUG, POOLED, kind="method")
def test_pooled() -> None:
    a_sequence_is_gated_by_its_own_tokens(Pooled)


@check(SLUG, POOLED, kind="twin")
@pytest.mark.parametrize("twin", [OfAll, OfTheFirst])
def test_pooled_twin(twin: type[Pooled]) -> None:
    with pytest.raises(AssertionError):
        a_sequence_is_gated_by_its_own_tokens(twin)


def starts_as_nothing(block: nn.Module) -> None:
    """A new block adds nothing, so that the layer is the one without it; it learns; and what it adds is up(relu(down x))."""
    x = torch.randn(2, 5, 6)
    plain, made = layer(MergedTopK(2)), layer(MergedTopK(2))
    made.before = block
    torch.testing.assert_close(made(x), plain(x))
    made(x).square().sum().backward()
    grad = block.get_parameter("up.weight").grad
    assert grad is not None and bool(grad.any())
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape))
    down, c, up, b = (block.get_parameter(name) for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
    torch.testing.assert_close(made(x), plain(x + (x @ down.T + c).relu() @ up.T + b), atol=1e-5, rtol=1e-5)


class LinearBlock(TokenBlock):
    """Nothing between its two maps."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out


class DrawnBlock(TokenBlock):
    """Its last map is drawn as linear maps are."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.up.reset_parameters()


BLOCK = "the token block starts as nothing, learns, and adds up(relu(down x))"


@check(SLUG, BLOCK, kind="method")
def test_token_block() -> None:
    starts_as_nothing(TokenBlock(6, reduction=1))


@check(SLUG, BLOCK, kind="twin")
@pytest.mark.parametrize("twin", [lambda: DrawnBlock(6), lambda: LinearBlock(6, reduction=1)], ids=["drawn", "linear"])
def test_token_block_twin(twin: Callable[[], TokenBlock]) -> None:
    with pytest.raises(AssertionError):
        starts_as_nothing(twin())


def test_gates() -> None:
    scores = Scores(torch.randn(5, 8), select=torch.randn(5, 8), noise=torch.ones(5, 8))
    mix, want = MergedTopK(3)(scores, Context(training=True)), NoisyTopK(3)(scores, Context(training=True))
    assert torch.equal(mix.expert.flatten(), want.expert)
    top, index = scores.select.topk(3, -1)  # type: ignore[union-attr]
    assert torch.equal(mix.expert, index)
    torch.testing.assert_close(mix.weight, top.softmax(-1))
    router, x = MergedTopK(3).affinity(6, 8), torch.randn(2, 5, 6)
    assert router(x, Context()).select is None and router(x, Context(training=True)).select is not None


def test_losses_see_one_routing_of_the_sequences() -> None:
    made, x = layer(MergedTopK(2)).train(), torch.randn(5, 4, 6)
    with Trace(made, rows=True) as trace:
        made(x, Context(valid=torch.arange(20).view(5, 4) % 3 != 1))
    (entry,) = trace.entries
    assert entry.routing.items == 5 and entry.x is not None and entry.x.shape == (5, 6)
    losses = [balance(entry) for balance in MergedTopK.balances]
    torch.stack(losses).sum().backward()
    grad = made.get_parameter("affinity.inner.weight").grad
    assert grad is not None and bool(grad.any())


def test_it_trains_by_name_with_and_without_the_token_block() -> None:
    pytest.importorskip("sklearn")
    task = PatchDigits(width=16, rows=32)
    for router in ("merged-topk", "merged-topk:k=3,token=True"):
        record = train(task, train_recipes()["static"], density=1.0, steps=60, options={"router": router})
        assert record["metric"]["accuracy"] > task.evaluate(task.model(0, router=router))["accuracy"] + 0.15


def test_wrong_values_are_refused() -> None:
    with pytest.raises(BadInput, match="one expert or more"):
        MergedTopK(0)
    with pytest.raises(BadInput, match="between one and all"):
        layer(MergedTopK(9))(torch.randn(1, 2, 6))
