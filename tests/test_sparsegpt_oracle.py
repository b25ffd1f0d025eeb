"""SparseGPT against brute force that shares no code with it, and what it says where a factorisation is in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Pruned
from rarefy.core.roles import Pattern
from rarefy.weights.patterns.n_m import NM
from rarefy.weights.patterns.structured import Block, Rows
from rarefy.weights.patterns.unstructured import PerMatrix, PerRow
from rarefy.weights.solvers.sparsegpt import SparseGPT


@dataclass(frozen=True)
class Given(Pattern):
    """Answers with one mask, whatever the scores."""

    kept: Tensor

    def mask(self, scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
        return self.kept

    def nearest(self, shape: Sequence[int], count: int) -> int:
        return int(self.kept.sum())


def problem(seed: int, rows: int, columns: int, tokens: int = 200) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g).double() @ (torch.eye(columns).double() + torch.randn(columns, columns, generator=g).double() / 3)
    return torch.randn(rows, columns, generator=g).double(), x.t() @ x


def errors(weight: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    return (((weight - new) @ hessian) * (weight - new)).sum(1)


def solve(weight: Tensor, hessian: Tensor, count: int, pattern: Pattern, solver: SparseGPT | None = None, bound: Tensor | None = None) -> Pruned:
    bounds = None if bound is None else {"a": bound}
    return (solver or SparseGPT()).solve({"a": weight}, {"a": count}, stats={"hessian": {"a": hessian}}, pattern=pattern, bound=bounds)["a"]


def one_at_a_time(weight_C: Tensor, mask_C: Tensor, hessian: Tensor) -> Tensor:
    """Left to right: a pruned column goes to zero and those after it move by the least squares that makes up for it."""
    w = weight_C.clone()
    for j in (~mask_C).nonzero()[:, 0].tolist():
        if j + 1 < len(w):
            w[j + 1 :] += torch.linalg.solve(hessian[j + 1 :, j + 1 :], hessian[j + 1 :, j]) * w[j]
        w[j] = 0
    return w


@pytest.mark.parametrize("seed", range(4))
def test_equals_one_column_at_a_time_and_a_row_that_got_worse_keeps_its_values(seed: int) -> None:
    weight, hessian = problem(seed, 12, 9)
    mask = torch.rand(12, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    out = solve(weight, hessian, int(mask.sum()), Given(mask), SparseGPT(damp=0.0))
    swept = torch.stack([one_at_a_time(w, m, hessian) for w, m in zip(weight, mask, strict=True)])
    worse = errors(weight, swept, hessian) > errors(weight, weight * mask, hessian) * (1 + 1e-12)
    assert torch.allclose(out.weight, torch.where(worse[:, None], weight * mask, swept), atol=1e-9)
    assert out.notes["rows_not_updated"] == int(worse.sum()) < 12
    assert not torch.allclose(out.weight, weight * mask, atol=1e-3)


def test_least_squares_is_the_lower_bound_and_is_reached_where_all_kept_columns_come_later() -> None:
    weight, hessian = problem(4, 4, 7)
    gaps = {}
    for removed in combinations(range(7), 2):
        mask = torch.ones(4, 7, dtype=torch.bool)
        mask[:, list(removed)] = False
        kept = mask[0].nonzero()[:, 0]
        exact = torch.zeros_like(weight)
        exact[:, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight @ hessian)[:, kept].t()).t()
        out = solve(weight, hessian, int(mask.sum()), Given(mask), SparseGPT(damp=0.0))
        gaps[removed] = float(errors(weight, out.weight, hessian).sum() - errors(weight, exact, hessian).sum())
    assert min(gaps.values()) > -1e-8
    assert abs(gaps[(0, 1)]) < 1e-8
    assert max(gaps.values()) > 1e-3


def test_blocks_change_nothing_under_a_given_mask() -> None:
    weight, hessian = problem(5, 6, 150)
    mask = torch.rand(6, 150) < 0.5
    first, *others = [solve(weight, hessian, int(mask.sum()), Given(mask), SparseGPT(block=b)).weight for b in (1, 7, 64, 128, 500)]
    assert all(torch.allclose(first, other, atol=1e-9) for other in others)


def test_without_correlation_it_ranks_as_wanda_and_updates_nothing() -> None:
    weight, _ = problem(0, 24, 40)
    norms = torch.arange(1.0, 41.0).double()
    out = solve(weight, norms.square().diag(), 480, PerRow(), SparseGPT(damp=0.0))
    assert torch.equal(out.mask, PerRow().mask(weight.abs() * norms, 480))
    assert torch.allclose(out.weight, weight * out.mask, atol=1e-9)


@pytest.mark.parametrize("pattern", [PerMatrix(), PerRow(), NM(2, 4), NM(4, 8), Block(4, 1), Rows()], ids=str)
def test_the_structure_and_the_count_hold_over_several_blocks(pattern: Pattern) -> None:
    weight, hessian = problem(6, 8, 152)
    count = pattern.nearest(weight.shape, weight.numel() // 2)
    out = solve(weight.float(), hessian.float(), count, pattern, SparseGPT(block=32))
    assert int(out.mask.sum()) == int((out.weight != 0).sum()) == count
    assert torch.equal(pattern.mask(out.mask.float(), count), out.mask)


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 130), (2, 3, 3, 4)])
def test_every_count_is_exact_on_odd_shapes(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    x = torch.randn(weight[0].numel() + 5, weight[0].numel())
    for count in {0, 1, weight.numel() // 3, weight.numel() - 1, weight.numel()}:
        for pattern in (PerMatrix(), PerRow()):
            out = solve(weight, x.t() @ x, count, pattern)
            assert out.weight.shape == out.mask.shape == weight.shape
            assert int(out.mask.sum()) == int((out.weight != 0).sum()) == count


def test_damping_is_raised_tenfold_and_reported() -> None:
    weight = torch.randn(12, 3)
    indefinite = torch.tensor([[1.0, 2.5, 0.0], [2.5, 1.0, 0.0], [0.0, 0.0, 1.0]])  # smallest eigenvalue -1.5
    assert solve(weight, indefinite, 18, PerMatrix()).notes["damping"] == pytest.approx(10.0)
    assert solve(weight, torch.eye(3), 18, PerMatrix()).notes["damping"] == 0.01


def test_a_matrix_that_rounding_calls_positive_definite_stays_finite() -> None:
    almost = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # damping 1 makes it exactly singular
    out = solve(torch.randn(12, 3), almost, 18, PerMatrix())
    assert torch.isfinite(out.weight).all()
    assert int(out.mask.sum()) == 18


def test_dead_inputs_go_first_and_density_one_changes_nothing() -> None:
    weight, hessian = (t.float() for t in problem(7, 24, 40, tokens=10))
    hessian[7], hessian[:, 7] = 0, 0
    for pattern in (PerMatrix(), PerRow()):
        assert not solve(weight, hessian, 480, pattern).mask[:, 7].any()
    assert torch.equal(solve(weight, hessian, 960, PerMatrix()).weight, weight)
    assert torch.isfinite(solve(weight, torch.zeros(40, 40), 480, PerMatrix()).weight).all()


def test_bound_dtype_and_arguments_are_respected() -> None:
    weight, hessian = (t.float() for t in problem(8, 24, 40))
    before = weight.clone(), hessian.clone()
    bound = torch.rand(24, 40) < 0.7
    out = solve(weight, hessian, 300, PerMatrix(), bound=bound)
    assert int(out.mask.sum()) == 300
    assert not (out.mask & ~bound).any()
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    half = solve(weight.bfloat16(), hessian, 300, PerMatrix())
    assert half.weight.dtype == torch.bfloat16
    assert not half.weight[~half.mask].any()


def test_bad_statistics_name_the_site() -> None:
    weight, hessian = problem(9, 4, 5)
    with pytest.raises(BadInput, match="a: a Hessian of shape"):
        solve(weight, hessian[:3, :3], 10, PerMatrix())
    hessian[0, 0] = float("nan")
    with pytest.raises(BadInput, match="a: a weight or Hessian with NaN"):
        solve(weight, hessian, 10, PerMatrix())
