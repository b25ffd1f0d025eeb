"""Flat: every value in row order, as one-dimensional bytes, for a matrix that only a reader of the plan may use."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import BadFile

NAME = "flat"
ALIGN = 64
Shape = tuple[int, int]


def size(shape: Shape, kept: int, dtype: torch.dtype) -> int:
    """Bytes of a matrix [O, I], whatever is zero: ``up64(O * I * itemsize)``.

    >>> size((2, 3), 2, torch.float32)
    64
    """
    return -(-shape[0] * shape[1] * dtype.itemsize // ALIGN) * ALIGN


def pack(weight: Tensor) -> Tensor:
    """Pack a matrix [O, I] into uint8 [bytes]: its values in row order, zeros to the next multiple of 64.

    >>> pack(torch.tensor([[1.0, 0.0]])).numel()
    64
    """
    values = weight.detach().contiguous().flatten().view(torch.uint8)
    packed = torch.zeros(size((weight.shape[0], weight.shape[1]), 0, weight.dtype), dtype=torch.uint8, device=weight.device)
    packed[: values.numel()] = values
    return packed


def check(packed: Tensor, shape: Shape, dtype: torch.dtype, name: str) -> None:
    """Raise BadFile unless the bytes are those of this shape and the padding is zero."""
    wanted = size(shape, 0, dtype)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != wanted:
        raise BadFile(f"packed tensor {name}", f"a flat {shape[0]} x {shape[1]} takes {wanted} bytes, it holds {packed.numel()}", "write the folder again")
    if bool(packed[shape[0] * shape[1] * dtype.itemsize :].any()):
        raise BadFile(f"packed tensor {name}", "its padding is not zero", "write the folder again")


def unpack(packed: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The dense matrix [O, I] of uint8 [bytes] that `check` accepted.

    >>> unpack(pack(torch.tensor([[1.0, 0.0]])), (1, 2), torch.float32).tolist()
    [[1.0, 0.0]]
    """
    return packed[: shape[0] * shape[1] * dtype.itemsize].clone().view(dtype).view(shape)
