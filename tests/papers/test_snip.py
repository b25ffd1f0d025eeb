"""SNIP: the sensitivity of a connection, one ranking over all layers, on data and before training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.weights.criteria.gradient_weight import GradientWeight
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.snip import SNIP
from rarefy.weights.train import train
from tests.evidence import check
from tests.papers.at_start import DIGITS, batches, begun, measured

Rate = Callable[[Tensor, Tensor], Tensor]
SENSITIVITY = "the score of a connection is the change of the loss when a factor on it moves from one, shared weights included"
KEPT = "the best of one ranking over all layers is kept, and nothing that reads a pixel which is always dark"


def sensitivity_holds(rate: Rate) -> None:
    """Against central differences of the loss in a factor on every connection, a convolution among them, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    data = [(torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3) for _ in range(2)]

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    gradients = measured("gradient", model, data, loss)
    for key, axes in (("0.weight", (0, 2, 3, 1)), ("3.weight", (0, 1))):
        weight = model.get_parameter(key)
        scores = rate(weight.detach().permute(axes), gradients[key])
        for place in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist():
            at, value = tuple(place), weight[tuple(place)].item()
            with torch.no_grad():
                ends = []
                for factor in (1 + 1e-4, 1 - 1e-4):
                    weight[at] = factor * value
                    ends.append(sum(float(loss(model, b)) for b in data) / 2)
                weight[at] = value
            assert abs(float(scores[tuple(place[a] for a in axes)]) - abs(ends[0] - ends[1]) / 2e-4) < 1e-6


@check("snip", SENSITIVITY, kind="oracle")
def test_sensitivity_equals_differences() -> None:
    sensitivity_holds(lambda weight, gradient: GradientWeight().scores(weight, gradient=gradient))


@check("snip", SENSITIVITY, kind="method")
def test_sensitivity() -> None:
    sensitivity_holds(lambda weight, gradient: GradientWeight().scores(weight, gradient=gradient))


@check("snip", SENSITIVITY, kind="twin")
def test_a_gradient_without_its_weight_fails() -> None:
    with pytest.raises(AssertionError):
        sensitivity_holds(lambda weight, gradient: gradient.abs())


def kept_holds(masks: dict[str, Tensor], budget: int) -> None:
    """By hand: the gradient of the mean loss over the same batches, one sort."""
    model = DIGITS.model(0)
    loss = torch.stack([DIGITS.loss(model, b) for b in batches()]).mean()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    scores = [(g * w).abs().flatten() for g, w in zip(torch.autograd.grad(loss, list(weights.values())), weights.values(), strict=True)]
    cut = torch.cat(scores).sort(descending=True).values[budget - 1]
    for name, score in zip(weights, scores, strict=True):
        assert torch.equal(masks[name].flatten() | ((score / cut - 1).abs() < 1e-4), (score >= cut) | ((score / cut - 1).abs() < 1e-4))
    assert sum(int(m.sum()) for m in masks.values()) == budget
    dark = torch.cat([x for x, _ in batches()]).max(0).values == 0
    assert bool(dark.any()) and not bool(masks["0.weight"][:, dark].any())


@check("snip", KEPT, kind="method")
def test_what_is_kept() -> None:
    pytest.importorskip("sklearn")
    kept_holds(begun(SNIP, 0.5, DIGITS.model(0)).support.masks, 4416)


@check("snip", KEPT, kind="twin")
def test_magnitudes_at_the_start_know_no_data() -> None:
    pytest.importorskip("sklearn")
    model = DIGITS.model(0)
    scores = {name: Magnitude().scores(p) for name, p in model.named_parameters() if p.dim() == 2}
    cut = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[4415]
    with pytest.raises(AssertionError):
        kept_holds({name: s >= cut for name, s in scores.items()}, 4416)


def test_the_same_seed_gives_the_same_record() -> None:
    pytest.importorskip("sklearn")
    first, again = (train(DIGITS, SNIP, density=0.1, steps=3, seed=1) for _ in range(2))
    assert first == again and first["density"] == pytest.approx(0.1, abs=1e-4)
