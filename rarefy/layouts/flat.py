"""Flat: every value in row order, as one-dimensional bytes, for a matrix that only a reader of the plan may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.errors import BadFile
from rarefy.core.roles import Layout
from rarefy.kernels.dense import DenseMatrix
from rarefy.layouts.sections import aligned, join, up


@dataclass(frozen=True)
class Flat(Layout):
    """``up64(O * I * itemsize)`` bytes, whatever is zero.

    >>> Flat().pack(torch.tensor([[1.0, 0.0]])).numel(), Flat().size((2, 3), 2, torch.float32)
    (64, 64)
    >>> Flat().unpack(Flat().pack(torch.tensor([[1.0, 0.0]])), (1, 2), torch.float32).tolist()
    [[1.0, 0.0]]
    """

    name = "flat"
    lossless = True

    def size(self, shape: tuple[int, int], kept: int, dtype: torch.dtype) -> int:
        return up(shape[0] * shape[1] * dtype.itemsize)

    def pack(self, weight: Tensor) -> Tensor:
        return join([weight.detach().contiguous()])

    def check(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
        wanted = self.size(shape, 0, dtype)
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != wanted:
            raise BadFile(f"packed tensor {name}", f"a flat {shape[0]} x {shape[1]} takes {wanted} bytes, it holds {packed.numel()}", "write the folder again")
        if bool(packed[shape[0] * shape[1] * dtype.itemsize :].any()):
            raise BadFile(f"packed tensor {name}", "its padding is not zero", "write the folder again")

    def matrix(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> DenseMatrix:
        return DenseMatrix(aligned(packed[: shape[0] * shape[1] * dtype.itemsize], dtype).view(shape))
