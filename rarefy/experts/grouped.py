"""One registered op for a bank: every expert's linear map over its own rows; opaque to the compiler, so no graph breaks.

Axis legend: R routed rows, N assignments sorted by expert, E experts, I input and O output columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import experts as kernel
from rarefy.kernels.experts import reference


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, *, item: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Run expert e over its rows: ``y_n = W_e x_{item_n} + b_e`` for offsets[e-1] <= n < offsets[e], and 0 beyond the last.

    x [R, I] with item [N], or x [N, I] without; weight [E, O, I], bias [E, O], offsets [E] inclusive ends -> [N, O].
    Differentiable, twice too, in x, weight and bias. Rows are gathered expert by expert inside the op; under autocast it
    computes in autocast's type, as F.linear does.

    >>> x, weight = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[[10.0]], [[100.0]]])
    >>> grouped_linear(x, weight, torch.tensor([1, 2])).tolist()
    [[10.0], [200.0], [0.0]]
    >>> grouped_linear(x, weight, torch.tensor([0, 2]), item=torch.tensor([2, 0])).tolist()
    [[400.0], [100.0]]
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    quick = kernel.natively(x, weight, offsets, item, bias)  # without the tens of microseconds of a registered op
    return _linear(x, weight, bias, item, offsets) if quick is None else quick


@torch.library.custom_op("rarefy::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? item, Tensor offsets) -> Tensor")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, item: Tensor | None, offsets: Tensor) -> Tensor:
    return reference.linear(x, weight, offsets, item, bias)


@torch.library.custom_op("rarefy::grouped_outer", mutates_args=(), schema="(Tensor g, Tensor x, Tensor? item, Tensor offsets) -> Tensor")
def _outer(g: Tensor, x: Tensor, item: Tensor | None, offsets: Tensor) -> Tensor:
    """Per expert the sum over its rows of g_n x_{item_n}': g [N, O], x [R, I] -> [E, O, I]."""
    out = x.new_zeros(offsets.shape[0], g.shape[1], x.shape[1])
    for expert, span in reference.spans(offsets):
        out[expert] = g[span].T @ (x[span] if item is None else x[item[span]])
    return out


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, item: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty((x if item is None else item).shape[0], weight.shape[1])


@_outer.register_fake
def _(g: Tensor, x: Tensor, item: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], g.shape[1], x.shape[1])


def _to_rows(g: Tensor, item: Tensor | None, rows: int) -> Tensor:
    """The gradient of a gather: [N, I] back to [R, I]."""
    return g if item is None else g.new_zeros(rows, g.shape[1]).index_add(0, item, g)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, item, offsets = inputs
    ctx.save_for_backward(x, weight, item, offsets)
    ctx.biased = bias is not None


def _linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, item, offsets = ctx.saved_tensors
    dx = _to_rows(_linear(g, weight.transpose(1, 2), None, None, offsets), item, x.shape[0]) if ctx.needs_input_grad[0] else None
    dw = _outer(g, x, item, offsets) if ctx.needs_input_grad[1] else None
    db = _outer(g, g.new_ones(g.shape[0], 1), None, offsets).squeeze(2) if ctx.biased and ctx.needs_input_grad[2] else None
    return dx, dw, db, None, None


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    g, x, item, offsets = ctx.saved_tensors
    dg = _linear(x, gg, None, item, offsets)
    dx = _to_rows(_linear(g, gg.transpose(1, 2), None, None, offsets), item, x.shape[0])
    return dg, dx, None, None


_linear.register_autograd(_linear_backward, setup_context=_save_linear)
_outer.register_autograd(_outer_backward, setup_context=_save_outer)
