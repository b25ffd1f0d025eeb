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
    """Ties everywhere (scores are small integers), one tiny layer: totals and floors stay exact."""
    g = torch.Generator().manual_seed(0)
    scores = {"a": torch.randint(1, 9, (20, 10), generator=g).float(), "b": torch.randint(1, 9, (10, 10), generator=g).float(), "c": torch.rand(8, 5, generator=g) * 1e-3}
    for floor in (0, 1, 7):
        units = [Units(name, tuple(s.shape), (), floor=floor) for name, s in scores.items()]
        for budget in (21, 100, 250, 340):
            found = counts(units, budget, scores=scores)
            assert sum(found.values()) == budget
            assert min(found.values()) >= floor


def threshold_without_rebalancing(units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """>= keeps every tie, and floors are added on top."""
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[budget - 1]
    return {u.name: max(int((scores[u.name] >= threshold).sum()), u.floor) for u in units}


@check("global-mp", "total and floors exact, ties included", kind="method")
def test_floors() -> None:
    floors_hold(Global().counts)


@check("global-mp", "total and floors exact, ties included", kind="twin")
def test_floors_twin() -> None:
    with pytest.raises(AssertionError):
        floors_hold(threshold_without_rebalancing)


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
