"""Every allocation x pattern x solver x kind of module: exact, or refused with a BadInput."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core import discover
from rarefy.core.collect import Stats, collect_all, collectable
from rarefy.core.errors import BadInput
from rarefy.core.records import Pruned, Site, Units
from rarefy.core.roles import Allocation, Pattern, Solver
from rarefy.testing.allocations import asked
from rarefy.testing.solvers import excess
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.criteria.wanda import Wanda
from rarefy.weights.patterns.n_m import NM
from rarefy.weights.patterns.unstructured import PerMatrix
from rarefy.weights.sites import find_sites
from rarefy.weights.solvers.keep import Keep
from rarefy.weights.solvers.sparsegpt import SparseGPT
from rarefy.weights.statistics.input import Hessian, InputNorm


class Conv1D(nn.Module):
    """As in transformers: the weight is [I, O]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Fused(nn.Module):
    """Three experts of gate, up and down in 3-D tensors; called as transformers calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 4))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, hidden: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for row, experts in enumerate(index.tolist()):
            for e in experts:
                out[row] += self.down_proj[e] @ self._apply_gate(self.gate_up_proj[e] @ hidden[row])
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear": (lambda: nn.Linear(8, 12), lambda: torch.randn(20, 8)),
    "tied linears": (Tied, lambda: torch.randn(20, 8)),
    "transposed": (lambda: Conv1D(12, 8), lambda: torch.randn(20, 8)),
    "embedding": (lambda: nn.Embedding(9, 8), lambda: torch.tensor([[1, 2, 2]])),
    "experts": (Fused, lambda: {"hidden": torch.randn(20, 4), "index": torch.randint(0, 3, (20, 2))}),
    "conv1d": (lambda: nn.Conv1d(4, 8, 5), lambda: torch.randn(2, 4, 12)),
    "conv1d circular": (lambda: nn.Conv1d(4, 8, 5, padding=2, padding_mode="circular"), lambda: torch.randn(2, 4, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: torch.randn(2, 4, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 8, (3, 1), padding="same", dilation=2), lambda: torch.randn(2, 4, 5, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: torch.randn(2, 8, 5, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: torch.randn(2, 8, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (1, 2, 2)), lambda: torch.randn(1, 4, 3, 4, 4)),
}
WITHOUT_INPUTS = {"embedding", "conv2d grouped", "conv2d depthwise"}
ALLOCATIONS = [part for kind in discover.methods(Allocation).values() for part in kind.examples()]
PATTERNS = [part for kind in discover.methods(Pattern).values() for part in kind.examples()]
SOLVERS: list[Solver] = [Keep(Magnitude()), Keep(Wanda()), SparseGPT()]


@cache
def built(kind: str) -> tuple[nn.Module, list[Site]]:
    torch.manual_seed(0)
    model = KINDS[kind][0]()
    return model, find_sites(model, ["*"])


@cache
def statistics(kind: str) -> Stats | None:
    """What the model's sites see, or None where there is no such thing and the collector says so."""
    model, sites = built(kind)
    assert all(collectable(model.get_submodule(s.module)) != (kind in WITHOUT_INPUTS) for s in sites)
    if kind not in WITHOUT_INPUTS:
        torch.manual_seed(1)
        return collect_all(model, [KINDS[kind][1]()], sites, [InputNorm(), Hessian()])
    with pytest.raises(BadInput, match=r"site weight: .*use a criterion of the weight alone"):
        collect_all(model, [KINDS[kind][1]()], sites, [InputNorm()])
    return None


def views(kind: str) -> dict[str, Tensor]:
    model, sites = built(kind)
    return {site.name: site.read(dict(model.named_parameters())[site.key].detach()) for site in sites}


@cache
def solved(solver: Solver, pattern: Pattern, kind: str, budget: tuple[tuple[str, int], ...]) -> dict[str, Pruned]:
    stats = statistics(kind) or {}
    return solver.solve(views(kind), dict(budget), stats={name: stats[name] for name in solver.needs}, pattern=pattern)


def budget_of(allocation: Allocation, pattern: Pattern, kind: str) -> dict[str, int] | None:
    """Counts that add up exactly and that the pattern reaches, or None where the pattern refuses a shape and its mask does too."""
    _, sites = built(kind)
    units, total = [Units(site.name, site.shape, ()) for site in sites], sum(site.numel for site in sites)
    counts = allocation.counts(units, total // 2, **asked(allocation, units))
    assert sum(counts.values()) == total // 2
    reached = {}
    for site in sites:
        try:
            reached[site.name] = pattern.nearest(site.shape, counts[site.name])
        except BadInput:
            with pytest.raises(BadInput, match=r"shape .*needs"):
                pattern.mask(views(kind)[site.name], counts[site.name])
            return None
    return reached


def exact(solver: Solver, pattern: Pattern, kind: str, budget: dict[str, int]) -> None:
    """Counts and zeros exact in the tensors that the modules own; never worse than the mask alone; Keep changes nothing that stays."""
    model, sites = built(kind)
    pruned, weights, hessian = solved(solver, pattern, kind, tuple(sorted(budget.items()))), views(kind), (statistics(kind) or {}).get("hessian", {})
    tensors = {key: p.detach().clone() for key, p in model.named_parameters()}
    for site in sites:
        found = pruned[site.name]
        assert tuple(found.mask.shape) == site.shape and int(found.mask.sum()) == budget[site.name]
        site.write(tensors[site.key], found.weight)
        assert not site.read(tensors[site.key])[~found.mask].any() and torch.isfinite(found.weight).all()
        assert pattern.mask(found.mask.float(), budget[site.name]).equal(found.mask)
        if isinstance(solver, Keep):
            assert torch.equal(found.weight[found.mask], weights[site.name][found.mask])
        if site.name in hessian:
            assert excess(weights[site.name], found, hessian[site.name]) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_exact_or_refused(pattern: Pattern, kind: str) -> None:
    for allocation in ALLOCATIONS:
        budget = budget_of(allocation, pattern, kind)
        if budget is None:
            continue
        for solver in SOLVERS:
            if statistics(kind) is not None or not solver.needs:
                exact(solver, pattern, kind, budget)


def test_the_product_has_every_outcome() -> None:
    """Both refusals occur and do not swallow the rest; Wanda and SparseGPT are run, and choose otherwise than magnitude."""
    outcomes = {kind: [budget_of(ALLOCATIONS[0], pattern, kind) is not None for pattern in PATTERNS] for kind in KINDS}
    assert all(any(reached) for reached in outcomes.values()) and not all(outcomes["conv2d depthwise"])
    assert {kind for kind in KINDS if statistics(kind) is None} == WITHOUT_INPUTS
    for kind in sorted(KINDS.keys() - WITHOUT_INPUTS):
        budget = budget_of(ALLOCATIONS[0], PerMatrix(), kind)
        assert budget is not None
        masks = [[solved(s, PerMatrix(), kind, tuple(sorted(budget.items())))[name].mask for name in budget] for s in SOLVERS]
        assert any(not torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True)), kind


class OneTooMany(Keep):
    """Keeps one more than asked."""

    name = "one-too-many"

    def solve(self, weights: Any, budget: Any, **given: Any) -> dict[str, Pruned]:
        return super().solve(weights, {name: count + 1 for name, count in budget.items()}, **given)


class Leaks(Keep):
    """Leaves a little where it prunes."""

    name = "leaks"

    def solve(self, weights: Any, budget: Any, **given: Any) -> dict[str, Pruned]:
        return {name: Pruned(torch.where(p.mask, p.weight, 1e-3), p.mask) for name, p in super().solve(weights, budget, **given).items()}


class Strays(Keep):
    """Forgets the pattern: the same number, anywhere."""

    name = "strays"

    def solve(self, weights: Any, budget: Any, *, stats: Any, pattern: Pattern, **given: Any) -> dict[str, Pruned]:
        return super().solve(weights, budget, stats=stats, pattern=PerMatrix(), **given)


class Overshoots(SparseGPT):
    """Makes up for what was pruned twice over."""

    name = "overshoots"

    def solve(self, weights: Any, budget: Any, **given: Any) -> dict[str, Pruned]:
        return {name: Pruned(2 * p.weight, p.mask) for name, p in super().solve(weights, budget, **given).items()}


BROKEN = [(OneTooMany(Magnitude()), PerMatrix()), (Leaks(Magnitude()), NM(2, 4)), (Strays(Magnitude()), NM(2, 4)), (Overshoots(), NM(2, 4))]


@pytest.mark.parametrize("kind", ["linear", "conv2d same", "conv3d", "experts", "tied linears"])
@pytest.mark.parametrize(("solver", "pattern"), BROKEN, ids=lambda part: part.name)
def test_a_broken_solver_is_seen(solver: Solver, pattern: Pattern, kind: str) -> None:
    budget = budget_of(ALLOCATIONS[0], pattern, kind)
    assert budget is not None
    with pytest.raises(AssertionError):
        exact(solver, pattern, kind, budget)


def test_a_refusal_without_its_reason_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Pattern, shape: Any, count: int) -> int:
        raise BadInput("no", "no")

    monkeypatch.setattr(PerMatrix, "nearest", refuse)
    with pytest.raises(pytest.fail.Exception):
        budget_of(ALLOCATIONS[0], PerMatrix(), "linear")
