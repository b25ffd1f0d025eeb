"""Exact selection and exact rounding: a budget of 1,000 keeps 1,000, whatever the ties.

Every mask and every count in the library comes from here, so that there is one tie policy:
among equal scores the entry with the lower flat index is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.core.errors import BadInput


def topk_mask(scores: Tensor, count: int, bound: Tensor | None = None) -> Tensor:
    """The mask of the `count` largest scores; ties are kept in order of flat index.

    ``mask = 1 at the first count entries of a stable descending sort``

    Args:
        scores: any shape, any real dtype; NaN is refused, -inf is allowed and ranks last.
        count: how many entries to keep, 0 <= count <= number of entries that `bound` allows.
        bound: bool, the shape of `scores`; entries where it is False are never kept.

    Returns:
        bool, the shape of `scores`, with exactly `count` True entries.

    Raises:
        BadInput: NaN scores, or a count out of range.

    >>> topk_mask(torch.tensor([2., 2., 1., 2.]), 2).tolist()
    [True, True, False, False]
    """
    flat = scores.detach().flatten()
    if torch.isnan(flat).any():
        raise BadInput(f"scores of shape {tuple(scores.shape)} hold {int(torch.isnan(flat).sum())} NaN", "a score must be a number", "check the calibration data for NaN or inf")
    room = flat.numel() if bound is None else int(bound.sum())
    if not 0 <= count <= room:
        raise BadInput(f"count {count}", f"a mask over {room} allowed entries keeps between 0 and {room}")
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if count == 0:
        return mask.view(scores.shape)
    if bound is not None:
        # Ranked among the allowed entries only, so that an allowed -inf still beats a forbidden entry.
        index = bound.flatten().nonzero()[:, 0]
        mask[index[_topk_index(flat[index], count)]] = True
    else:
        mask[_topk_index(flat, count)] = True
    return mask.view(scores.shape)


def _topk_index(flat: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, lower index first among ties, in O(n) for the common case."""
    if count == flat.numel():
        return torch.arange(count, device=flat.device)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above = (flat > threshold).nonzero()[:, 0]
    ties = (flat == threshold).nonzero()[:, 0]
    return torch.cat([above, ties[: count - above.numel()]])


def topk_mask_rows(scores_RC: Tensor, counts_R: Tensor | Sequence[int] | int, bound_RC: Tensor | None = None) -> Tensor:
    """Row by row `topk_mask`, with one count for all rows or one each.

    Args:
        scores_RC: [R, C].
        counts_R: one count, or R counts.
        bound_RC: bool [R, C] or None.

    Returns:
        bool [R, C] with exactly counts_R[r] True entries in row r.

    >>> topk_mask_rows(torch.tensor([[1., 3.], [5., 5.]]), [2, 1]).tolist()
    [[True, True], [True, False]]
    """
    if torch.isnan(scores_RC).any():
        raise BadInput(f"scores of shape {tuple(scores_RC.shape)} hold NaN", "a score must be a number", "check the calibration data for NaN or inf")
    rows, columns = scores_RC.shape
    counts = torch.as_tensor(counts_R, device=scores_RC.device).expand(rows)
    room = torch.full_like(counts, columns) if bound_RC is None else bound_RC.sum(1).to(counts)
    if bool((counts < 0).any()) or bool((counts > room).any()):
        raise BadInput(f"row counts {counts.min().item()}..{counts.max().item()}", f"a row of {columns} columns keeps between 0 and what its bound allows ({room.min().item()})")
    scores = scores_RC.detach()
    order = scores.sort(dim=1, descending=True, stable=True).indices
    if bound_RC is not None:  # allowed entries first, each group still in score order
        order = order.gather(1, (~bound_RC).gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(columns, device=order.device).expand(rows, columns))
    return rank < counts[:, None]


def split_budget(ideal: Sequence[float], budget: int, *, floors: Sequence[int] | None = None, caps: Sequence[int] | None = None) -> list[int]:
    """Integers near `ideal` that add up to `budget` exactly, inside floors and caps.

    ``c_i = clip(s * ideal_i, floor_i, cap_i) with s such that sum c_i = budget, then largest remainder``

    Args:
        ideal: non-negative wishes, in the unit of the counts; only their ratios matter.
        budget: the total, sum(floors) <= budget <= sum(caps).
        floors, caps: bounds of each count (default 0 and no bound).

    Returns:
        One count per wish; ties in the remainder go to the earlier entry.

    Raises:
        BadInput: a negative or NaN wish, or a budget that the bounds cannot meet.

    >>> split_budget([1, 1, 1], 4)
    [2, 1, 1]
    >>> split_budget([8, 1, 1], 10, caps=[4, 9, 9])
    [4, 3, 3]
    """
    wish = torch.tensor(list(ideal), dtype=torch.float64)
    low = torch.tensor(list(floors) if floors is not None else [0] * len(wish), dtype=torch.float64)
    high = torch.tensor(list(caps) if caps is not None else [max(budget, 0)] * len(wish), dtype=torch.float64)
    if bool((~torch.isfinite(wish)).any()) or bool((wish < 0).any()):
        raise BadInput(f"wishes {wish.tolist()}", "an allocation wishes for finite, non-negative counts")
    if bool((low > high).any()) or not low.sum() <= budget <= high.sum():
        raise BadInput(
            f"budget {budget}", f"floors add up to {int(low.sum())} and caps to {int(high.sum())}, and the budget lies between", "change the density, the floors or the caps"
        )
    exact = _scale_into(wish, float(budget), low, high)
    count = torch.minimum(torch.maximum(exact.floor(), low), high)
    short = budget - int(count.sum())
    by_remainder = torch.argsort(exact - count, descending=True, stable=True).tolist()
    while short:
        for i in by_remainder:
            step = 1 if short > 0 else -1
            if short and low[i] <= count[i] + step <= high[i]:
                count[i] += step
                short -= step
    return [int(c) for c in count]


def _scale_into(wish: Tensor, budget: float, low: Tensor, high: Tensor) -> Tensor:
    """clip(s * wish, low, high) with the s that meets the budget (bisection: the sum is monotone in s).

    What no scale can give, because the wishes are zero, is spread over the room left.
    """

    def at(scale: float) -> Tensor:
        return torch.minimum(torch.maximum(scale * wish, low), high)

    positive = wish[wish > 0]
    top = float((high[wish > 0] / positive).max()) if len(positive) else 0.0
    lo, hi = 0.0, top
    for _ in range(200):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if float(at(mid).sum()) < budget else (lo, mid)
    got = at(hi)
    room = high - got
    short = budget - float(got.sum())
    if short > 1e-6 and float(room.sum()) > 0:
        got = got + room * (short / float(room.sum()))
    return got


def keep_count(numel: int, density: float) -> int:
    """How many of `numel` weights a density keeps: round(density * numel), ties to even.

    >>> keep_count(1000, 0.5)
    500
    """
    if not 0.0 <= density <= 1.0:
        raise BadInput(f"density {density}", "a density is the fraction of weights that is kept, in [0, 1]", "pass for example 0.5")
    return round(density * numel)


def safe_cholesky(matrix_NN: Tensor, *, damp: float = 0.01, tries: int = 10) -> tuple[Tensor, float]:
    """The Cholesky factor of ``H + lambda mean(diag H) I``, raising lambda tenfold until it exists.

    Args:
        matrix_NN: symmetric [N, N], float32 or float64, finite.
        damp: the first lambda, a fraction of the mean diagonal.
        tries: how often lambda may be raised.

    Returns:
        (lower factor [N, N], the lambda that was used).

    Raises:
        BadInput: no lambda in reach makes the matrix positive definite, or it holds NaN.

    >>> factor, used = safe_cholesky(torch.tensor([[1., 1.], [1., 1.]]), damp=0.0)
    >>> used > 0
    True
    """
    if not torch.isfinite(matrix_NN).all():
        raise BadInput("a Hessian with NaN or inf", "statistics must be finite", "check the calibration data")
    mean = float(matrix_NN.diagonal().mean()) or 1.0
    for attempt in range(tries):
        used = damp * 10**attempt if damp else (0.0 if attempt == 0 else 1e-8 * 10**attempt)
        damped = matrix_NN.clone()
        damped.diagonal().add_(used * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return factor, used
    raise BadInput(
        f"a Hessian of shape {tuple(matrix_NN.shape)} with smallest diagonal {float(matrix_NN.diagonal().min()):.3g}",
        f"it is not positive definite even with damping {used:.3g}",
        "use more calibration tokens or a larger damping",
    )
