"""The contract of a Solver: zeros and counts exact, never worse than the mask alone on the layer's squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.records import Pruned
from rarefy.core.roles import Pattern, Solver
from rarefy.testing import figures
from rarefy.testing.contract import contract
from rarefy.weights.patterns import parse_pattern

PATTERNS = ("matrix", "row", "2:4")


def _solve(part: Solver, weight: Tensor, pattern: Pattern, stats_of: Tensor | None = None) -> Pruned:
    stats = figures.statistics(part.needs, weight.float() if stats_of is None else stats_of)
    budget = {"site": pattern.nearest(weight.shape, weight.numel() // 2)}
    return part.solve({"site": weight}, budget, stats={name: {"site": value} for name, value in stats.items()}, pattern=pattern, generator=figures.seeded())["site"]


def _exact(part: Solver, weight: Tensor, pattern: Pattern, found: Pruned) -> None:
    count = pattern.nearest(weight.shape, weight.numel() // 2)
    assert found.weight.shape == weight.shape, f"{part!r}: {found.weight.dtype} {tuple(found.weight.shape)}"
    assert found.weight.dtype == weight.dtype, f"{part!r}: {found.weight.dtype} {tuple(found.weight.shape)}"
    assert found.mask.dtype == torch.bool, f"{part!r}: {int(found.mask.sum())} kept, {count} asked"
    assert int(found.mask.sum()) == count, f"{part!r}: {int(found.mask.sum())} kept, {count} asked"
    assert not bool(found.weight[~found.mask].any()), f"{part!r}: pruned places are not zero, or weights not finite"
    assert torch.isfinite(found.weight).all(), f"{part!r}: pruned places are not zero, or weights not finite"


@contract(Solver)
def zeros_and_counts_are_exact(part: Solver) -> None:
    for text in PATTERNS:
        pattern = parse_pattern(text)
        for weight in (figures.weight(6, 8), figures.weight(8, 6).t(), figures.weight(6, 8).bfloat16(), torch.zeros(6, 8)):
            _exact(part, weight, pattern, _solve(part, weight, pattern))


@contract(Solver)
def the_input_stays_as_it_was(part: Solver) -> None:
    weight = figures.weight(6, 8)
    before = weight.clone()
    _solve(part, weight, parse_pattern("matrix"))
    assert torch.equal(weight, before), f"{part!r} changed the weight that it was given"


@contract(Solver)
def never_worse_than_the_mask_alone(part: Solver) -> None:
    weight = figures.weight(6, 8)
    hessian = figures.statistic("hessian", weight)

    def error(change: Tensor) -> float:
        return float(((change @ hessian) * change).sum())

    for text in PATTERNS:
        found = _solve(part, weight, parse_pattern(text))
        assert error(found.weight - weight) <= error(weight * ~found.mask) * (1 + 1e-4), f"{part!r} with {text} is worse than its own mask alone"
