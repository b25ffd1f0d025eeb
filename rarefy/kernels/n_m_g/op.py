"""The operation that layers call. There is no native kernel yet: the matrix is unpacked for every product."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from rarefy.core.errors import BadFile
from rarefy.kernels.dense import DenseMatrix
from rarefy.kernels.library import suits
from rarefy.kernels.n_m_g import reference


class NofMofGMatrix:
    """A matrix [O, I] in groups of R = C(m, n) g rows and chunks of m columns: values [G, K, R, n], the row of each slot [G, K, R].

    The tensors are kept as they are, not copied.

    Raises:
        BadFile: the sizes do not fit.

    >>> import torch
    >>> m = NofMofGMatrix(torch.tensor([[[[2.0], [3.0]]]]), torch.tensor([[[1, 0]]], dtype=torch.uint8), 1, 2, 1, (2, 2))
    >>> m.dense().tolist(), m.linear(torch.tensor([[1.0, 10.0]])).tolist()
    ([[0.0, 3.0], [2.0, 0.0]], [[30.0, 2.0]])
    """

    def __init__(self, values: Tensor, index: Tensor, n: int, m: int, g: int, shape: tuple[int, int]) -> None:
        self.values, self.index, self.n, self.m, self.g, self.shape = values, index, n, m, g, shape
        self.rows, self.columns = shape
        self.fast = suits(values)
        self._unpacked: DenseMatrix | None = None
        size = math.comb(m, n) * g
        wanted = (-(-shape[0] // size), -(-shape[1] // m), size)
        if values.shape != (*wanted, n) or index.shape != wanted:
            raise BadFile(f"a {n}:{m}:{g} matrix of {shape[0]} x {shape[1]}", f"it holds values {tuple(values.shape)}, rows {tuple(index.shape)}", "write the file again")

    def dense(self) -> Tensor:
        """The matrix [O, I]."""
        return reference.unpack(self.values, self.index.long(), self.n, self.m, self.g, self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + b``: x [..., I] -> y [..., O]."""
        return F.linear(x, self.dense().to(x.dtype), bias)

    kind = "dense"

    def arguments(self) -> tuple[int, ...]:
        """What the native side takes it by until it has a kernel: the unpacked matrix, which is kept from then on."""
        if self._unpacked is None:
            self._unpacked = DenseMatrix(self.dense())
        return self._unpacked.arguments()
