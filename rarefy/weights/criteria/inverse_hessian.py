"""Inverse Hessian: a weight counts for its square over what the other weights of its row could make up for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import safe_cholesky
from rarefy.core.roles import Criterion


@dataclass(frozen=True)
class InverseHessian(Criterion):
    """Rate a weight by the layer-wise loss of removing it with the best update of its row.

    ``s_ij = w_ij^2 / ([H^-1]_jj)^p``, ``H = X X^T + damp * mean(diag X X^T) I``

    p = 1 is the optimal brain surgeon's rise of the squared error, up to a factor of two; p = 2 weighs the inputs more.
    `scores` takes weight [O, ..., I] and hessian [C, C]; returns float32 scores of the weight's shape, of no unit for p = 2.
    H is scaled to a mean diagonal of one first, which changes no ranking within a matrix. A dead input rates its weights 0.

    Raises:
        BadInput: a Hessian of another width, or one with NaN.

    Source: Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NIPS 1992, for p = 1.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # its inverse has the diagonal 2/3; half the mean diagonal is divided out
    >>> InverseHessian(power=1, damp=0.0).scores(torch.tensor([[2.0, -1.0]]), hessian=h).tolist()
    [[3.0, 0.75]]
    """

    power: int = 2
    damp: float = 0.01
    name = "inverse-hessian"

    def scores(self, weight: Tensor, *, generator: Generator | None = None, hessian: Tensor) -> Tensor:
        columns = weight[0].numel()
        if hessian.shape != (columns, columns) or not torch.isfinite(hessian).all():
            raise BadInput(f"a Hessian of shape {tuple(hessian.shape)}", f"a finite one of {columns} columns is needed", "check the calibration data")
        dead = hessian.diagonal() <= 0
        live = hessian.double() / hessian.diagonal().double()[~dead].mean() if not bool(dead.all()) else torch.zeros_like(hessian, dtype=torch.float64)
        live.diagonal()[dead] = 1.0
        lower, _ = safe_cholesky(live, damp=self.damp)
        inverse = torch.cholesky_inverse(lower).diagonal().clamp_min(torch.finfo(torch.float64).tiny)
        rated = weight.detach().double().reshape(-1, columns).square() / inverse**self.power
        return rated.masked_fill(dead, 0.0).float().view(weight.shape)
