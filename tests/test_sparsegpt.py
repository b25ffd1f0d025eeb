"""SparseGPT: exact counts, exact zeros, and an error below mask-only, Wanda and magnitude on the same Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rarefy.core.roles import Pattern
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.wanda import Wanda
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.prune import relative_error
from rarefy.weights.solvers.keep import Keep
from rarefy.weights.solvers.sparsegpt import SparseGPT
from tests.evidence import check


def layer(seed: int, outputs: int = 24, inputs: int = 48, rows: int = 200) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g) / inputs**0.5 + torch.randn(1, inputs, generator=g)
    return torch.randn(outputs, inputs, generator=g), x.t() @ x


def solve(weight: Tensor, hessian: Tensor, count: int, pattern: Pattern) -> dict[str, tuple[Tensor, Tensor]]:
    stats = {"hessian": {"a": hessian}, "input_norm": {"a": hessian.diagonal().sqrt()}}
    out = {}
    for name, solver in {"sparsegpt": SparseGPT(), "wanda": Keep(Wanda()), "magnitude": Keep(Magnitude())}.items():
        found = solver.solve({"a": weight}, {"a": count}, stats={n: stats[n] for n in solver.needs}, pattern=pattern)["a"]
        out[name] = (found.weight, found.mask)
    return out


def holds(weight: Tensor, new: Tensor, mask: Tensor, hessian: Tensor) -> None:
    """The update pays: strictly below the same mask without it (the defect: the update is computed and thrown away)."""
    assert relative_error(weight, new, hessian) < 0.98 * relative_error(weight, torch.where(mask, weight, 0.0), hessian)


@check("sparsegpt", "the update lowers the error of its own mask", "method")
@pytest.mark.parametrize("form", ["matrix", "row", "2:4", "block:4x1", "columns"])
@pytest.mark.parametrize("seed", range(3))
def test_below_mask_only_wanda_and_magnitude_with_exact_counts(seed: int, form: str) -> None:
    weight, hessian = layer(seed)
    pattern = parse_pattern(form)
    count = pattern.nearest(weight.shape, weight.numel() // 2)
    found = solve(weight, hessian, count, pattern)
    new, mask = found["sparsegpt"]
    assert int(mask.sum()) == count and bool((new[~mask] == 0).all())
    holds(weight, new, mask, hessian)
    for peer in ("wanda", "magnitude"):
        assert relative_error(weight, new, hessian) <= relative_error(weight, found[peer][0], hessian)


@check("sparsegpt", "the update lowers the error of its own mask", "twin")
def test_a_solver_that_throws_its_update_away_is_caught() -> None:
    weight, hessian = layer(0)
    mask = solve(weight, hessian, weight.numel() // 2, parse_pattern("matrix"))["sparsegpt"][1]
    with pytest.raises(AssertionError):
        holds(weight, torch.where(mask, weight, 0.0), mask, hessian)


def test_never_below_the_exact_least_squares_of_its_mask() -> None:
    weight, hessian = layer(3, outputs=4, inputs=12)
    new, mask = solve(weight, hessian, 24, parse_pattern("row"))["sparsegpt"]
    best = torch.zeros_like(weight)
    for o in range(4):
        kept = mask[o].nonzero()[:, 0]
        best[o, kept] = torch.linalg.solve(hessian[kept][:, kept].double(), (hessian[kept] @ weight[o]).double()).float()
    assert relative_error(weight, best, hessian) - 1e-6 <= relative_error(weight, new, hessian) <= 1.6 * relative_error(weight, best, hessian)


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 130)])
def test_odd_shapes_and_a_hessian_of_low_rank(shape: tuple[int, int]) -> None:
    weight, hessian = layer(1, *shape, rows=3)
    count = weight.numel() // 2
    new, mask = solve(weight, hessian, count, parse_pattern("matrix"))["sparsegpt"]
    assert int(mask.sum()) == count and bool(torch.isfinite(new).all()) and bool((new[~mask] == 0).all())
    assert relative_error(weight, new, hessian) <= relative_error(weight, torch.where(mask, weight, 0.0), hessian) + 1e-6


def test_dead_inputs_and_zero_weights() -> None:
    weight, hessian = layer(2)
    hessian[5], hessian[:, 5] = 0, 0
    new, mask = solve(weight, hessian, weight.numel() // 2, parse_pattern("matrix"))["sparsegpt"]
    assert int(mask.sum()) == weight.numel() // 2 and bool(torch.isfinite(new).all())
    zero, mask = solve(torch.zeros_like(weight), hessian, 10, parse_pattern("matrix"))["sparsegpt"]
    assert not zero.any() and int(mask.sum()) == 10
