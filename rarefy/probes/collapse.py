"""Whether rows collapse onto their experts' centres, and how steadily they are routed."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import BadInput


def collapse(x: Tensor, expert: Tensor) -> float:
    """``tr(S_within pinv(S_between))``, rows x [R, d] by the expert [R] each went to: small where rows lie near their expert's mean.

    S_within is the mean covariance of a row about its expert's mean, S_between that of the experts' means about the rows' mean, both
    weighted by rows. Source: Chi et al., arXiv 2204.09179, eq. 10 (from Zhu et al., arXiv 2105.02375, where all classes are as large).

    Raises:
        BadInput: fewer than two experts were used.

    >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    >>> round(collapse(x, torch.tensor([0, 0, 1, 1])), 3)
    0.04
    """
    x = x.double()
    used, index = expert.unique(return_inverse=True)
    if used.numel() < 2:
        raise BadInput(f"rows of {used.numel()} expert", "collapse compares at least two", "route more rows")
    mean = torch.zeros(used.numel(), x.shape[1], dtype=x.dtype, device=x.device).index_add(0, index, x) / index.bincount()[:, None]
    within, between = x - mean[index], mean[index] - x.mean(0)
    return float(torch.trace((within.T @ within) @ torch.linalg.pinv(between.T @ between)))


def agreement(one: Tensor, other: Tensor) -> float:
    """The share of rows that two checkpoints send to the same expert: expert [R] of each. One less it is the paper's routing fluctuation.

    >>> agreement(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    0.75
    """
    return float((one == other).double().mean())


def consistency(loads: Tensor) -> float:
    """``sum_ij rho_ij / m^2``, rho_ij the correlation of two runs' loads: of m runs from one checkpoint, so that experts keep their names.

    loads [m, E], how many rows each expert of each run got. A run that is even has no correlation with another: 0.
    Source: Chi et al., arXiv 2204.09179, section 4.5 (inter-run consistency).

    >>> round(consistency(torch.tensor([[4, 1, 1], [8, 2, 2]])), 3), round(consistency(torch.tensor([[4, 1, 1], [1, 1, 4]])), 3)
    (1.0, 0.25)
    """
    centred = loads.double() - loads.double().mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    off = unit @ unit.T
    return float(off.fill_diagonal_(1.0).mean())
