"""Bitmask: one bit per weight, then the kept values in row order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile

NAME = "bitmask"
ALIGN = 64
Shape = tuple[int, int]


def _up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _mask_bytes(shape: Shape) -> int:
    return shape[0] * -(-shape[1] // 8)


def size(shape: Shape, kept: int, dtype: torch.dtype) -> int:
    """Bytes of a matrix [O, I] with `kept` values: ``up64(O * ceil(I / 8)) + up64(kept * itemsize)``.

    >>> size((2, 3), 2, torch.float32)
    128
    """
    return _up(_mask_bytes(shape)) + _up(kept * dtype.itemsize)


def pack(weight: Tensor) -> Tensor:
    """Pack a matrix [O, I] into uint8 [bytes]: rows of bits (low bit first, each row padded to a byte), values from the next multiple of 64.

    A negative zero is stored as a zero; NaN is kept.

    >>> w = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    >>> pack(w)[:2].tolist(), pack(w).numel()
    ([2, 1], 128)
    >>> torch.equal(unpack(pack(w), (2, 3), torch.float32), w)
    True
    """
    rows, columns = weight.shape
    mask = weight != 0
    bits = F.pad(mask, (0, -columns % 8)).view(rows, -(-columns // 8), 8).to(torch.uint8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=weight.device)
    values = weight.detach()[mask].contiguous().view(torch.uint8)
    packed = torch.zeros(size((rows, columns), int(mask.sum()), weight.dtype), dtype=torch.uint8, device=weight.device)
    packed[: _mask_bytes((rows, columns))] = (bits * powers).sum(-1, dtype=torch.uint8).flatten()
    start = _up(_mask_bytes((rows, columns)))
    packed[start : start + values.numel()] = values
    return packed


def _mask(packed: Tensor, shape: Shape) -> Tensor:
    """The bits [O, ceil(I / 8) * 8] as booleans, padding included."""
    rows = packed[: _mask_bytes(shape)].view(shape[0], -1, 1)
    return ((rows >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).bool().flatten(1)


def check(packed: Tensor, shape: Shape, dtype: torch.dtype, name: str) -> None:
    """Raise BadFile unless the bits set account for exactly these bytes and no bit lies past the last column."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < _mask_bytes(shape):
        raise BadFile(f"packed tensor {name}", f"it is too short for the bit mask of {shape[0]} x {shape[1]}", "write the folder again")
    mask = _mask(packed, shape)
    wanted = size(shape, int(mask.sum()), dtype)
    if packed.numel() != wanted or bool(mask[:, shape[1] :].any()):
        raise BadFile(f"packed tensor {name}", f"its bits ask for {wanted} bytes and columns below {shape[1]}, it holds {packed.numel()} bytes", "write the folder again")


def unpack(packed: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The dense matrix [O, I] of uint8 [bytes] that `check` accepted."""
    mask = _mask(packed, shape)[:, : shape[1]]
    start = _up(_mask_bytes(shape))
    values = packed[start : start + int(mask.sum()) * dtype.itemsize].clone().view(dtype)
    dense = torch.zeros(shape, dtype=dtype, device=packed.device)
    dense[mask] = values
    return dense
