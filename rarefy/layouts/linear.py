"""A linear map by a weight in any layout: the layout's own product, and the dense derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.layouts.registry import ANY, DENSE, differentiates, implements


@implements(F.linear, DENSE, ANY)
@implements(F.linear, DENSE, ANY, DENSE)
def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b``; with a gradient wanted, or under autocast, to the bit as the dense product."""
    if x.requires_grad or weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight.matrix().dense().to(weight.dtype), bias)
    product: Tensor = weight.matrix().linear(x, bias)
    return product


@differentiates(F.linear, DENSE, ANY)
@differentiates(F.linear, DENSE, ANY, DENSE)
def linear_gradient(gradient: Tensor, x: Tensor, weight: Any, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """``dx = g W, dW = g^T x, db = sum g``."""
    g, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (g @ weight.matrix().dense().to(g.dtype)).view(x.shape).to(x.dtype) if x.requires_grad else None
    dw = (g.t() @ rows.to(g.dtype)).to(weight.dtype) if weight.requires_grad else None
    return (dx, dw) if bias is None else (dx, dw, g.sum(0).to(bias.dtype))
