"""LAMP. Measured here: digits MLP 64-64-32-10, 2% kept, fine-tuned: LAMP .33/.28/.39, global .28/.16/.35 (three seeds)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Units
from rarefy.weights.allocations.global_scores import GLOBAL_MP
from rarefy.weights.allocations.lamp import LAMP, lamp_scores
from tests.evidence import check
from tests.papers.digits import mlp, select, train

Rescale = Callable[[Tensor], Tensor]


def _layers() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"a": torch.randn(20, 30, generator=g), "b": 1000 * torch.randn(10, 10, generator=g), "c": 1e-6 * torch.randn(5, 8, generator=g)}


def identity_holds(rescale: Rescale) -> None:
    """The score of a weight is its share of what is left when all smaller ones have gone."""
    for layer in _layers().values():
        flat = layer.flatten().double()
        brute = torch.stack([w**2 / (flat[flat.abs() >= w.abs()] ** 2).sum() for w in flat])
        assert torch.allclose(rescale(layer.abs()).flatten().double(), brute, rtol=1e-9)


def exclusive_suffix(scores: Tensor) -> Tensor:
    flat = scores.flatten().double()
    order = flat.argsort(descending=True)
    square = flat[order] ** 2
    return torch.empty_like(flat).scatter_(0, order, square / (square.cumsum(0) - square).clamp(min=1e-300))


@check("lamp", "the score is the relative distortion", kind="method")
def test_identity() -> None:
    identity_holds(lamp_scores)


@check("lamp", "the score is the relative distortion", kind="twin")
def test_identity_twin() -> None:
    with pytest.raises(AssertionError):
        identity_holds(exclusive_suffix)


@check("lamp", "selection by score equals counts plus magnitude", kind="method")
@pytest.mark.parametrize("budget", [1, 3, 40, 300, 739, 740])
def test_selection(budget: int) -> None:
    layers = {name: w.abs() for name, w in _layers().items()}
    units = [Units(name, tuple(w.shape), ()) for name, w in layers.items()]
    counts = LAMP.allocation.counts(units, budget, scores=layers)
    by_count = torch.cat([topk_mask(w, counts[name]).flatten() for name, w in layers.items()])
    by_score = topk_mask(torch.cat([lamp_scores(w).flatten() for w in layers.values()]), budget)
    assert torch.equal(by_count, by_score)
    assert counts == LAMP.allocation.counts(units, budget, scores={**layers, "a": 1000 * layers["a"]})
    assert budget < 3 or min(counts.values()) >= 1


@check("lamp", "at least as accurate as global magnitude at 98%", kind="method")
def test_accuracy() -> None:
    dense = mlp(64, 64, 32, 10)
    train(dense, {})
    lamp, plain = (train(model, select(model, recipe, 0.02), 100) for recipe in (LAMP, GLOBAL_MP) for model in [copy.deepcopy(dense)])
    assert lamp >= plain, (lamp, plain)
