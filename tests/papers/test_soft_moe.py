"""Soft MoE: means over tokens and over slots, equal to loops over both; groups alone, angles that do not saturate, and no decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.ambient import Ambient
from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput, Refused
from rarefy.core.records import Context, Scores, Slots
from rarefy.experts.banks.glu import GLU
from rarefy.experts.layers.mixed import Mixed, mixed
from rarefy.experts.mixtures.soft_slots import SlotCosine, SoftSlots
from rarefy.tasks.patch_digits import PatchDigits
from rarefy.weights.train import train
from tests.evidence import check

SLUG = "soft-moe"


def layer(choice: SoftSlots, width: int = 6, experts: int = 4, seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return mixed(choice, width, experts, 5)


def adds_up(choice: SoftSlots) -> None:
    """Over tokens a slot's shares sum to 1, over all slots a token's do; with one expert of one slot all tokens get the same vector."""
    made, x = layer(choice), torch.randn(3, 7, 6)
    slots = choice(made.affinity(x, Context()), Context())
    torch.testing.assert_close(slots.dispatch.sum(1), torch.ones(3, 4, choice.slots))
    torch.testing.assert_close(slots.combine.sum((2, 3)), torch.ones(3, 7))
    one = layer(type(choice)(1), experts=1)(x)
    torch.testing.assert_close(one, one[:, :1].expand_as(one))
    assert not torch.allclose(one[0], one[1])


class PerExpert(SoftSlots):
    """A token's shares are a softmax within each expert."""

    def __call__(self, scores: Scores, context: Context) -> Slots:
        return Slots(scores.logits.softmax(1), scores.logits.softmax(-1))


ADDS_UP = "shares sum to 1 over tokens and over all slots, and one slot serves all alike"


@check(SLUG, ADDS_UP, kind="method")
def test_adds_up() -> None:
    adds_up(SoftSlots(3))


@check(SLUG, ADDS_UP, kind="twin")
def test_adds_up_twin() -> None:
    with pytest.raises(AssertionError):
        adds_up(PerExpert(3))


def equivariant(choice: SoftSlots) -> None:
    """Permuted tokens are permuted outputs; a duplicated batch, and other groups beside, change nothing."""
    made, x, order = layer(choice), torch.randn(3, 7, 6), torch.randperm(7)
    y = made(x)
    torch.testing.assert_close(made(x[:, order]), y[:, order])
    torch.testing.assert_close(made(torch.cat([x, x])), torch.cat([y, y]))
    torch.testing.assert_close(made(x[:1]), y[:1])


class OverTheBatch(SoftSlots):
    """A slot's mean is over the tokens of all groups."""

    def __call__(self, scores: Scores, context: Context) -> Slots:
        whole = scores.logits.flatten(0, 1).softmax(0).view_as(scores.logits)
        return Slots(whole, super().__call__(scores, context).combine)


EQUIVARIANT = "tokens may be permuted, the batch duplicated"


@check(SLUG, EQUIVARIANT, kind="method")
def test_equivariant() -> None:
    equivariant(SoftSlots(2))


@check(SLUG, EQUIVARIANT, kind="twin")
def test_equivariant_twin() -> None:
    with pytest.raises(AssertionError):
        equivariant(OverTheBatch(2))


def does_not_saturate(affinity: type[SlotCosine]) -> None:
    """Scores are angles: at width 2048 and rows of length 450 no token has more than e^2 times another's share of a slot."""
    torch.manual_seed(0)
    x, made = 10 * torch.randn(2, 16, 2048), affinity(2048, 4, slots=2)
    logits = made(x, Context()).logits.detach()
    assert float(logits.abs().max()) <= 1.0 + 1e-5
    share = SoftSlots(2)(Scores(logits), Context()).dispatch
    assert float((share.amax(1) / share.amin(1)).max()) <= math.exp(2)
    moved = made(7 * x, Context()).logits.detach()
    torch.testing.assert_close(moved, logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        made.scale.fill_(3.0)
    torch.testing.assert_close(made(x, Context()).logits.detach(), 3 * logits)


class Unnormalised(SlotCosine):
    """A product in place of a cosine."""

    def forward(self, x: Tensor, context: Context) -> Scores:
        return Scores(torch.einsum("gmd,des->gmes", x, self.scale * self.phi))


SATURATES = "scores are angles, however wide and long the rows"


@check(SLUG, SATURATES, kind="method")
def test_does_not_saturate() -> None:
    does_not_saturate(SlotCosine)


@check(SLUG, SATURATES, kind="twin")
def test_does_not_saturate_twin() -> None:
    with pytest.raises(AssertionError):
        does_not_saturate(Unnormalised)


def cosine(a: list[float], b: list[float]) -> float:
    """As the authors' code has it, 1e-6 beside each squared length."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt((sum(x * x for x in a) + 1e-6) * (sum(y * y for y in b) + 1e-6))


def by_loops(made: Any, x: Tensor, valid: Tensor) -> Tensor:
    """The layer token by token and slot by slot in float64, nothing of ours but the parameters."""
    phi, scale, bank = made.get_parameter("affinity.phi").detach().double(), float(made.get_parameter("affinity.scale").detach()), made.bank
    width, experts, slots = phi.shape
    y = torch.zeros(x.shape, dtype=torch.double)
    for g, tokens in enumerate(x.double()):
        real = [m for m in range(len(tokens)) if valid[g, m]]
        logit = {(m, e, s): scale * cosine(tokens[m].tolist(), phi[:, e, s].tolist()) for m in real for e in range(experts) for s in range(slots)}
        for e in range(experts):
            for s in range(slots):
                over = sum(math.exp(logit[m, e, s]) for m in real)
                slot = sum((math.exp(logit[m, e, s]) / over * tokens[m] for m in real), torch.zeros(width, dtype=torch.double))
                gate, up = (bank.gate_up_proj[e].double() @ slot).chunk(2)
                out = bank.down_proj[e].double() @ (gate * gate.sigmoid() * up)
                for m in real:
                    y[g, m] += math.exp(logit[m, e, s]) / sum(math.exp(value) for (n, _, _), value in logit.items() if n == m) * out
    return y


@check(SLUG, "equal to loops over tokens and slots", kind="oracle")
def test_against_loops() -> None:
    made, x, valid = layer(SoftSlots(3)), 3 * torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True, True, False, True, False]])
    with torch.no_grad():
        made.get_parameter("affinity.scale").fill_(2.5)
    with torch.no_grad():
        torch.testing.assert_close(made(x, Context(valid=valid)).double(), by_loops(made, x, valid), atol=1e-5, rtol=1e-5)


class NormalisedSlots(SoftSlots):
    """Slots are means of rows that were normalised."""

    def affinity(self, width: int, experts: int, /) -> nn.Module:
        return SlotCosine(width, experts, slots=self.slots)

    def before(self, width: int) -> nn.Module | None:
        return Negated()


class Negated(nn.Module):
    """What turns x into its unit vector when added to it."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) - x


@check(SLUG, "slots are means of the rows themselves", kind="method")
def test_slots_are_means_of_the_rows() -> None:
    means_of_rows(SoftSlots(2))


@check(SLUG, "slots are means of the rows themselves", kind="twin")
def test_slots_are_means_of_the_rows_twin() -> None:
    with pytest.raises(AssertionError):
        means_of_rows(NormalisedSlots(2))


def means_of_rows(choice: SoftSlots) -> None:
    """Experts see the rows' length: a ReLU-like bank without biases scales with it, and the shares do not."""

    class Doubling(GLU):
        def split(self) -> Any:
            return [lambda x: 2 * x] * self.experts

    made, x = layer(choice), torch.randn(2, 7, 6)
    made.bank = Doubling(4, 6, 5)
    torch.testing.assert_close(made(5 * x), 5 * made(x), atol=1e-4, rtol=1e-4)


def smooth(choice: SoftSlots) -> None:
    """Finite differences of the output in tokens, phi and scale are the gradient."""
    made, x = layer(choice).double(), torch.randn(1, 3, 6, dtype=torch.double, requires_grad=True)
    parameters = [made.get_parameter("affinity.phi"), made.get_parameter("affinity.scale")]

    def out(x: Tensor, phi: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"affinity.phi": phi, "affinity.scale": scale}, (x,))

    grads = torch.autograd.grad(out(x, *parameters).square().sum(), [x, *parameters])
    assert all(bool(g.any()) for g in grads)
    for place, grad in enumerate(grads):
        at = [t.detach() for t in (x, *parameters)]
        direction = torch.randn_like(at[place])
        ends = [out(*at[:place], at[place] + sign * 1e-2 * direction, *at[place + 1 :]).square().sum().detach() for sign in (1, -1)]
        assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float((grad * direction).sum()), rel=1e-2)


class Hard(SoftSlots):
    """Each slot takes one token."""

    def __call__(self, scores: Scores, context: Context) -> Slots:
        best = scores.logits.detach() == scores.logits.detach().amax(1, keepdim=True)
        return Slots(best.float(), torch.ones_like(scores.logits) / scores.logits[0, 0].numel())


SMOOTH = "the gradient is what finite differences say, in tokens and router"


@check(SLUG, SMOOTH, kind="method")
def test_smooth() -> None:
    smooth(SoftSlots(2))


@check(SLUG, SMOOTH, kind="twin")
def test_smooth_twin() -> None:
    with pytest.raises(RuntimeError, match="not have been used"):
        smooth(Hard(2))


def refused_by_a_decoder(choice: SoftSlots) -> None:
    """Not in a model that generates text; in an encoder it serves padded sentences as if alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    encoder: Any = transformers.BertModel(transformers.BertConfig(**sizes)).eval()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mixed(choice, 8, 4, 6)

        def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
            return attended + self.inner(attended)

    encoder.encoder.layer[0].output = Both()
    encoder.encoder.layer[0].intermediate = nn.Identity()
    ambient = Ambient.attach(encoder)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    torch.testing.assert_close(encoder(ids, attention_mask=mask)[0][0, :3], encoder(ids[:1, :3])[0][0], atol=1e-5, rtol=1e-4)
    ambient.detach()
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    decoder.model.layers[0].mlp = mixed(choice, 8, 4, 6)
    with pytest.raises(Refused, match="later ones"):
        Ambient.attach(decoder)


class SaysCausal(SoftSlots):
    """Says that no token sees later ones."""

    def causal(self, training: bool) -> bool:
        return True


GUARD = "a model that generates text refuses it"


@check(SLUG, GUARD, kind="method")
def test_refused_by_a_decoder() -> None:
    refused_by_a_decoder(SoftSlots())


@check(SLUG, GUARD, kind="twin")
def test_refused_by_a_decoder_twin() -> None:
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        refused_by_a_decoder(SaysCausal())


def test_the_cost_is_that_of_the_slots_whatever_the_number_of_experts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(experts: int, slots: int) -> int:
        made = layer(SoftSlots(slots), width=16, experts=experts)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            made(torch.randn(2, 16, 16))
        return counted.get_total_flops()

    assert flops(16, 1) == flops(4, 4) == flops(1, 16)
    assert flops(16, 2) == 2 * flops(16, 1)


def test_noise_is_of_training_alone() -> None:
    made, x = SoftSlots(2, noise=1.0).affinity(6, 4), torch.randn(2, 3, 6)
    assert torch.equal(made(x, Context()).logits, made(x, Context()).logits)
    assert not torch.equal(made(x, Context(training=True)).logits, made(x, Context(training=True)).logits)


def test_it_trains_by_name_and_compiles() -> None:
    task = PatchDigits(width=16, rows=32)
    pytest.importorskip("sklearn")
    record = train(task, train_recipes()["static"], density=1.0, steps=60, options={"router": "soft-slots:slots=4"})
    assert record["metric"]["accuracy"] > task.evaluate(task.model(0))["accuracy"] + 0.15
    made, x = layer(SoftSlots(2)), torch.randn(2, 5, 6)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x), atol=1e-5, rtol=1e-5)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(BadInput, match="a slot or more"):
        SoftSlots(0)
    with pytest.raises(BadInput, match="known are"):
        PatchDigits().model(0, router="switch")
    with pytest.raises(BadInput, match="options width"):
        PatchDigits().model(0, depth=2)
