"""LoRS: what backward keeps, which gradient it gives, and where the adapter starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.attach import attach_view
from rarefy.core.roles import View
from rarefy.surgery.adapters.lors import LeanLowRank, Lors
from tests.evidence import check

O, I, R, N = 24, 16, 3, 40
Make = Callable[[Tensor, Tensor, float], View]


def tensors(dtype: torch.dtype = torch.float64, density: float = 0.5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in {"w": (O, I), "a": (O, R), "b": (R, I), "x": (N, I), "g": (N, O)}.items()}
    return {**made, "w": made["w"] * (torch.rand(O, I, generator=g) < density)}


def lean(a: Tensor, b: Tensor, scale: float) -> View:
    return LeanLowRank(a, b, scale)


def by_autograd(a: Tensor, b: Tensor, scale: float) -> View:
    """The twin: the masked product, differentiated by autograd."""
    view = LeanLowRank(a, b, scale)
    view.op = lambda fn, x, w, bias: fn(x, view(w), bias)
    return view


def dense_product(a: Tensor, b: Tensor, scale: float) -> View:
    """The twin: the product without the mask."""
    view = LeanLowRank(a, b, scale)
    view.op = lambda fn, x, w, bias: fn(x, w + scale * view.a @ view.b, bias)
    return view


def hosted(make: Make, t: dict[str, Tensor], scale: float = 0.7) -> tuple[nn.Linear, View]:
    host = nn.Linear(I, O, dtype=t["w"].dtype)
    host.weight = nn.Parameter(t["w"].clone(), requires_grad=False)
    view = make(t["a"].clone(), t["b"].clone(), scale)
    attach_view(host, "weight", view)
    return host, view


FORWARD = "the forward is the masked reference's to 1e-6, and an exported 2:4 weight is 2:4"


def forward_holds(make: Make) -> None:
    t = tensors()
    t["w"] = t["w"] * (torch.arange(I) % 4 < 2)
    host, view = hosted(make, t)
    wanted = t["x"] @ ((t["w"] + 0.7 * t["a"] @ t["b"]) * (t["w"] != 0)).T + host.bias
    assert torch.allclose(host(t["x"]), wanted, atol=1e-6)
    assert torch.equal(view.export(t["w"]).weight != 0, t["w"] != 0)


@check("lors", FORWARD, kind="method")
def test_forward() -> None:
    forward_holds(lean)


@check("lors", FORWARD, kind="twin")
def test_forward_twin() -> None:
    with pytest.raises(AssertionError):
        forward_holds(dense_product)


MEMORY = "backward keeps no tensor of the weight's size but the weight"


def kept(make: Make) -> list[Tensor]:
    t = tensors(torch.float32)
    host, _ = hosted(make, t)
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: found.append(s) or s, lambda s: s):
        y = host(t["x"].requires_grad_(True))
    found += [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)] if isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction) else []
    y.sum().backward()
    raw = host._parameters["weight"]
    return [s for s in found if s.numel() >= O * I and s.data_ptr() != raw.data_ptr() and s.shape != t["x"].shape]


@check("lors", MEMORY, kind="method")
def test_memory() -> None:
    assert kept(lean) == []


@check("lors", MEMORY, kind="twin")
def test_memory_twin() -> None:
    assert len(kept(by_autograd)) >= 1


GRADIENT = "dA = g^T (x B^T) and dB = (g A)^T x, the exact gradient where W is dense and s = 1"


def gradients(make: Make, t: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    host, view = hosted(make, t, scale)
    x = t["x"].clone().requires_grad_(True)
    (host(x) * t["g"]).sum().backward()
    return {"a": view.a.grad, "b": view.b.grad, "x": x.grad, "bias": host.bias.grad}


def gradient_holds(make: Make) -> None:
    for density, scale in ((0.5, 0.7), (1.0, 1.0)):
        t = tensors(density=density)
        found = gradients(make, t, scale)
        assert torch.allclose(found["a"], t["g"].T @ (t["x"] @ t["b"].T))
        assert torch.allclose(found["b"], (t["g"] @ t["a"]).T @ t["x"])


@check("lors", GRADIENT, kind="method")
def test_gradient() -> None:
    gradient_holds(lean)


@check("lors", GRADIENT, kind="twin")
def test_gradient_twin() -> None:
    with pytest.raises(AssertionError):
        gradient_holds(by_autograd)


@check("lors", "exact mode is autograd of the masked reference, and so are the gradients of x and bias in both", kind="oracle")
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_exact(density: float) -> None:
    t = tensors(density=density)
    a, b, x = (t[k].clone().requires_grad_(True) for k in "abx")
    wanted = x @ ((t["w"] + 0.7 * a @ b) * (t["w"] != 0)).T
    (wanted * t["g"]).sum().backward()
    exact = gradients(lambda a, b, s: LeanLowRank(a, b, s, exact=True), t, 0.7)
    for name, tensor in (("a", a), ("b", b), ("x", x)):
        assert torch.allclose(exact[name], tensor.grad), name
    through = gradients(lean, t, 0.7)
    assert torch.allclose(through["x"], x.grad) and torch.allclose(through["bias"], t["g"].sum(0))
    if density == 1.0:
        assert torch.allclose(0.7 * through["a"], a.grad) and torch.allclose(0.7 * through["b"], b.grad)


def test_a_weight_that_learns_too_gets_its_masked_gradient() -> None:
    t = tensors()
    w = t["w"].clone().requires_grad_(True)
    (LeanLowRank(t["a"], t["b"], 0.7).op(nn.functional.linear, t["x"], w, None) * t["g"]).sum().backward()
    assert torch.allclose(w.grad, (t["g"].T @ t["x"]) * (t["w"] != 0))


START = "unchanged at the start, and the first gradient of A holds the most energy that rank r can"


def start_holds(view: Callable[[Tensor, Tensor], LeanLowRank]) -> None:
    t = tensors()
    weight, gradient = t["w"].float(), (t["g"].T @ t["x"]).float()
    made = view(weight, gradient)
    assert torch.equal(made(weight), weight)
    energy = (gradient @ made.b.detach().T).square().sum()
    assert torch.allclose(made.b @ made.b.T, torch.eye(R), atol=1e-5)
    assert float(energy) == pytest.approx(float(torch.linalg.svdvals(gradient)[:R].square().sum()), rel=1e-4)


def from_gradient(weight: Tensor, gradient: Tensor) -> LeanLowRank:
    return Lors(rank=R).view(weight, generator=torch.Generator().manual_seed(0), gradient=gradient)


def from_chance(weight: Tensor, gradient: Tensor) -> LeanLowRank:
    """The twin: B is any orthonormal frame."""
    return Lors(rank=R).view(weight, generator=torch.Generator().manual_seed(0), gradient=torch.randn(O, I))


@check("lors", START, kind="method")
def test_start() -> None:
    start_holds(from_gradient)


@check("lors", START, kind="twin")
def test_start_twin() -> None:
    with pytest.raises(AssertionError):
        start_holds(from_chance)


def factor_holds(make: type[Lors]) -> None:
    weight, gradient = tensors()["w"].float(), torch.randn(O, I)
    view = make(rank=4, alpha=8.0, gamma=2.0).view(weight, generator=torch.Generator(), gradient=gradient)
    assert view.scale == 4.0 and torch.allclose(view.b @ view.b.T, torch.eye(4) / 4, atol=1e-5)
    assert make(rank=64).view(weight, generator=torch.Generator(), gradient=gradient).b.shape == (I, I)


class OverTheRank(Lors):
    """The twin: alpha / r, as in plain LoRA."""

    def view(self, weight: Tensor, *, generator: torch.Generator, gradient: Tensor) -> LeanLowRank:
        made = super().view(weight, generator=generator, gradient=gradient)
        made.scale = self.alpha / len(made.b)
        return made


class Unshrunk(Lors):
    """The twin: gamma is left out."""

    def view(self, weight: Tensor, *, generator: torch.Generator, gradient: Tensor) -> LeanLowRank:
        return Lors(rank=self.rank, alpha=self.alpha).view(weight, generator=generator, gradient=gradient)


FACTOR = "the factor is alpha over the root of r, and gamma shrinks the start"


@check("lors", FACTOR, kind="method")
def test_factor() -> None:
    factor_holds(Lors)


@check("lors", FACTOR, kind="twin")
@pytest.mark.parametrize("twin", [OverTheRank, Unshrunk])
def test_factor_twin(twin: type[Lors]) -> None:
    with pytest.raises(AssertionError):
        factor_holds(twin)
