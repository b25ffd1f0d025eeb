"""Packed bytes as operators of torch, so that compiled code computes with them as they lie: one call in the graph, no break."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import rarefy.layouts as _layouts
from rarefy.core.errors import BadFile
from rarefy.core.roles import Matrix, Rows

_ABOUT = "str layout, int rows, int columns, ScalarType dtype"
_READY = WeakTensorKeyDictionary()  # {bytes: (what they were, the matrix that was made of them)}


def ready(packed: Tensor, layout: str, shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
    """The matrix that bytes hold, ready to compute with; made again where they were moved or written to. It goes when the tensor does.

    >>> packed = _layouts.LAYOUTS["bitmask"].pack(torch.tensor([[0.0, 2.0]]))
    >>> ready(packed, "bitmask", (1, 2), torch.float32) is ready(packed, "bitmask", (1, 2), torch.float32)
    True
    """
    now = (packed.data_ptr(), packed._version, packed.device, layout, shape, dtype)
    found = _READY.get(packed)
    if found is None or found[0] != now:
        found = _READY[packed] = now, _layouts.LAYOUTS[layout].matrix(packed.detach(), shape, dtype)
    matrix: Matrix = found[1]
    return matrix


def rows_of(packed: Tensor, layout: str, shape: tuple[int, int], dtype: torch.dtype) -> Rows:
    """`ready`, of which single rows can be read. Raises BadFile where they cannot."""
    matrix = ready(packed, layout, shape, dtype)
    if not isinstance(matrix, Rows):
        raise BadFile(f"an embedding in layout {layout}", "single rows cannot be read from it", "write the folder again")
    return matrix


@torch.library.custom_op("rarefy::packed_linear", mutates_args=(), schema=f"(Tensor x, Tensor packed, Tensor? bias, {_ABOUT}) -> Tensor")
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, layout: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``y = x W^T + b`` as `Matrix.linear` computes it, in native code for few rows of x; it has no derivative."""
    return ready(packed, layout, (rows, columns), dtype).linear(x.contiguous(), bias)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, layout: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("rarefy::packed_dense", mutates_args=(), schema=f"(Tensor packed, {_ABOUT}) -> Tensor")
def packed_dense(packed: Tensor, layout: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [O, I], as `Layout.unpack` gives it, in memory of its own."""
    dense = _layouts.LAYOUTS[layout].unpack(packed, (rows, columns), dtype)
    own = dense.is_contiguous() and dense.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()
    return dense if own else dense.clone(memory_format=torch.contiguous_format)


@packed_dense.register_fake
def _(packed: Tensor, layout: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("rarefy::packed_rows", mutates_args=(), schema=f"(Tensor ids, Tensor packed, {_ABOUT}) -> Tensor")
def packed_rows(ids: Tensor, packed: Tensor, layout: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows [..., I] of ids [...], as `Rows.take` gives them."""
    return rows_of(packed, layout, (rows, columns), dtype).take(ids).to(dtype).contiguous()


@packed_rows.register_fake
def _(ids: Tensor, packed: Tensor, layout: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*ids.shape, columns, dtype=dtype)
