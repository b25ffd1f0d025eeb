"""Least squares: what is kept takes over from what is pruned, row by row, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from rarefy.core.errors import BadInput
from rarefy.core.records import Pruned
from rarefy.core.roles import Criterion, Pattern, Solver, asks
from rarefy.weights.criteria.inverse_hessian import InverseHessian

CHUNK = 2**21  # entries of the gathered Hessians that are solved at once: 8 MB, so that they stay in the cache


@dataclass(frozen=True)
class LeastSquares(Solver):
    """Keep what the criterion and the pattern say and solve every row's kept weights for the least squared error of the outputs.

    ``d_K = (H_KK + damp * mean(diag H) I)^-1 H_KP w_P``, ``w'_K = w_K + d_K``, ``w'_P = 0``: K the kept and P the pruned columns of a row.

    This minimises ``(w - w') H (w - w')^T + damp mean(diag H) |d|^2``, so that no row is worse than with its mask alone. `solve`
    takes weights [O, ..., I], stats["hessian"] [C, C] (sum of x x^T) and what the criterion asks for. Rows that keep equally many weights are
    solved together; the cost of a row is cubic in what it keeps. float32, or float64 where a factorisation fails in float32; an update that is
    not finite even then is left out. `notes`: rows_not_updated.

    Raises:
        BadInput: a Hessian of the wrong shape, or one with NaN.

    Source: the closed form of the layer-wise problem that Frantar and Alistarh (SparseGPT, arXiv 2301.00774, section 3.1) state and then
    approximate column by column; here it is solved as it stands.

    >>> from rarefy.weights.patterns.unstructured import PerMatrix
    >>> w, h = {"a": torch.tensor([[2., 1.]])}, {"a": torch.tensor([[2., 1.9], [1.9, 9.]])}
    >>> out = LeastSquares(InverseHessian(power=1, damp=0.0), damp=0.0).solve(w, {"a": 1}, stats={"hessian": h}, pattern=PerMatrix())["a"]
    >>> [round(v, 3) for v in out.weight.flatten().tolist()]  # 1 + 2 * 1.9 / 9
    [0.0, 1.422]
    """

    criterion: Criterion = field(default_factory=InverseHessian)
    damp: float = 0.01
    name = "least-squares"

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        from rarefy.weights.criteria.wanda import Wanda

        return (cls(), cls(InverseHessian(power=1)), cls(Wanda()))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("hessian", *asks(self.criterion.scores))))

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
            hessian, columns = stats["hessian"][name], weight[0].numel()
            if hessian.shape != (columns, columns) or not torch.isfinite(hessian).all() or not torch.isfinite(weight).all():
                raise BadInput(f"{name}: a Hessian of shape {tuple(hessian.shape)}", f"a finite weight {tuple(weight.shape)} needs a finite one of {columns} columns")
            scores = self.criterion.scores(weight, generator=generator, **{s: stats[s][name] for s in asks(self.criterion.scores)})
            mask = pattern.mask(scores, budget[name], None if bound is None else bound.get(name))
            new, left = self._rows(weight.detach().reshape(-1, columns), mask.reshape(-1, columns), hessian)
            pruned[name] = Pruned(new.view(weight.shape), mask, notes={"rows_not_updated": left})
        return pruned

    def _rows(self, w_OC: Tensor, mask_OC: Tensor, hessian: Tensor) -> tuple[Tensor, int]:
        """(new weights in the dtype of w, rows that could not be updated)."""
        size = hessian.diagonal().clamp_min(0).mean()
        h_CC = hessian.float() / (size if float(size) > 0 else 1.0)
        old = w_OC.float()
        new = torch.where(mask_OC, old, 0.0)
        lost, kept, left = (old - new) @ h_CC, mask_OC.sum(1), 0
        for count in kept.unique().tolist():
            rows = (kept == count).nonzero().flatten()
            for part in rows.split(max(1, CHUNK // max(count * count, 1))) if 0 < count < mask_OC.shape[1] else ():
                index = mask_OC[part].nonzero()[:, 1].view(len(part), count)
                change = _solved(h_CC, index, lost[part].gather(1, index), self.damp)
                fine = torch.isfinite(change).all(1, keepdim=True)
                left += int((~fine).sum())
                new[part] = new[part].scatter_add(1, index, torch.where(fine, change, 0.0))
        # an update to exactly zero stays: the mask says what is kept
        return new.to(w_OC.dtype), left


def _solved(h_CC: Tensor, index_RK: Tensor, wanted_RK: Tensor, damp: float) -> Tensor:
    """``(H_KK + damp I)^-1 b`` of every row [R, K]; NaN where H_KK is not positive definite even in float64."""
    picked = h_CC[index_RK[:, :, None], index_RK[:, None, :]]
    picked.diagonal(dim1=1, dim2=2).add_(damp)
    lower, failed = torch.linalg.cholesky_ex(picked)
    found = torch.cholesky_solve(wanted_RK[..., None], lower)[..., 0]
    if bool(failed.any()):
        lower, hopeless = torch.linalg.cholesky_ex(picked[failed > 0].double())
        again = torch.cholesky_solve(wanted_RK[failed > 0, :, None].double(), lower)[..., 0]
        found[failed > 0] = again.masked_fill((hopeless > 0)[:, None], float("nan")).float()
    return found
