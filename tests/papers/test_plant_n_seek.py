"""Planted tickets: exact before training, found or missed by pruning with a known truth.

Measured here: see `test_where_methods_stand`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import TrainRecipe
from rarefy.tasks import planted
from rarefy.tasks.planted import BOUNDS, Layers, Planted, plant
from rarefy.weights.criteria.synflow import SYNFLOW
from rarefy.weights.rewind import IMP
from rarefy.weights.schedules.static import STATIC
from rarefy.weights.train import train
from tests.evidence import check
from tests.test_cli import run

EXACT = "masked to the ticket, a planted network computes the target before training: every target, three depths, width 50"
Plant = Callable[[Layers, Layers], tuple[Layers, Tensor]]


def by_hand(target: str, x: Tensor, knots: int) -> Tensor:
    """The targets without networks: functions at the knots, lines between."""
    if target == "relu":
        return x.clamp(min=0)
    at = torch.linspace(-1, 1, knots, dtype=torch.float64)
    left = (torch.bucketize(x, at, right=True) - 1).clamp(0, knots - 2)

    def lines(f: Callable[[Tensor], Tensor]) -> Tensor:
        low, high = at[left], at[left + 1]
        return f(low) + (f(high) - f(low)) * (x - low) / (high - low)

    if target == "circle":
        r = lines(torch.square).sum(1, keepdim=True)
        slopes, starts = [5, 10, 20, 40], [0.0]
        for j, bound in enumerate(BOUNDS):
            starts.append(starts[-1] - (slopes[j + 1] - slopes[j]) * bound)
        return r * torch.tensor(slopes, dtype=torch.float64) + torch.tensor(starts, dtype=torch.float64)
    t = [lambda v: 5 * math.pi + 3 * math.pi * v]
    parts = [lambda v: t[0](v) * t[0](v).cos(), lambda v: t[0](v) * t[0](v).sin(), lambda v: t[0](v)]
    return torch.cat([lines(f) for f in parts], 1) / (8 * math.pi)


def exact_holds(write: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "plant", write)
    for target, inputs in (("relu", 1), ("circle", 2), ("helix", 1)):
        x = torch.rand(200, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
        for layers in (2, 3, 5):
            model = Planted(target, layers=layers).model(0).double()
            with torch.no_grad():
                for name, mask in model.truth().items():
                    assert 0 < int(mask.sum()) < 400 or name.endswith("bias")
                    model.get_parameter(name).mul_(mask)
            want = by_hand(target, x, 10)
            assert (model(x) - want).abs().max() < 1e-4 * max(1.0, float(want.abs().max())), (target, layers)


def without_scale(ticket: Layers, source: Layers) -> tuple[Layers, Tensor]:
    """The twin: a neuron's scale is not carried on to the next layer."""
    masks = []
    for layer, host in zip(ticket, source, strict=True):
        (mask,), scale = plant([layer], [host])
        masks.append(mask)
    return masks, scale


@check("plant-n-seek", EXACT, kind="method")
def test_exact_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_holds(plant, monkeypatch)


@check("plant-n-seek", EXACT, kind="twin")
def test_without_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        exact_holds(without_scale, monkeypatch)


ORDER = "on a planted circle at the ticket's density: the ticket untrained, then SynFlow, then chance, and no method finds the ticket"
CIRCLE, SEEDS = Planted("circle", layers=3), range(2)


def ticket_alone(seed: int) -> dict[str, float]:
    model = CIRCLE.model(seed)
    with torch.no_grad():
        for name, mask in model.truth().items():
            model.get_parameter(name).mul_(mask)
    return CIRCLE.evaluate(model)


def mean(figure: str, results: list[dict[str, float]]) -> float:
    return sum(r[figure] for r in results) / len(results)


def order_holds(write: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "plant", write)
    oracle = [ticket_alone(seed) for seed in SEEDS]
    assert all(r["recall"] == r["precision"] == 1.0 for r in oracle)
    whole = [CIRCLE.evaluate(CIRCLE.model(seed)) for seed in SEEDS]
    assert all(
        r["recall"] == 1.0 and r["precision"] < 0.2 and r["precision"] == pytest.approx(r["ticket"], rel=1e-2) for r in whole
    )  # all is kept but a few exact zeros of the draw
    assert mean("accuracy", oracle) > 0.95  # what ten knots leave of 1

    def pruned(recipe: TrainRecipe) -> list[dict[str, float]]:
        return [train(CIRCLE, recipe, density=oracle[0]["ticket"], steps=200, seed=seed)["metric"] for seed in SEEDS]

    synflow, magnitude, chance = pruned(SYNFLOW), pruned(IMP), pruned(STATIC)
    assert mean("accuracy", oracle) - 0.2 > mean("accuracy", synflow) > mean("accuracy", chance) + 0.1
    assert mean("accuracy", chance) < 0.5  # the share of the largest class is 0.48
    assert max(mean(figure, results) for figure in ("recall", "precision") for results in (synflow, magnitude, chance)) < 0.2


@check("plant-n-seek", ORDER, kind="method")
def test_where_methods_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen here, means of seeds 0-2 after 200 steps: ticket 0.961, SynFlow 0.536, random 0.349; recalls 0.06 and 0.15.

    The card expects multishot magnitude above chance: it has 0.128, because it empties whole layers (recall 0.02).
    """
    order_holds(plant, monkeypatch)


@check("plant-n-seek", ORDER, kind="twin")
def test_where_they_stand_without_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        order_holds(without_scale, monkeypatch)


def test_a_user_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "planted:target='helix',layers=2", "--recipe", "snip", "--density", "0.1", "--steps", "5", "--json")
    assert code == 0, err
    assert set(json.loads(out)["metric"]) == {"error", "recall", "precision", "ticket"}


def test_neurons_are_distinct_and_the_source_is_otherwise_random() -> None:
    task = Planted("circle", layers=4)
    model, truth = task.model(0), task.model(0).truth()
    used = [int(truth[f"layers.{depth}.weight"].any(1).sum()) for depth in range(4)]
    assert used == [2, 20, 1, 4]
    assert all(bool((model.get_parameter(name) != 0)[~mask].all()) for name, mask in truth.items() if name.endswith("weight"))
    with pytest.raises(BadInput, match="layers of 20 neurons"):
        Planted("circle", width=12).model(0)
    with pytest.raises(BadInput, match="relu, circle, helix"):
        Planted("square").model(0)
