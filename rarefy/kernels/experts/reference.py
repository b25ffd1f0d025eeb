"""The specification, in PyTorch. N assignments of R rows to E experts; expert E is nobody."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def sort(expert: Tensor, item: Tensor, weight: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments (expert, item, weight [N]) in the order of their experts, those to nobody last; inclusive ends of each expert's, [E].

    >>> [t.tolist() for t in sort(torch.tensor([2, 0, 1, 0]), torch.tensor([0, 0, 1, 1]), torch.ones(4), 2)]
    [[0, 0, 1, 2], [0, 1, 1, 0], [1.0, 1.0, 1.0, 1.0], [2, 3]]
    """
    ordered, order = expert.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=expert.device), right=True)
    return ordered, item[order], weight[order], ends


def spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have assignments, and where those lie."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def linear(x: Tensor, weight: Tensor, ends: Tensor, item: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y_n = W_e x_{item_n} + b_e`` for the expert e whose span holds n, 0 beyond the last end.

    x [R, I] with item [N], or x [N, I] without; weight [E, O, I], bias [E, O], ends [E] -> [N, O].

    >>> x, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[[10.0]], [[100.0]]])
    >>> linear(x, weight, torch.tensor([1, 2]), torch.tensor([1, 0, 0])).tolist()
    [[20.0], [100.0], [0.0]]
    """
    out = x.new_zeros((x if item is None else item).shape[0], weight.shape[1])
    for expert, span in spans(ends):
        rows = x[span] if item is None else x[item[span]]
        out[span] = F.linear(rows, weight[expert], None if bias is None else bias[expert])
    return out


def combine(y: Tensor, item: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``out_r = sum_n [item_n = r] w_n y_n``: y [A, O] -> [R, O] for the R rows of x, in its type; item and weight may be longer than A.

    >>> combine(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 1]), torch.tensor([0.5, 2.0]), torch.ones(2, 3)).tolist()
    [[0.0], [4.5]]
    """
    item, weight = item[: y.shape[0]], weight[: y.shape[0]]
    return x.new_zeros(x.shape[0], y.shape[1]).index_add(0, item, (y * weight[:, None]).to(x.dtype))
