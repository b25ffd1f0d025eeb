"""Random pruning: exact layer ratios, and random masks catch up with width.

Measured here: digits, 10% kept, widths 32/64/128/256, two seeds: the gap to dense is about .35/.13/.03/.02.
At 5% kept and width 64, ERK .63/.59/.59 against uniform .47/.27/.34 (three seeds).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rarefy.core.records import Recipe, Units
from rarefy.core.roles import Criterion
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.random import RANDOM_PRUNING
from rarefy.weights.solvers.keep import Keep
from tests.evidence import check
from tests.papers.digits import mlp, select, train, weights

SEED = 1  # of the masks; the models are drawn from 0, and numbers from one stream would let the weights decide
CHANCE = "chance alone decides which weights stay, their number exact"
Counts = Callable[[Sequence[Units], int], dict[str, int]]

# Sums of dimensions 10, 30, 60 over 24, 200, 800 weights. A budget of 512 wants eps = 5.12: 51.2 of a's 24, so a is
# kept whole; the remaining 488 over 90 gives eps = 5.42: 162.67 and 325.33.
HAND = (Units("a", (6, 4), ()), Units("b", (20, 10), ()), Units("c", (40, 20), ()))


def ratios_hold(counts: Counts) -> None:
    assert counts(HAND, 512) == {"a": 24, "b": 163, "c": 325}
    kernel = (Units("conv", (4, 3, 3, 2), ()), Units("head", (10, 8), ()))
    assert counts(kernel, 30) == {"conv": 12, "head": 18}


def without_the_dense_loop(units: Sequence[Units], budget: int) -> dict[str, int]:
    eps = budget / sum(sum(u.shape) for u in units)
    return {u.name: min(round(eps * sum(u.shape)), u.numel) for u in units}


@check("random-pruning", "ERK counts equal a hand-worked case", kind="method")
def test_ratios() -> None:
    ratios_hold(RANDOM_PRUNING.allocation.counts)


@check("random-pruning", "ERK counts equal a hand-worked case", kind="twin")
def test_ratios_twin() -> None:
    with pytest.raises(AssertionError):
        ratios_hold(without_the_dense_loop)


def chance_decides(recipe: Recipe) -> None:
    """The same draw whatever the weights are, another draw from another seed, half of what stays among the larger half of a layer, each weight on its own."""
    model, other = mlp(64, 128, 128, 10), mlp(64, 128, 128, 10, seed=1)
    drawn, again, anew = select(model, recipe, 0.2, seed=2), select(other, recipe, 0.2, seed=2), select(model, recipe, 0.2, seed=3)
    assert sum(int(mask.sum()) for mask in drawn.values()) == round(0.2 * sum(mask.numel() for mask in drawn.values()))
    assert all(torch.equal(drawn[name], again[name]) for name in drawn), "it looks at the weights"
    for name, weight in weights(model).items():
        larger = weight.abs() > weight.abs().median()
        assert not torch.equal(drawn[name], anew[name])
        for mask in (drawn[name], anew[name]):
            assert abs(float((mask & larger).sum() / mask.sum()) - 0.5) < 0.06
            share = float(mask.float().mean())
            for one, next_to_it in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
                assert abs(float((one & next_to_it).float().mean()) - share**2) < 0.05, "neighbours are not drawn apart"


@dataclasses.dataclass(frozen=True)
class EveryFifth(Criterion):
    """Spread evenly, and never drawn."""

    name = "every-fifth"

    def scores(self, weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return (torch.arange(weight.numel()) * 0.2 % 1).view(weight.shape)


@dataclasses.dataclass(frozen=True)
class WholeRows(Criterion):
    """A draw for each row."""

    name = "whole-rows"

    def scores(self, weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(len(weight), 1, generator=generator).expand(weight.shape)


@check("random-pruning", CHANCE, kind="method")
def test_chance() -> None:
    chance_decides(RANDOM_PRUNING)


@check("random-pruning", CHANCE, kind="twin")
@pytest.mark.parametrize("twin", [Magnitude(), EveryFifth(), WholeRows()], ids=["magnitude", "never drawn", "whole rows"])
def test_chance_twin(twin: Criterion) -> None:
    with pytest.raises(AssertionError):
        chance_decides(dataclasses.replace(RANDOM_PRUNING, solver=Keep(twin)))


@check("random-pruning", "the gap to dense shrinks with width", kind="method")
def test_the_gap_shrinks_with_width() -> None:
    gaps = []
    for width in (32, 64, 128):
        dense, sparse = mlp(64, width, width, 10), mlp(64, width, width, 10)
        gaps.append(train(dense, {}) - train(sparse, select(sparse, RANDOM_PRUNING, 0.1, seed=SEED)))
    assert all(wide < narrow for narrow, wide in pairwise(gaps)), gaps


@check("random-pruning", "ERK beats uniform at 95%", kind="method")
def test_erk_beats_uniform() -> None:
    uniform = dataclasses.replace(RANDOM_PRUNING, allocation=Uniform())
    erk, flat = (train(model, select(model, recipe, 0.05, seed=SEED)) for recipe in (RANDOM_PRUNING, uniform) for model in [mlp(64, 64, 64, 10)])
    assert erk > flat, (erk, flat)
