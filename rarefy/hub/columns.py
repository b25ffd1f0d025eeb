"""Linear layers stored by columns, in place: for matrices whose inputs a gate makes zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from rarefy.core.attach import plain_type
from rarefy.hub.packed import PackedLinear
from rarefy.hub.plan import DTYPES
from rarefy.hub.tensors import digest
from rarefy.layouts import LAYOUTS
from rarefy.layouts.columns import ByColumns

TWINS: dict[str, ByColumns] = {layout.rows: layout for layout in LAYOUTS.values() if isinstance(layout, ByColumns)}


def store_columns(module: Any) -> None:
    """Let a layer keep its values by columns, so that a column that meets a zero is not read; the values are the same, bit for bit.

    A Linear keeps its parameter, whose memory is turned: the tensor is a transposed view. A packed layer whose layout has a
    twin by columns is packed again in that one, and no longer saves as the layer of its plan. Any other layer is left as it
    is. The old memory is released; while one matrix is turned, it is there twice.

    >>> linear = nn.Linear(3, 2)
    >>> store_columns(linear)
    >>> linear.weight.shape, linear.weight.stride()
    (torch.Size([2, 3]), (1, 2))
    """
    kind = plain_type(module)
    if kind is nn.Linear:
        module.weight.data = module.weight.data.t().contiguous().t()
    elif kind is PackedLinear and module.layer.layout in TWINS:
        before, twin = module.layer, TWINS[module.layer.layout]
        packed = twin.turn(module.weight.detach(), before.shape, DTYPES[before.dtype])
        module.layer = replace(before, layout=twin.name, sha256=digest(packed), bytes=packed.numel())
        module.weight = nn.Parameter(packed, requires_grad=False)
