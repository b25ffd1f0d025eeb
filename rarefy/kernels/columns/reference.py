"""The specification, in PyTorch."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """``y_b = sum over i with x_bi != 0 of x_bi values_i + bias`` for x [B, I] and values [I, O].

    A column that is zero in every row of x is not there: NaN in it does not reach y. NaN in x is not zero.

    >>> import torch
    >>> linear(torch.tensor([[0.0, 2.0]]), torch.tensor([[float("nan")], [3.0]]), None).tolist()
    [[6.0]]
    """
    live = (x != 0).any(0)
    y = x[:, live] @ values[live]
    return y if bias is None else y + bias
