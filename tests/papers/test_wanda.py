"""Wanda: the mask that plain loops over calibration rows choose, row by row."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from rarefy.core.records import Recipe
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.wanda import WANDA
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.prune import prune
from rarefy.weights.solvers.keep import Keep
from tests.evidence import check

NAME = "the weights kept are those of largest |w| times input norm within each output row, streamed over batches"


def holds(recipe: Recipe) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 6)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 6)[:, None])  # rows of very different size
    batches = [torch.randn(7, 10) * torch.logspace(1, -1, 10) for _ in range(3)]
    weight, rows = layer.weight.tolist(), torch.cat(batches).tolist()
    norms = [math.sqrt(sum(row[j] ** 2 for row in rows)) for j in range(10)]
    kept = {(i, j) for i in range(6) for j in sorted(range(10), key=lambda j: -abs(weight[i][j]) * norms[j])[:4]}
    prune(layer, batches, recipe, density=0.4)
    assert {(i, j) for i, j in layer.weight.nonzero().tolist()} == kept
    assert all(layer.weight[i, j] == weight[i][j] for i, j in kept), "what is kept keeps its value"


@check("wanda", NAME, kind="method")
def test_wanda() -> None:
    holds(WANDA)


@check("wanda", NAME, kind="twin")
@pytest.mark.parametrize(
    "twin", [dataclasses.replace(WANDA, pattern=PerMatrix()), dataclasses.replace(WANDA, solver=Keep(Magnitude()))], ids=["one pool for all rows", "no inputs"]
)
def test_without_rows_or_without_inputs_it_fails(twin: Recipe) -> None:
    with pytest.raises(AssertionError):
        holds(twin)
