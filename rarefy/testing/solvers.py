"""The contract of a Solver: zeros and counts exact, never worse than the mask alone on the layer's squared error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Pruned
from rarefy.core.roles import Pattern, Solver
from rarefy.testing import figures
from rarefy.testing.contract import contract
from rarefy.weights.patterns import parse_pattern

PATTERNS = ("matrix", "row", "2:4")


def solve(part: Solver, weight: Tensor, pattern: Pattern, given: Mapping[str, Tensor] | None = None) -> Pruned:
    """What a solver makes of half a weight's entries, with the statistics `given` for it."""
    stats = figures.statistics(part.needs, weight.float()) if given is None else given
    budget = {"site": pattern.nearest(weight.shape, weight.numel() // 2)}
    asked = {name: {"site": stats[name]} for name in part.needs}
    return part.solve({"site": weight}, budget, stats=asked, pattern=pattern, generator=figures.seeded())["site"]


def excess(weight: Tensor, found: Pruned, hessian_CC: Tensor) -> float:
    """By how much the squared error exceeds that of the mask alone, relative to the signal tr(W H W^T)."""

    def energy(change: Tensor) -> float:
        flat = change.reshape(weight.shape[0], -1).double()
        return float(((flat @ hessian_CC.double()) * flat).sum())

    return (energy(found.weight - weight) - energy(weight * ~found.mask)) / (energy(weight) or 1.0)


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
            _exact(part, weight, pattern, solve(part, weight, pattern))


@contract(Solver)
def the_input_stays_as_it_was(part: Solver) -> None:
    weight = figures.weight(6, 8)
    before = weight.clone()
    solve(part, weight, parse_pattern("matrix"))
    assert torch.equal(weight, before), f"{part!r} changed the weight that it was given"


def _rows() -> dict[str, Tensor]:
    """Input rows [R, 8] of a site, named by what is odd about their second moment."""
    plain = figures.rows(figures.weight(6, 8))
    dead, all_dead = plain.clone(), torch.zeros_like(plain)
    dead[:, [0, 3, 7]] = 0.0
    alike = plain[:, :1].expand(-1, 8) * torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0])
    return {"plain": plain, "fewer rows than columns": plain[:3], "rank one": alike, "dead inputs": dead, "no live input": all_dead, "tiny": plain * 1e-12, "large": plain * 1e12}


@contract(Solver)
def never_worse_than_the_mask_alone(part: Solver) -> None:
    weight = figures.weight(6, 8)
    for kind, rows in _rows().items():
        given = figures.statistics([*part.needs, "hessian"], weight, seen=rows)
        for text in PATTERNS:
            pattern = parse_pattern(text)
            found = solve(part, weight, pattern, given)
            _exact(part, weight, pattern, found)
            worse = excess(weight, found, given["hessian"])
            assert worse <= 1e-4, f"{part!r} with {text} on a second moment ({kind}) is worse than its own mask alone, by {worse:.2g} of the signal"


@contract(Solver)
def dead_inputs_go_first_where_inputs_matter(part: Solver) -> None:
    if not any(name in ("hessian", "input_norm") for name in part.needs):
        return
    weight, rows = figures.weight(6, 8), _rows()["dead inputs"]
    found = solve(part, weight, parse_pattern("matrix"), figures.statistics(part.needs, weight, seen=rows))
    kept = found.mask[:, [0, 3, 7]]
    assert not bool(kept.any()), f"{part!r} keeps {int(kept.sum())} weights of dead inputs while weights of live ones go"


@contract(Solver)
def an_indefinite_second_moment_is_survived_or_refused(part: Solver) -> None:
    if "hessian" not in part.needs:
        return
    weight = figures.weight(6, 8)
    for factor in (0.5, 1.5):
        given = figures.statistics(part.needs, weight)
        values, vectors = torch.linalg.eigh(given["hessian"])
        given["hessian"] = given["hessian"] - factor * values[-1] * vectors[:, :2] @ vectors[:, :2].t()
        for text in PATTERNS:
            pattern = parse_pattern(text)
            try:
                found = solve(part, weight, pattern, given)
            except BadInput:
                continue
            except Exception as error:
                raise AssertionError(f"{part!r} meets an indefinite second moment with {type(error).__name__}; a BadInput says what is wrong") from error
            _exact(part, weight, pattern, found)
