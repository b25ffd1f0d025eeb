"""Every discovered part of every role with a contract keeps it, plug-ins included."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rarefy.testing as contracts
from rarefy.core import discover
from rarefy.core.errors import BadInput
from rarefy.core.records import Units
from rarefy.core.roles import (
    Affinity,
    Allocation,
    Balance,
    Bank,
    Choice,
    Criterion,
    Layer,
    Mixture,
    ModelStatistic,
    Overflow,
    Pattern,
    Policy,
    Rewiring,
    Role,
    Schedule,
    Solver,
    Statistic,
    Trigger,
    View,
)
from rarefy.testing import figures
from rarefy.testing.allocations import asked
from rarefy.testing.contract import _contracts
from rarefy.testing.solvers import excess, solve
from rarefy.weights.patterns import parse_pattern

MODULES = (View, Affinity, Bank)  # roles whose parts are modules without a name
ROLES = [role for role in _contracts if role not in (Role, *MODULES)]
PARTS = [pytest.param(part, id=f"{role.__name__}-{name}") for role in ROLES for name, part in discover.methods(role).items()]
FOUND = {
    role: [v for m in discover.modules() for v in vars(m).values() if inspect.isclass(v) and issubclass(v, role) and v.__module__ == m.__name__ and not v.__name__.startswith("_")]
    for role in MODULES
}
PARTS += [pytest.param(kind, id=f"{role.__name__}-{kind.__name__}") for role, kinds in FOUND.items() for kind in kinds]


@pytest.mark.parametrize("part", PARTS)
def test_part_keeps_its_contract(part: type) -> None:
    assert contracts.check(part) > 0


def test_every_role_with_a_contract_is_run_over_parts() -> None:
    assert {Statistic, ModelStatistic, Criterion, Allocation, Pattern, Solver, Schedule, Rewiring, Trigger, Policy, Choice, Mixture, Layer, Overflow, Balance} <= {*ROLES} and {
        *MODULES
    } <= {*_contracts}
    assert all(FOUND.values()) and all(discover.methods(role) for role in ROLES)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5), share=st.floats(0, 1))
def test_every_allocation_conserves_its_budget(sizes: list[tuple[int, int, float, float]], share: float) -> None:
    units = [Units(f"layers.{i}.w", (a, b), (), floor=int(a * b * f * 0.5), cap=a * b - int(a * b * c * 0.5)) for i, (a, b, f, c) in enumerate(sizes)]
    low, high = sum(u.floor for u in units), sum(u.limit for u in units)
    budget = low + round((high - low) * share)
    for kind in discover.methods(Allocation).values():
        for part in kind.examples():
            counts = part.counts(units, budget, **asked(part, units))
            assert sum(counts.values()) == budget
            assert all(u.floor <= counts[u.name] <= u.limit for u in units)


SOLVERS = [part for kind in discover.methods(Solver).values() for part in kind.examples() if {"gradient", "gradient_square"}.isdisjoint(part.needs)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 12])),
    rows=st.integers(1, 20),
    dead=st.integers(0, 4),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    text=st.sampled_from(["matrix", "row", "2:4"]),
)
def test_no_solver_is_worse_than_its_mask_alone(seed: int, shape: tuple[int, int], rows: int, dead: int, scale: float, text: str) -> None:
    weight = figures.weight(*shape, seed=seed)
    seen = figures.rows(weight, seed=seed + 1, count=rows) * scale
    seen[:, :dead] = 0.0
    for part in SOLVERS:
        given_ = figures.statistics([*part.needs, "hessian"], weight, seen=seen)
        found = solve(part, weight, parse_pattern(text), given_)
        assert not found.weight[~found.mask].any() and torch.isfinite(found.weight).all()
        assert excess(weight, found, given_["hessian"]) <= 1e-4, part


PLUGIN = """
from dataclasses import dataclass
from rarefy.core.roles import Criterion

@dataclass(frozen=True)
class Cube(Criterion):
    name = "cube"

    def scores(self, weight, *, generator=None):
        return {body}
"""


def test_a_plugin_is_discovered_and_checked(tmp_path: Path) -> None:
    good, bad = tmp_path / "cube.py", tmp_path / "cube_bad.py"
    good.write_text(PLUGIN.replace("{body}", "weight.float().abs() ** 3"))
    bad.write_text(PLUGIN.replace("{body}", "weight").replace("cube", "cube-bad").replace("Cube", "CubeBad"))
    before = list(discover._plugins)
    try:
        for file in (good, bad):
            discover.load_plugin(file)
        found = discover.methods(Criterion)
        assert contracts.check(found["cube"]) > 0
        with pytest.raises(AssertionError):
            contracts.check(found["cube-bad"])
    finally:
        discover._plugins[:] = before


def test_only_parts_with_a_contract_are_checked() -> None:
    with pytest.raises(BadInput, match="contract"):
        contracts.check(3)


@pytest.mark.parametrize("text", ["5:4", "0:4", "block:0x1", "diagonal", "2:4:0", "2:4:8:1", "8:16:2", ""])
def test_unknown_patterns_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_pattern(text)
    assert parse_pattern("rows") != parse_pattern("row")
