"""What a module multiplies its matrix by: the rows [R, C] of its input, C in the order of the canonical view [O, ..., I]."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def obstacle(module: nn.Module) -> str:
    """Why no input second moment [C, C] is right for the module's matrix; "" where one is.

    A layer-wise squared error is ``tr(D H D^T)`` with one H for every output row. A grouped convolution has one H per
    group (each output channel sees its own group's patches), and an embedding's error is ``sum_v n_v ||D_v||^2``: the
    count n_v of every id weighs the output axis, not the input columns.

    >>> obstacle(nn.Conv2d(4, 4, 3)), obstacle(nn.Conv2d(4, 4, 3, groups=2))
    ('', 'a convolution of 2 groups has one second moment per group, not one for its matrix')
    """
    if isinstance(module, nn.Embedding):
        return "an embedding has no input features: how often an id occurs weighs its rows, not its columns"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention computes its output projection without calling it, so that no input is seen"
    groups = getattr(module, "groups", 1) if isinstance(module, Conv) else 1
    if groups != 1:
        return f"a convolution of {groups} groups has one second moment per group, not one for its matrix"
    return ""


def family(module: nn.Module) -> str:
    """Two modules of one family read a tensor that they share along the same axis (transformers' Conv1D reads across a Linear's)."""
    return next((kind.__name__ for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), type(module).__qualname__)


def reading(module: nn.Module) -> Hashable:
    """Two modules with equal readings make the same rows of the same input."""
    if isinstance(module, Conv):
        return (type(module).__name__, module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return "last axis"


def rows(module: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The rows [R, C]; where `valid` [B, T] fits the leading axes of a sequence [B, T, C] (or [B * T, C]), only those of valid tokens."""
    if isinstance(module, Conv):
        return _patches(module, x)
    if valid is not None and x.dim() == 3 and x.shape[:2] == valid.shape:
        return x[valid]
    if valid is not None and x.dim() == 2 and x.shape[0] == valid.numel():
        return x[valid.reshape(-1)]  # a host that flattens batch and sequence
    return x.reshape(-1, x.shape[-1])


def _patches(module: Conv, x: Tensor) -> Tensor:
    """Every patch that the kernel covers, [B * places, K * I], input channel innermost; padding as the module pads."""
    axes = len(module.kernel_size)
    x = x[None] if x.dim() == axes + 1 else x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    places, kernel = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    return x.permute(0, *places, *kernel, 1).reshape(-1, math.prod(module.kernel_size) * x.shape[1])


def expert_hidden(module: Any, expert: int | None, rows: Tensor) -> Tensor:
    """What the second matrix of a fused expert is given for the rows [R, H] that the expert sees: [R, I]."""

    def linear(x: Tensor, param: str) -> Tensor:
        weight = getattr(module, param)[expert]
        y = x @ weight if getattr(module, "is_transposed", False) else F.linear(x, weight)
        bias = getattr(module, f"{param}_bias", None)
        return y if bias is None else y + bias[expert]

    if hasattr(module, "gate_up_proj"):
        hidden: Tensor = module._apply_gate(linear(rows, "gate_up_proj"))
        return hidden
    activated: Tensor = module.act_fn(linear(rows, "up_proj"))
    return activated
