"""Global magnitude pruning with a minimum count.

Measured here: digits MLP 64-256-64-10 with the middle layer scaled by 1e-3, 99% pruned and fine-tuned. Without a floor
that layer is empty and accuracy stays at chance (.10). The card's floor of 8 only starts a recovery (.21, .17 for two
seeds: 8 weights in the middle are few paths); a floor of 64 gives .64 and .48.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core.exact import topk_mask
from rarefy.core.records import Units
from rarefy.weights.allocations.global_scores import GLOBAL_MP, Global
from tests.evidence import check
from tests.papers.digits import mlp, select, train

Counts = Callable[..., dict[str, int]]


def floors_hold(counts: Counts) -> None:
    """Ties everywhere (scores are small integers), one tiny layer: totals and floors stay exact, and what a floor costs comes from the weakest of the others."""
    g = torch.Generator().manual_seed(0)
    scores = {"a": torch.randint(1, 9, (20, 10), generator=g).float(), "b": torch.randint(1, 9, (10, 10), generator=g).float(), "c": torch.rand(8, 5, generator=g) * 1e-3}
    for floor in (0, 1, 7):
        units = [Units(name, tuple(s.shape), (), floor=floor) for name, s in scores.items()]
        for budget in (21, 100, 250, 340):
            found = counts(units, budget, scores=scores)
            assert sum(found.values()) == budget
            assert min(found.values()) >= floor
            assert found == lifted(scores, budget, floor)


def lifted(scores: Mapping[str, Tensor], budget: int, floor: int) -> dict[str, int]:
    """One sort; units that fell below the floor are set to it, and the others are sorted again for what is left, until none falls below."""
    low: set[str] = set()
    while True:
        every = sorted((-float(s), place, name) for place, name in enumerate(scores) for s in scores[name].flatten() if name not in low)
        won = [name for *_, name in every[: budget - floor * len(low)]]
        counts = {name: floor if name in low else won.count(name) for name in scores}
        below = {name for name in scores if counts[name] < floor}
        if not below:
            return counts
        low |= below


def threshold_without_rebalancing(units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """>= keeps every tie, and floors are added on top."""
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[budget - 1]
    return {u.name: max(int((scores[u.name] >= threshold).sum()), u.floor) for u in units}


def floors_on_top(units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Every unit gets its floor, and one sort of all scores deals out the rest."""
    rest = Global().counts([Units(u.name, u.shape, ()) for u in units], budget - sum(u.floor for u in units), scores=scores)
    return {u.name: u.floor + rest[u.name] for u in units}


@check("global-mp", "total and floors exact, ties included", kind="method")
def test_floors() -> None:
    floors_hold(Global().counts)


@check("global-mp", "total and floors exact, ties included", kind="twin")
@pytest.mark.parametrize("twin", [threshold_without_rebalancing, floors_on_top])
def test_floors_twin(twin: Counts) -> None:
    with pytest.raises(AssertionError):
        floors_hold(twin)


@check("global-mp", "without floors it is one sort of all magnitudes", kind="method")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.integers(0, 60))
def test_equals_a_sort(seed: int, budget: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = {name: torch.randint(0, 5, shape, generator=g).float() for name, shape in {"a": (5, 6), "b": (2, 10), "c": (10, 1)}.items()}
    counts = Global().counts([Units(n, tuple(s.shape), ()) for n, s in scores.items()], budget, scores=scores)
    whole = sorted(range(60), key=lambda i: (-float(torch.cat([s.flatten() for s in scores.values()])[i]), i))[:budget]
    masks = torch.cat([topk_mask(s, counts[n]).flatten() for n, s in scores.items()])
    assert masks.nonzero().flatten().tolist() == sorted(whole)


@check("global-mp", "a floor saves a small layer from collapse", kind="method")
def test_collapse() -> None:
    model = mlp(64, 256, 64, 10)
    train(model, {})
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    plain, floored = copy.deepcopy(model), copy.deepcopy(model)
    empty, saved = select(plain, GLOBAL_MP, 0.01), select(floored, GLOBAL_MP, 0.01, floor=64)
    assert int(empty["2.weight"].sum()) == 0
    assert int(saved["2.weight"].sum()) == 64
    assert train(plain, empty) < 0.2
    assert train(floored, saved, 300) > 0.4
