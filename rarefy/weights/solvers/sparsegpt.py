"""SparseGPT: prune column by column and let the columns to the right make up for what was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import safe_cholesky, split_budget
from rarefy.core.records import Paper, Pruned, Recipe
from rarefy.core.roles import Pattern, Solver
from rarefy.weights.allocations.uniform import Uniform
from rarefy.weights.patterns.unstructured import PerMatrix

LEAF = 32
Choose = Callable[[Tensor, int, int], Tensor]  # (weights [C, O] so far, start, stop) -> bool [stop - start, O], True is kept


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Blockwise optimal brain surgeon on the layer-wise squared error.

    ``min_{w', mask} ||(w - w') x||^2 = tr((w - w') H (w - w')^T)``; with ``(H + damp * mean(diag H) I)^-1 = U^T U``, U upper
    triangular, column j of the pruned rows has error ``e = w_j / U_jj``, and ``w_{j+1:} -= e U_{j,j+1:}``. The mask is chosen
    block by block on the weights as they are by then, by ``w_ij^2 / U_jj^2``.

    `solve` takes weights [O, ..., I] and stats["hessian"] [C, C], the sum of x x^T in the canonical order of the C columns.
    Patterns whose `span` is 1 are chosen per `block` columns, narrower ones (N:M) per `span` columns, structures that need the
    whole matrix (`span` 0), and everything under a `bound`, before the sweep. The dtype of the weight is kept; the
    arithmetic is float32, or float64 where a float32 factorisation fails. `notes` of each result say: damping, mask ("adaptive"
    or what it was chosen by), rows_not_updated.

    Raises:
        BadInput: a Hessian of the wrong shape, or one with NaN; the site is named.

    Source: Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774,
    Algorithm 1. Ours differs: U is the inverse of one flipped Cholesky factor instead of Cholesky, inverse, Cholesky; counts are
    exact; weights of dead inputs rank last but keep their value where the count reaches them; an output row whose
    error rose (damping, and the order of the columns) keeps its values; where pruning by |w| or |w| ||x|| without update would be better, that mask is swept.

    >>> w = {"a": torch.tensor([[2., 1.]])}
    >>> h = {"a": torch.tensor([[2., 1.], [1., 2.]])}
    >>> SparseGPT(damp=0.0).solve(w, {"a": 1}, stats={"hessian": h}, pattern=PerMatrix())["a"].weight.tolist()
    [[2.0, 0.0]]
    >>> h = {"a": torch.tensor([[2., 1.9], [1.9, 9.]])}
    >>> out = SparseGPT(damp=0.0).solve(w, {"a": 1}, stats={"hessian": h}, pattern=PerMatrix())["a"]
    >>> [round(v, 3) for v in out.weight.flatten().tolist()]  # 1 + 2 * 1.9 / 9
    [0.0, 1.422]
    """

    damp: float = 0.01
    block: int = 128
    name = "sparsegpt"
    paper = Paper(
        "sparsegpt",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "arXiv 2301.00774",
        (
            "one flipped Cholesky factor is inverted instead of Cholesky, inverse, Cholesky",
            "counts are exact, and weights of dead inputs keep their value where the count reaches them",
            "an output row whose undamped error rose keeps its values",
            "a magnitude or activation-weighted mask replaces an adaptive one that is worse than it even without its update",
        ),
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hessian",)

    def solve(
        self,
        weights: Mapping[str, Tensor],
        budget: Mapping[str, int],
        *,
        stats: Mapping[str, Mapping[str, Tensor]],
        pattern: Pattern,
        bound: Mapping[str, Tensor] | None = None,
        generator: Generator | None = None,
    ) -> dict[str, Pruned]:
        pruned = {}
        for name, weight in weights.items():
            hessian = stats["hessian"][name]
            columns = weight[0].numel()
            if hessian.shape != (columns, columns):
                raise BadInput(f"{name}: a Hessian of shape {tuple(hessian.shape)}", f"the weight {tuple(weight.shape)} has {columns} input columns")
            if not torch.isfinite(hessian).all() or not torch.isfinite(weight).all():
                raise BadInput(f"{name}: a weight or Hessian with NaN or inf", "both must be finite", "check the calibration data")
            pruned[name] = self._site(weight.detach(), hessian, budget[name], pattern, None if bound is None else bound.get(name))
        return pruned

    def _site(self, weight: Tensor, hessian: Tensor, count: int, pattern: Pattern, bound: Tensor | None) -> Pruned:
        upper, used = self._factor(hessian.double() if weight.dtype == torch.float64 else hessian.float())
        w_OC = weight.reshape(weight.shape[0], -1).to(upper.dtype)
        h_CC = hessian.to(upper.dtype)
        dead = hessian.diagonal() == 0

        def up_front(scores_OC: Tensor) -> Tensor:
            return pattern.mask(scores_OC.view(weight.shape), count, bound).reshape(w_OC.shape)

        def swept(mask_OC: Tensor) -> tuple[Tensor, Tensor]:
            return _sweep(w_OC, upper, lambda _, a, b: mask_OC.t()[a:b], self.block, self.block)

        if pattern.span and bound is None:
            step = pattern.span if pattern.span > 1 else self.block
            choose = partial(_choose, pattern, upper.diagonal(), dead, _quotas(pattern, weight.shape, ~dead, count, step))
            new, mask, how = *_sweep(w_OC, upper, choose, self.block, step), "adaptive"
        else:
            new, mask, how = *swept(up_front(_scores(w_OC, upper.diagonal(), dead))), "up front"
        best = _better_rows(w_OC, new, mask, h_CC)
        for label, scores in (("|w| ||x||", w_OC.abs() * h_CC.diagonal().clamp_min(0).sqrt()), ("|w|", w_OC.abs())):
            simple = up_front(scores)
            if float(_errors(w_OC * ~simple, h_CC).sum()) < float(best[1].sum()):
                new, mask = swept(simple)
                best, how = _better_rows(w_OC, new, mask, h_CC), label
        new, _, _, kept_rows = best
        notes = {"damping": used, "mask": how, "rows_not_updated": kept_rows}
        return Pruned(new.to(weight.dtype).view(weight.shape), mask.view(weight.shape), notes=notes)

    def _factor(self, hessian: Tensor) -> tuple[Tensor, float]:
        """(U, damping used) with (H + damping mean(diag H) I)^-1 = U^T U; dead inputs count as average ones."""
        filled = hessian.clone()
        diagonal = filled.diagonal()
        live = diagonal[diagonal != 0]
        diagonal[diagonal == 0] = live.mean() if len(live) else 1.0
        # Flipping both axes turns the lower factor of the flipped H into an upper factor R of H = R R^T; U = R^-1.
        flipped = filled.flip(0, 1)
        try:
            lower, used = safe_cholesky(flipped, damp=self.damp, tries=1)
        except BadInput:
            lower, used = safe_cholesky(flipped.double(), damp=self.damp)
        upper = lower.flip(0, 1)
        return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True), used


def _scores(w_OC: Tensor, scale_C: Tensor, dead_C: Tensor) -> Tensor:
    return (w_OC / scale_C).square().masked_fill(dead_C, 0.0)


def _choose(pattern: Pattern, scale_C: Tensor, dead_C: Tensor, quotas: Mapping[int, int], w_CO: Tensor, start: int, stop: int) -> Tensor:
    """The mask of the columns start:stop on the weights as they are now."""
    return pattern.mask(_scores(w_CO[start:stop].t(), scale_C[start:stop], dead_C[start:stop]), quotas[start]).t()


def _quotas(pattern: Pattern, shape: torch.Size, live_C: Tensor, count: int, step: int) -> dict[int, int]:
    """{start: count} of every slice of `step` columns: the same number per row in proportion to the live columns; the total exact.

    Whole rows' worth first, so that a per-row pattern gives every row its share; the rest of count/rows goes to one slice.
    """
    rows = shape[0]
    parts = {start: live_C[start : start + step] for start in range(0, len(live_C), step)}
    widths = [len(p) for p in parts.values()]
    each, rest = divmod(pattern.nearest(shape, count), rows)
    ideal = [float(p.sum()) for p in parts.values()] if pattern.span == 1 else [float(w) for w in widths]
    split = [rows * n for n in split_budget(ideal, each, caps=widths)]
    if rest:
        split[next(i for i, n in enumerate(split) if n < rows * widths[i])] += rest
    return {start: pattern.nearest((rows, width), n) for start, width, n in zip(parts, widths, split, strict=True)}


def _sweep(w_OC: Tensor, upper: Tensor, choose: Choose, batch: int, step: int) -> tuple[Tensor, Tensor]:
    """One pass over the columns; returns (new weights, mask), both [O, C].

    `choose` is asked every `step` columns. Rank-one updates stay within a leaf, the rest of a batch is updated once per leaf, the
    columns after it once per batch.
    """
    w = w_OC.t().contiguous().clone()  # [C, O]: a column of the weight is contiguous
    mask = torch.zeros_like(w, dtype=torch.bool)
    errors = torch.zeros_like(w)
    columns = len(w)
    leaf = min(LEAF, step)
    for start in range(0, columns, max(batch // step, 1) * step):
        stop = min(start + max(batch // step, 1) * step, columns)
        for a in range(start, stop, leaf):
            b = min(a + leaf, stop)
            if (a - start) % step == 0:
                mask[a : a + step] = choose(w, a, min(a + step, columns))
            for j in range(a, b):
                errors[j] = (w[j] / upper[j, j]).masked_fill(mask[j], 0.0)
                w[j + 1 : b].addr_(upper[j, j + 1 : b], errors[j], alpha=-1)
            w[b:stop].addmm_(upper[a:b, b:stop].t(), errors[a:b], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return torch.where(mask, w, torch.zeros((), dtype=w.dtype, device=w.device)).t(), mask.t()


def _errors(delta_OC: Tensor, h_CC: Tensor) -> Tensor:
    """``delta_i H delta_i^T`` of every output row, float64 [O]."""
    return ((delta_OC @ h_CC) * delta_OC).sum(1, dtype=torch.float64).clamp_min(0)


def _better_rows(w_OC: Tensor, new_OC: Tensor, mask_OC: Tensor, h_CC: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(weights, error, error without update, number of rows without update): every row updated unless that raised its error."""
    plain = torch.where(mask_OC, w_OC, torch.zeros((), dtype=w_OC.dtype, device=w_OC.device))
    error, error_mask_only = _errors(w_OC - new_OC, h_CC), _errors(w_OC - plain, h_CC)
    worse = error > error_mask_only
    new = torch.where(worse[:, None], plain, new_OC)
    return new, torch.minimum(error, error_mask_only), error_mask_only, int(worse.sum())


SPARSEGPT = Recipe("sparsegpt", SparseGPT(), Uniform(), PerMatrix())
