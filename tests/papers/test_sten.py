"""STen: layouts, the fallback that says what to write, formats on a model, and the grouped n:m layout."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.core.attach import exported, gated
from rarefy.core.errors import BadInput, Refused
from rarefy.core.roles import Pattern, Selection
from rarefy.layouts import LAYOUTS, registry
from rarefy.layouts.formats import Format
from rarefy.layouts.n_m_g import NofMofG
from rarefy.layouts.registry import DenseFallback, differentiates, implements, selects, when_missing
from rarefy.layouts.selections import All, AtLeast, Largest, Same
from rarefy.layouts.tensor import LayoutTensor, convert
from rarefy.testing import check as keeps_its_contract
from rarefy.weights.formats import OutputFormat, WeightFormat, follow, set_formats
from rarefy.weights.patterns.n_m import NM
from rarefy.weights.patterns.n_m_g import NMG
from tests.evidence import check


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it, and nothing was told before it."""
    for name in ("_operators", "_selections"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_OUTSIDE", registry._Policy())


def told(function: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in seen if each.category is DenseFallback]


# -- layouts

ROUND_TRIP = "a tensor comes back from every registered layout as what its selection kept"
Lay = Callable[[Tensor, str, Selection], Tensor]


def comes_back(lay: Lay) -> None:
    for name, layout in LAYOUTS.items():
        for shape in ((6, 40), (2, 3, 40), (40,), (1, 1)):
            x = normal(*shape)
            ranked = x.abs().flatten().argsort(descending=True)[: round(0.4 * x.numel())]
            masked = torch.zeros(x.numel()).index_copy(0, ranked, x.flatten()[ranked]).view(shape)
            want = masked if layout.lossless else layout.unpack(layout.pack(masked.reshape(-1, shape[-1])), (x.numel() // shape[-1], shape[-1]), x.dtype).view(shape)
            laid = lay(x, name, Largest(0.4))
            assert isinstance(laid, LayoutTensor) and laid.shape == x.shape and laid.packed.dtype == torch.uint8
            assert torch.equal(laid.to_dense(), want), f"{name} {shape}"


@check("sten", ROUND_TRIP, kind="method")
def test_round_trip() -> None:
    comes_back(lambda x, name, keep: LayoutTensor.of(x, name, keep))


@check("sten", ROUND_TRIP, kind="twin")
def test_round_trip_twin() -> None:
    with pytest.raises(AssertionError):
        comes_back(lambda x, name, keep: LayoutTensor.of(x, name))  # stores everything


# -- operators

FALLBACK = "an operator without an implementation equals the dense one, gradients too, warns once, and its snippet registers it"
Apply = Callable[[Callable[..., Tensor], Tensor], Tensor]


def falls_back(apply: Apply) -> None:
    for op in (torch.exp, torch.nn.functional.gelu, torch.Tensor.cumsum):
        x = (normal(4, 6) * (normal(4, 6, seed=1) > 0)).requires_grad_(True)
        twin = x.detach().clone().requires_grad_(True)
        dim = {"dim": 1} if op is torch.Tensor.cumsum else {}
        made: list[Tensor] = []
        messages = told(lambda op=op, x=x, made=made, dim=dim: made.extend(apply(lambda t: op(t, **dim), LayoutTensor.of(x, "csr")) for _ in range(3)))
        want = op(twin, **dim)
        made[0].square().sum().backward()
        want.square().sum().backward()
        assert torch.equal(made[0], want) and torch.equal(x.grad, twin.grad)
        assert len(messages) == 1
        name = registry.name_of(registry.canonical(op))
        assert f"{name} of (csr)" in messages[0]
        snippet = messages[0].partition("To register it:\n\n")[2]
        exec(snippet.replace("    ...", f"    return {name}(args[0].to_dense(), *args[1:], **kwargs) + 1"), {})
        assert told(lambda op=op, x=x, dim=dim: op(LayoutTensor.of(x.detach(), "csr"), **dim)) == []
        assert torch.equal(op(LayoutTensor.of(x.detach(), "csr"), **dim), want + 1)


@check("sten", FALLBACK, kind="method")
def test_fallback() -> None:
    falls_back(lambda op, x: op(x))


@check("sten", FALLBACK, kind="twin")
def test_fallback_twin() -> None:
    with pytest.raises(AssertionError):
        falls_back(lambda op, x: op(x.to_dense()))  # dense without a word


def test_layouts_and_arguments_of_the_key_and_one_warning_for_each() -> None:
    x, y = LayoutTensor.of(normal(3, 4), "csr"), LayoutTensor.of(normal(3, 4, seed=1), "bitmask")
    messages = told(lambda: [torch.cat([x, y]), torch.cat([x, y]), torch.cat([y, x]), x + 1, x.add(2), torch.add(x, 3), 1 + x])
    assert [text.partition(":")[0] for text in messages] == ["torch.cat of (csr, bitmask)", "torch.cat of (bitmask, csr)", "torch.add of (csr)"]


def test_the_policy_raises_or_is_silent_and_ends_with_its_block() -> None:
    x = LayoutTensor.of(normal(3, 4), "csr")
    with when_missing("raise"), pytest.raises(Refused, match=r"(?s)torch.exp of \(csr\).*@implements\(torch.exp, 'csr'\)"):
        torch.exp(x)
    with when_missing("silent"):
        assert told(lambda: torch.exp(x)) == []
    assert len(told(lambda: torch.exp(x))) == 1
    with when_missing("warn"):
        assert len(told(lambda: [torch.exp(x), torch.exp(x)])) == 1
    with pytest.raises(BadInput, match="one of warn, raise, silent"), when_missing("loud"):
        pass


def test_an_implementation_is_found_exactly_else_by_a_lossless_conversion() -> None:
    seen: list[str] = []

    @implements(torch.neg, "csr")
    def neg_csr(x: LayoutTensor) -> Tensor:
        seen.append(x.laid)
        return LayoutTensor.of(-x.to_dense(), "csr")

    @implements(torch.neg, "int8")
    def neg_int8(x: LayoutTensor) -> Tensor:
        seen.append(x.laid)
        return -x.to_dense()

    w = normal(3, 4).requires_grad_(True)
    made = -LayoutTensor.of(w, "csr")
    with when_missing("raise"):
        assert isinstance(made, LayoutTensor) and made.laid == "csr" and torch.equal(made.to_dense(), -w)
        assert torch.equal(torch.neg(LayoutTensor.of(w.detach(), "bitmask")).to_dense(), -w.detach())  # int8 would change values
        torch.neg(LayoutTensor.of(w.detach(), "int8"))
    assert seen == ["csr", "csr", "int8"]
    assert told(lambda: made.to_dense().sum().backward())[0].startswith("the derivative of torch.neg of (csr)")
    assert w.grad.eq(-1).all()


def test_a_lossy_layout_is_not_converted_into_and_indices_need_no_gradient() -> None:
    implements(torch.abs, "int8")(lambda x: x.to_dense().abs() + 1)
    x = normal(3, 4)
    with when_missing("silent"):
        assert torch.equal(torch.abs(LayoutTensor.of(x, "csr")), x.abs())
    implements(torch.index_select, "csr", "dense")(lambda x, dim, index: torch.index_select(x.to_dense(), dim, index))
    w, index = x.clone().requires_grad_(True), torch.tensor([2, 0])
    with when_missing("silent"):
        torch.index_select(LayoutTensor.of(w, "csr"), 0, index).sum().backward()
    assert torch.equal(w.grad[:, 0], torch.tensor([1.0, 0.0, 1.0]))


def test_a_registered_derivative_is_taken_and_a_second_registration_refused() -> None:
    implements(torch.square, "csr")(lambda x: x.to_dense() ** 2)
    differentiates(torch.square, "csr")(lambda gradient, x: (7 * gradient,))
    w = normal(2, 3).requires_grad_(True)
    with when_missing("raise"):
        torch.square(LayoutTensor.of(w, "csr")).sum().backward()
    assert w.grad.eq(7).all()
    with pytest.raises(Refused, match="is registered for it"):
        implements(torch.square, "csr")(neg_of)


def neg_of(x: LayoutTensor) -> Tensor:
    return -x.to_dense()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_is_implemented_for_every_layout_with_its_gradients(layout: str) -> None:
    stored = LAYOUTS[layout].unpack(LAYOUTS[layout].pack(normal(6, 40)), (6, 40), torch.float32)
    for bias in (normal(6, seed=2), None):
        ways = [[t.clone().requires_grad_(True) for t in (normal(2, 3, 40, seed=1), normal(6, 40), *([] if bias is None else [bias]))] for _ in range(2)]
        (x, w, *b), (x2, w2, *b2) = ways
        with when_missing("raise"):
            y = F.linear(x, LayoutTensor.of(w, layout), *b)
            y.square().sum().backward()
            fast = F.linear(x.detach(), LayoutTensor.of(w.detach(), layout), *[t.detach() for t in b])
        dense = F.linear(x2, w2 + (stored - w2).detach(), *b2)
        dense.square().sum().backward()
        torch.testing.assert_close(y, dense)
        assert (fast - dense).norm() < (1e-6 if LAYOUTS[layout].lossless else 0.02) * dense.norm()
        for one, other in zip(*ways, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_writes_are_refused_and_inplace_modules_return_their_result() -> None:
    x = LayoutTensor.of(normal(3, 4), "csr")
    for write in (lambda: x.add_(1), lambda: x.__setitem__(0, 1.0), lambda: x.__iadd__(1), lambda: torch.exp(normal(3, 4), out=x)):
        with pytest.raises(Refused, match="cannot be written to in place"):
            write()
    with when_missing("silent"):
        assert torch.equal(nn.ReLU(inplace=True)(x), x.to_dense().relu())
    assert x.detach().laid == "csr" and copy.deepcopy(x).packed.data_ptr() != x.packed.data_ptr()


# -- selections and formats


def test_selections_keep_their_contract_and_say_how_much_they_must_see() -> None:
    for part, passes in ((Largest(pattern=NM(2, 4)), "blocking"), (Largest(pattern=NMG(1, 2, 3)), "blocking"), (Largest(0.3), "materialising"), (AtLeast(0.5), "streaming")):
        assert keeps_its_contract(part) > 0 and part.passes == passes
    with pytest.raises(AssertionError, match="is blocking and decides otherwise"):
        keeps_its_contract(Hasty(0.3))
    with pytest.raises(BadInput, match="make it the external one"):
        Format(inline=Largest(0.3))


class Hasty(Largest):
    passes = "blocking"
    name = "hasty"


def test_a_format_goes_through_the_operator_both_layouts_and_both_selections() -> None:
    steps: list[str] = []

    @implements(torch.exp, "dense", keep=AtLeast, into="csr")
    def exp_into_csr(selection: AtLeast, x: Tensor) -> LayoutTensor:
        steps.append("operator")
        return LayoutTensor.of(x.exp(), "csr", selection)

    @selects(Largest, "csr", "bitmask")
    def largest(selection: Largest, x: LayoutTensor) -> LayoutTensor:
        steps.append(f"{x.laid}, {int((x.to_dense() != 0).sum())} values")
        return LayoutTensor.of(x.to_dense(), "bitmask", selection)

    form = Format(AtLeast(1.5), "csr", Largest(0.25), "bitmask")
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).requires_grad_(True)
    with when_missing("raise"):
        y = form.call(torch.exp, (x,))
    assert steps == ["operator", "csr, 3 values"] and y.laid == "bitmask"
    with when_missing("silent"):
        y.to_dense().sum().backward()
    want = torch.tensor([[0.0, 0.0, 0.0, math.exp(3)]])
    torch.testing.assert_close(y.to_dense(), want)
    torch.testing.assert_close(x.grad, want)  # the derivative of what was computed
    messages = told(lambda: [form.call(torch.sin, (x.detach(),)), Format(external=Same(), layout="csr").of(x.detach())])
    assert len(messages) == 1 and "keep=AtLeast, into='csr'" in messages[0]
    other = told(lambda: convert(LayoutTensor.of(x.detach(), "csr"), AtLeast(1.0), "bitmask"))
    assert len(other) == 1 and "@selects(AtLeast, 'csr', 'bitmask')" in other[0]
    exec(other[0].partition("To register it:\n\n")[2].replace("    ...", "    return LayoutTensor.of(x.to_dense() + 5, 'bitmask')"), {})
    assert convert(LayoutTensor.of(x.detach(), "csr"), AtLeast(1.0), "bitmask").to_dense().tolist() == [[5.0, 6.0, 7.0, 8.0]]


def test_the_derivative_follows_the_selections_and_not_the_zeros() -> None:
    x = torch.tensor([[0.0, 1.0, -3.0, 0.5]], requires_grad=True)
    for form, want in (
        (Format(layout="csr"), [3.0, 3.0, 3.0, 3.0]),  # a zero that stays has its derivative
        (Format(external=AtLeast(2.0), layout="csr"), [0.0, 3.0, 3.0, 0.0]),
        (Format(inline=AtLeast(2.0), temporary="bitmask", layout="csr"), [0.0, 3.0, 3.0, 0.0]),
    ):
        x.grad = None
        with when_missing("silent"):
            form.call(torch.mul, (x, 3.0)).to_dense().sum().backward()
        assert x.grad.tolist() == [want]

    @selects(AtLeast, "dense", "csr")
    def large(selection: AtLeast, gradient: Tensor) -> LayoutTensor:
        return LayoutTensor.of(torch.where(selection.mask(gradient), gradient * 10, 0), "csr")

    x.grad = None
    Format(layout="csr").call(torch.mul, (x, 3.0), gradient=Format(external=AtLeast(0.5), layout="csr")).to_dense().sum().backward()
    assert x.grad.eq(30).all()
    with pytest.raises(BadInput, match=r"torch\.max, which returns a max"):
        Format().call(torch.max, (x, 1))


# -- formats on a model


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


KEYS = ("0.weight", "2.weight")
FORM = WeightFormat(Largest(pattern=NMG(2, 4, 1)), "n_m_g")
TRAIN = "10 SGD steps on a converted MLP keep the pattern and match a masked dense twin to 1e-5"
Convert = Callable[[nn.Module, torch.optim.Optimizer], object]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(10):
        x = normal(16, 8, seed=step)
        yield x, x[:, :3].argmax(1)


def trains(convert_model: Convert) -> None:
    model, twin = mlp(), mlp()
    masks = {key: Largest(pattern=NMG(2, 4, 1)).mask(twin.get_parameter(key)) for key in KEYS}
    ways = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if net is model:
            convert_model(net, optimizer)
        for x, y in batches():
            with torch.no_grad():
                for key in KEYS if net is twin else ():
                    net.get_parameter(key).mul_(masks[key])
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            for key in KEYS if net is twin else ():
                net.get_parameter(key).mul_(masks[key])
        ways.append(dict(net.named_parameters()))
    for name, p in ways[1].items():
        torch.testing.assert_close(ways[0][name], p, rtol=0, atol=1e-5)
    assert all(torch.equal(ways[0][key] != 0, masks[key]) for key in KEYS)


@check("sten", TRAIN, kind="method")
def test_training() -> None:
    with when_missing("raise"):
        trains(lambda model, optimizer: set_formats(model, dict.fromkeys(KEYS, FORM), optimizer))


@check("sten", TRAIN, kind="twin")
def test_training_twin() -> None:
    def once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:  # zeros at the start, none kept
        for key in KEYS:
            model.get_parameter(key).data *= FORM.initial.mask(model.get_parameter(key).data)

    with pytest.raises(AssertionError):
        trains(once)


def test_a_pattern_may_be_chosen_anew_after_each_step() -> None:
    model = mlp()
    anew = WeightFormat(Largest(pattern=NM(1, 4)), "n_m", after_step=Largest(pattern=NM(1, 4)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    set_formats(model, {"0.weight": anew}, optimizer)
    patterns = []
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = model[0].weight.detach().clone()
        assert bool(model[0].weight.grad[before == 0].any())  # what is zero may come back
        optimizer.step()
        patterns.append(model[0].weight.detach() != 0)
        assert bool((patterns[-1].view(12, 2, 4).sum(-1) == 1).all())
    assert not torch.equal(patterns[0], patterns[-1])


def test_state_dicts_copies_export_autocast_and_a_foreign_sparsifier() -> None:
    model = set_formats(mlp(), {"0.weight": FORM})
    x = normal(5, 8)
    y = model(x)
    mask = model[0].weight.detach() != 0
    assert NMG(2, 4, 1).holds(mask) and set(model.state_dict()) - set(mlp().state_dict()) == {"0.rarefy_weight.mask"}
    other = set_formats(mlp(), {"0.weight": WeightFormat(layout="n_m_g")})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    follow(twin, optimizer)
    twin(x).sum().backward()
    optimizer.step()
    assert torch.equal(twin[0].weight != 0, mask) and torch.equal(model(x), y) and not torch.equal(twin(x), y)
    dense = mlp()
    dense[0].weight.data.mul_(mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, want = model(x), dense(x)
    assert half.dtype == torch.bfloat16 and torch.equal(half, want)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), dense(x))
        assert torch.equal(set_formats(mlp(), {"0.weight": WeightFormat(layout="bitmask")})(x), mlp()(x))
    half.float().square().sum().backward()
    want.float().square().sum().backward()
    assert torch.equal(model[0].bias.grad, dense[0].bias.grad) and torch.equal(model[0].weight.grad, dense[0].weight.grad)
    with exported(model) as plain:
        assert type(plain[0]) is nn.Linear and torch.equal(plain(x), y)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    rarefy.Sparsifier(model, rarefy.Phase("dense"), sites=["2.weight"]).attach(sgd)  # its step refreshes every view
    sgd.step()
    assert torch.equal(model[0].weight != 0, mask)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_scaled_gradients_keep_the_pattern_and_a_skipped_step_changes_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    set_formats(model, {"0.weight": FORM}, optimizer)
    mask, scaler = model[0].weight.detach() != 0, torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(normal(4, 8)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight != 0, mask) and torch.equal(model[0].weight, before) == (factor != 1.0)


def test_a_weight_is_laid_down_again_when_it_changes_and_only_its_own_optimizer_is_followed() -> None:
    model = mlp()
    other = torch.optim.SGD(model[4].parameters(), lr=0.1)
    set_formats(model, {"0.weight": FORM}, other)
    x = normal(3, 8)
    with torch.no_grad():
        y = model(x)
        assert model[0].rarefy_weight.stored(model[0].weight) is model[0].rarefy_weight.stored(model[0].weight)
        model[0].weight.add_(1.0)
        assert not torch.equal(model(x), y)
    other.step()
    assert bool((model[0].weight != 0).all())


def test_other_hosts_see_the_same_values_and_patterns_run_along_inputs() -> None:
    torch.manual_seed(0)
    conv = set_formats(nn.Sequential(nn.Conv2d(4, 6, 3)), {"0.weight": WeightFormat(Largest(pattern=NM(2, 4)), "csr", after_step=Largest(pattern=NM(1, 4)))})
    mask = conv[0].weight != 0
    assert bool((mask.permute(0, 2, 3, 1).sum(-1) == 2).all())
    x = normal(1, 4, 5, 5)
    assert len(told(lambda: conv(x))) == 1
    with when_missing("silent"):
        assert torch.equal(conv(x), F.conv2d(x, conv[0].weight, conv[0].bias))
    sgd = torch.optim.SGD(conv.parameters(), lr=0.1)
    follow(conv, sgd)
    sgd.step()
    assert bool(((conv[0].weight != 0).permute(0, 2, 3, 1).sum(-1) == 1).all())
    gru = set_formats(nn.GRU(4, 3), {"weight_ih_l0": WeightFormat(Largest(0.5), "csr")})
    plain = nn.GRU(4, 3)
    plain.load_state_dict({key: value for key, value in gru.state_dict().items() if "rarefy" not in key})
    assert torch.equal(gru(normal(2, 1, 4))[0], plain(normal(2, 1, 4))[0])


def test_gradients_and_outputs_have_formats_of_their_own() -> None:
    model, twin = mlp(), mlp()
    quarter = Format(external=Largest(0.25), layout="csr")
    half = OutputFormat(Format(external=Largest(0.5), layout="bitmask"))
    set_formats(model, {"0.weight": WeightFormat(gradient=quarter), "1:output": half, "3:output": OutputFormat(half.stored, gradient=Format())})
    x = normal(5, 8)
    with when_missing("silent"):
        out = model(x)
        out.sum().backward()
    h = twin[1](twin[0](x))
    h = h * Largest(0.5).mask(h)
    g = twin[3](twin[2](h))
    g = g + (g * Largest(0.5).mask(g) - g).detach()
    want = twin[4](g)
    want.sum().backward()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(model[2].weight.grad, twin[2].weight.grad)
    dense = twin[0].weight.grad
    torch.testing.assert_close(model[0].weight.grad, dense * Largest(0.25).mask(dense))
    with pytest.raises(Refused, match="cannot hold it"):
        gated(model)["1:output"].settings()


def test_the_class_of_a_module_is_its_operator() -> None:
    model = set_formats(nn.Sequential(nn.ReLU()), {"0:output": OutputFormat(Format(inline=AtLeast(1.0)))})
    x = torch.tensor([[0.5, 2.0]])
    messages = told(lambda: [model(x), model(x)])
    assert len(messages) == 1 and "@implements(torch.nn.modules.activation.ReLU, 'dense', keep=AtLeast, into='dense')" in messages[0]
    assert model(x).tolist() == [[0.0, 2.0]]
    implements(nn.ReLU, "dense", keep=AtLeast)(lambda selection, host, x: x * 10 if type(host)._rarefy_base is nn.ReLU else x)
    assert model(x).tolist() == [[5.0, 20.0]]


def test_what_cannot_be_set_is_one_sentence_and_sets_nothing() -> None:
    model = mlp()
    good = {"0.weight": FORM}
    for name, form, message in (
        ("9.weight", FORM, "a parameter of the model"),
        ("1", OutputFormat(), "is for PATH:output"),
        ("9:output", OutputFormat(), "is for PATH:output"),
        ("4.weight", WeightFormat(layout="zip"), "known are bitmask"),
        ("4.bias", WeightFormat(Largest(pattern=NM(2, 4))), "needs an input axis"),
    ):
        with pytest.raises(BadInput, match=message):
            set_formats(model, {**good, name: form})
        assert type(model[0]) is nn.Linear and bool((model[0].weight != 0).all())
    set_formats(model, good)
    with pytest.raises(Refused, match="one view"):
        set_formats(model, good)


# -- n:m:g

GROUPED = "n of every m, and each of the C(m, n) patterns exactly g times in a group and chunk"
FORMS = ((2, 4, 1), (2, 4, 3), (1, 4, 2), (1, 2, 5), (3, 6, 1))


def obeys(pattern_of: Callable[[int, int, int], Pattern]) -> None:
    for n, m, g in FORMS:
        kinds = list(itertools.combinations(range(m), n))
        rows = 2 * len(kinds) * g
        mask = pattern_of(n, m, g).mask(normal(rows + 3, 3 * m).abs(), 0)
        for chunk in range(3):
            found = [tuple(i for i in range(m) if mask[row, chunk * m + i]) for row in range(rows + 3)]
            for group in range(2):
                inside = found[group * len(kinds) * g : (group + 1) * len(kinds) * g]
                assert all(inside.count(kind) == g for kind in kinds)
            assert all(len(each) == n and found[rows:].count(each) <= g for each in found[rows:])


@check("sten", GROUPED, kind="method")
def test_grouped() -> None:
    obeys(NMG)
    mask = NMG(2, 4, 2).mask(normal(24, 8).abs(), 0)
    assert NMG(2, 4, 2).holds(mask) and NMG(2, 4, 4).holds(mask) and not NMG(2, 4, 1).holds(mask)
    mask[0, :4] = torch.tensor([True, False, False, False])
    assert not NMG(2, 4, 4).holds(mask)


@check("sten", GROUPED, kind="twin")
def test_grouped_twin() -> None:
    with pytest.raises(AssertionError):
        obeys(lambda n, m, g: NM(n, m))


MAGNITUDE = "kept magnitude: n:m >= n:m:g > patterns dealt at random, and it does not fall along multiples of g"


def keeps_much(pattern_of: Callable[[int, int, int], Pattern]) -> None:
    w = normal(48, 64).abs()
    kept = [float((w * pattern_of(2, 4, g).mask(w, 0)).sum() / w.sum()) for g in (1, 2, 4, 8)]
    assert 0.5 * 1.05 < kept[0] <= kept[1] <= kept[2] <= kept[3] <= float((w * NM(2, 4).mask(w, 0)).sum() / w.sum())  # at random half is kept


class Dealt(NMG):
    """The twin: every row takes the next pattern, whatever it is worth."""

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return super().mask(torch.ones_like(scores), count)


@check("sten", MAGNITUDE, kind="method")
def test_magnitude() -> None:
    keeps_much(NMG)


@check("sten", MAGNITUDE, kind="twin")
def test_magnitude_twin() -> None:
    with pytest.raises(AssertionError):
        keeps_much(Dealt)


OPTIMUM = "greedy and swaps keep at least 99 % of what the optimal assignment keeps, never more, and no swap of two rows gains"


@check("sten", OPTIMUM, kind="oracle")
def test_close_to_the_optimum_of_scipy() -> None:
    solve = pytest.importorskip("scipy.optimize").linear_sum_assignment
    for n, m, g in FORMS:
        kinds = list(itertools.combinations(range(m), n))
        w = normal(len(kinds) * g, 8 * m, seed=g).abs().double()
        mask, best = NMG(n, m, g).mask(w, 0), 0.0
        for chunk, taken in zip(w.split(m, 1), mask.split(m, 1), strict=True):
            worth = torch.stack([chunk[:, list(kind)].sum(1) for kind in kinds for _ in range(g)], 1).numpy()
            best += worth[solve(worth, maximize=True)].sum()
            swapped = (chunk[:, None] * taken[None]).sum(-1)  # what each row would keep by the pattern of each other one
            assert float((swapped + swapped.t() - swapped.diag()[:, None] - swapped.diag()).max()) <= 1e-6
        assert 0.99 * best <= float((w * mask).sum()) <= best * (1 + 1e-12)


BYTES = "a packed n:m:g matrix, read by loops over its bytes, is the matrix; columns are not stored"


@check("sten", BYTES, kind="oracle")
def test_bytes() -> None:
    for n, m, g in ((2, 4, 2), (1, 4, 3), (1, 2, 1)):
        rows, columns = 2 * math.comb(m, n) * g - 1, 3 * m
        w = normal(rows, columns)
        w = w * NMG(n, m, g).mask(w.abs(), 0)
        part = NofMofG(groups=(m,), repeats=(g,))
        packed = part.pack(w)
        part.check(packed, (rows, columns), w.dtype, "w")
        data = bytes(packed.tolist())
        assert tuple(data[:4]) == (n, m, g, 0)
        size = math.comb(m, n) * g
        slots = 2 * size * 3
        start = 64 + -(-slots // 64) * 64
        assert len(data) == start + -(-slots * n * 4 // 64) * 64
        values = torch.frombuffer(bytearray(data[start : start + slots * n * 4]), dtype=torch.float32).tolist()
        kinds = door(n, m)
        back = torch.zeros(2 * size, columns)
        for slot in range(slots):
            group, chunk, place = slot // size // 3, slot // size % 3, slot % size
            for i, column in enumerate(kinds[place // g]):
                back[group * size + data[64 + slot], chunk * m + column] = values[slot * n + i]
        assert torch.equal(back[:rows], w) and not back[rows:].any()


def door(n: int, m: int) -> list[tuple[int, ...]]:
    """The revolving-door order, by search: each pattern differs from the one before in one position, the last one holds m - 1 and 0 .. n - 2."""
    orders = {(2, 4): ["01", "12", "02", "23", "13", "03"], (1, 4): ["0", "1", "2", "3"], (1, 2): ["0", "1"]}
    return [tuple(map(int, each)) for each in orders[n, m]]


def test_a_matrix_that_no_group_holds_is_stored_whole_and_broken_files_are_refused() -> None:
    part = NofMofG()
    w = normal(12, 8) * NM(2, 4).mask(normal(12, 8, seed=1).abs(), 0)
    w[:, :4] = torch.tensor([1.0, 2.0, 0.0, 0.0])  # one pattern, twelve times
    packed = part.pack(w)
    assert torch.equal(part.unpack(packed, (12, 8), w.dtype), w)
    crowded = torch.zeros(6, 4)
    crowded[:, 0], crowded[5, 1] = 1.0, 1.0  # of six patterns three hold position 0
    tight = NofMofG(groups=(4,), repeats=(1,))
    assert torch.equal(tight.unpack(tight.pack(crowded.repeat(1, 40)), (6, 160), w.dtype), crowded.repeat(1, 40))
    grouped = part.pack(w * 0 + NMG(2, 4, 2).mask(normal(12, 8).abs(), 0))
    twice = grouped.clone()
    twice[64] = twice[65]
    with pytest.raises(rarefy.RarefyError, match="each of its rows once"):
        part.check(twice, (12, 8), w.dtype, "w")
    big = NofMofG(groups=(4,), repeats=(64,))
    wide = normal(384, 4) * NMG(2, 4, 64).mask(normal(384, 4).abs(), 0)
    big.check(big.pack(wide), (384, 4), wide.dtype, "w")
    assert torch.equal(big.unpack(big.pack(wide), (384, 4), wide.dtype), wide) and big.pack(wide)[:4].tolist() == [2, 4, 64, 0]


def test_reaches_the_pattern_by_its_text() -> None:
    from rarefy.cli.names import recipe

    assert recipe("wanda", pattern="2:4:16").pattern == NMG(2, 4, 16) and recipe("wanda", pattern="2:4:16").pattern.text == "2:4:16"
    assert type(All().mask(torch.ones(1))) is Tensor
