"""Iterative magnitude pruning with rewinding of weights and of the learning rate, against a loop written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.discover import train_recipes
from rarefy.core.errors import BadInput
from rarefy.core.records import Phase, TrainRecipe
from rarefy.weights.actions import Remember, Rewind
from rarefy.weights.rewind import IMP, IMP_RATE, rounds
from rarefy.weights.sparsifier import Sparsifier
from tests.evidence import check
from tests.papers.at_start import DIGITS

DENSITY, STEPS = 0.4, 60  # five rounds of ten steps each after the first
SAME = "masks, weights, biases and learning rates equal a loop written by hand, bit for bit"


def by_hand(weights_go_back: bool) -> dict[str, Tensor]:
    """Train, prune the smallest of all layers together, go back to the early step, train again with a new optimizer."""
    count = math.ceil(math.log(DENSITY) / math.log(0.8))
    length = int(STEPS / (1 + 0.9 * count))
    early = length // 10
    model, clock = DIGITS.model(0), iter(range(STEPS))
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    kept: dict[str, Tensor] = {}

    def training(start: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for t in range(start, length):
            if t == early and not kept:
                kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
            optimizer.param_groups[0]["lr"] = 0.1 * (0.5 * (1 + math.cos(t * math.pi / length)))
            optimizer.zero_grad()
            DIGITS.loss(model, DIGITS.batch(0, next(clock))).backward()
            for name, w in weights.items():
                w.grad.mul_(masks[name])
            optimizer.step()
            with torch.no_grad():
                for name, w in weights.items():
                    w.mul_(masks[name])

    training(0)
    for k in range(1, count + 1):
        left = round(8832 * DENSITY ** (k / count))
        cut = torch.cat([w.detach().abs().flatten() for w in weights.values()]).sort(descending=True).values[left - 1]
        masks = {name: (w.detach().abs() >= cut).float() for name, w in weights.items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_((kept[name] if weights_go_back else p) * masks.get(name, torch.ones(())))
        training(early)
    return {name: p.detach() for name, p in model.named_parameters()}


def ours(recipe: TrainRecipe) -> dict[str, Tensor]:
    model = DIGITS.model(0)
    sp = Sparsifier(model, recipe.phases(DENSITY, STEPS), total=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    sp.attach(optimizer)
    for step in range(sum(p.until for p in sp.phases)):
        optimizer.zero_grad()
        sp.loss(DIGITS.loss(model, DIGITS.batch(0, step))).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def same(recipe: TrainRecipe, weights_go_back: bool) -> None:
    expected, found = by_hand(weights_go_back), ours(recipe)
    assert sum(int((v != 0).sum()) for v in found.values() if v.dim() == 2) == 3533
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@dataclass(frozen=True)
class Stays:
    """The twin: prunes and trains on; neither weights nor moments go back."""

    def __call__(self, sparsifier: Any) -> None: ...


def altered(recipe: TrainRecipe, change: Callable[[Phase], Phase]) -> TrainRecipe:
    return replace(recipe, phases=lambda density, steps: tuple(change(p) for p in recipe.phases(density, steps)))


def _stays(phase: Phase) -> Phase:
    return replace(phase, enter=(Stays(),)) if phase.name == "retrain" else phase


def _fine_tunes(phase: Phase) -> Phase:
    """The twin: trains on at the rate that the first training ended with."""
    return replace(phase, rate=None) if phase.name == "retrain" else phase


@check("imp", SAME, kind="method")
def test_weights_go_back() -> None:
    pytest.importorskip("sklearn")
    same(IMP, weights_go_back=True)


@check("imp", SAME, kind="twin")
@pytest.mark.parametrize("change", [_stays, _fine_tunes])
def test_without_going_back(change: Callable[[Phase], Phase]) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        same(altered(IMP, change), weights_go_back=True)


@check("imp-rate", SAME, kind="method")
def test_the_rate_goes_back() -> None:
    pytest.importorskip("sklearn")
    same(IMP_RATE, weights_go_back=False)


@check("imp-rate", SAME, kind="twin")
def test_without_the_rate() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        same(altered(IMP_RATE, _fine_tunes), weights_go_back=False)


def test_rounds_and_refusals() -> None:
    assert [rounds(d) for d in (1.0, 0.8, 0.79, 0.512, 0.1)] == [0, 1, 2, 3, 11]
    assert {"imp", "imp-rate"} <= set(train_recipes())
    with pytest.raises(BadInput, match="need at least one step each"):
        IMP.phases(0.01, 10)
    with pytest.raises(BadInput, match="remembered are none"):
        Sparsifier(nn.Linear(2, 2), Phase(enter=(Rewind(),)))


@pytest.mark.parametrize("steps", [60, 180, 198, 211])
def test_every_round_fits_in_the_steps(steps: int) -> None:
    phases = IMP.phases(0.01, steps)
    assert len([p for p in phases if p.name == "prune"]) == rounds(0.01)
    assert steps - rounds(0.01) - 1 <= sum(p.until for p in phases) <= steps


def test_what_is_remembered_checkpoints() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    sp = Sparsifier(model, (Phase(until=1, enter=(Remember(),)), Phase(enter=(Rewind(),))), total=4)
    other = nn.Linear(3, 2)
    resumed = Sparsifier(other, (Phase(until=1), Phase(enter=(Rewind(),))), total=4)
    resumed.load_state_dict(sp.state_dict())
    resumed.attach(torch.optim.SGD(other.parameters(), 0.1)).optimizer.step()
    assert torch.equal(other.weight, before)
