"""GraSP: the product of Hessian and gradient, its sign, and the norm that the gradient keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.weights.criteria.grasp import GRASP, GradientSignal
from rarefy.weights.statistics.hessian_gradient import HessianGradient
from tests.evidence import check
from tests.papers.at_start import DIGITS, batches, begun, measured

Rate = Callable[[Tensor, Tensor], Tensor]
CHANGE = "the score is minus half the change of the squared gradient norm when a weight shrinks, sign included"
PRODUCT = "the product equals an explicit Hessian times the gradient, logits divided by the temperature"


def tiny() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3) for _ in range(2)]


def mean_loss(model: Callable[[Tensor], Tensor], data: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([F.cross_entropy(model(x), y) for x, y in data]).mean()


def product(model: nn.Sequential, data: list[tuple[Tensor, Tensor]], temperature: float) -> dict[str, Tensor]:
    from rarefy.weights.sites import find_sites

    found = HessianGradient(temperature).collect(model, find_sites(model, include=("*",)), data, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    return {key: value.double() for key, value in found.items()}


@check("grasp", PRODUCT, kind="oracle")
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_against_an_explicit_hessian(temperature: float) -> None:
    model, data = tiny()
    keys, shapes = ["0.weight", "2.weight"], [(4, 3), (3, 4)]

    def loss(flat: Tensor) -> Tensor:
        parts = {k: p.view(s) for k, p, s in zip(keys, flat.split([12, 12]), shapes, strict=True)}
        return mean_loss(lambda x: torch.func.functional_call(model, parts, (x,)) / temperature, data)

    flat = torch.cat([model.get_parameter(k).detach().flatten() for k in keys])
    hessian = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    found = product(model, data, temperature)
    assert torch.allclose(torch.cat([found[k].flatten() for k in keys]), hessian @ gradient, rtol=1e-5, atol=1e-8)


def change_holds(rate: Rate) -> None:
    """Central differences of g^T g in a factor on every weight."""
    model, data = tiny()
    weights = [model.get_parameter(k) for k in ("0.weight", "2.weight")]
    found = product(model, data, 1.0)
    for key, weight in zip(found, weights, strict=True):
        scores = rate(weight.detach(), found[key])
        for at in torch.cartesian_prod(torch.arange(weight.shape[0]), torch.arange(weight.shape[1])).tolist():
            value, ends = weight[tuple(at)].item(), []
            for factor in (1 - 1e-4, 1 + 1e-4):
                with torch.no_grad():
                    weight[tuple(at)] = factor * value
                ends.append(sum(float(g.square().sum()) for g in torch.autograd.grad(mean_loss(model, data), weights)))
            with torch.no_grad():
                weight[tuple(at)] = value
            shrunk = (ends[0] - ends[1]) / 2e-4  # what g^T g gains for a unit of shrinking, to first order
            assert abs(shrunk + 2 * float(scores[tuple(at)])) < 1e-6


@check("grasp", CHANGE, kind="method")
def test_the_score_is_the_change() -> None:
    change_holds(lambda weight, product: GradientSignal().scores(weight, hessian_gradient=product).double())


@check("grasp", CHANGE, kind="twin")
def test_a_modulus_fails() -> None:
    with pytest.raises(AssertionError):
        change_holds(lambda weight, product: (weight * product).abs())


SIGNAL = "a net pruned to half keeps the gradient's norm, which the same scores the other way up lose"


def norm_after(sign: float) -> float:
    """The squared gradient norm over the kept weights after one-shot pruning, relative to the dense net's."""
    model = DIGITS.model(0)
    loss = torch.stack([DIGITS.loss(model, b) for b in batches()]).mean()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    dense = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(weights.values())))
    masks = begun(GRASP, 0.5, model).support.masks if sign > 0 else upside_down(model)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    loss = torch.stack([DIGITS.loss(model, b) for b in batches()]).mean()
    kept = zip(torch.autograd.grad(loss, list(weights.values())), masks.values(), strict=True)
    return sum(float((g * m).square().sum()) for g, m in kept) / dense


def upside_down(model: nn.Module) -> dict[str, Tensor]:
    """The twin: removes what the gradient needs most, as reading S(-theta) with the wrong sign does."""
    product = measured("hessian_gradient", model, batches())
    scores = {name: -GradientSignal().scores(model.get_parameter(name), hessian_gradient=p) for name, p in product.items()}
    cut = torch.cat([s.flatten() for s in scores.values()]).median()
    return {name: s > cut for name, s in scores.items()}


def signal_holds(sign: float) -> None:
    assert norm_after(sign) > 1.0


@check("grasp", SIGNAL, kind="method")
def test_the_gradient_keeps_its_norm() -> None:
    pytest.importorskip("sklearn")
    signal_holds(1.0)


@check("grasp", SIGNAL, kind="twin")
def test_the_other_sign_loses_it() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        signal_holds(-1.0)
