"""OWL's allocation: the worked rescaling of its code, per block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from rarefy.core.records import Units
from rarefy.weights.allocations.outlier_share import OutlierShare
from tests.evidence import check

Counts = Callable[..., dict[str, int]]


def blocks_hold(counts: Counts) -> None:
    """Three blocks of two matrices with 0, 1 and 2 outliers of 100: offsets are -.08, 0, +.08 of every matrix."""
    units = [Units(f"layers.{i}.{m}.weight", (5, 10), ()) for i in range(3) for m in "ab"]
    scores = {u.name: torch.ones(5, 10) for u in units}
    scores["layers.1.a.weight"][0, 0] = 100.0
    scores["layers.2.a.weight"][0, :2] = 100.0
    found = counts(units, 150, scores=scores)
    assert list(found.values()) == [21, 21, 25, 25, 29, 29]


def per_matrix(units: Sequence[Units], budget: int, *, scores: Mapping[str, Tensor]) -> dict[str, int]:
    alone = [Units(u.name.replace("layers.", "layer").replace(".", "_"), u.shape, ()) for u in units]
    found = OutlierShare().counts(alone, budget, scores={a.name: scores[u.name] for a, u in zip(alone, units, strict=True)})
    return {u.name: found[a.name] for a, u in zip(alone, units, strict=True)}


@check("owl", "block densities equal a hand-worked case", kind="method")
def test_blocks() -> None:
    blocks_hold(OutlierShare().counts)


@check("owl", "block densities equal a hand-worked case", kind="twin")
def test_blocks_twin() -> None:
    with pytest.raises(AssertionError):
        blocks_hold(per_matrix)
